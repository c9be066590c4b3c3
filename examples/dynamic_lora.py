"""Fine-tune in phases, and see what each of them moved: the certificates, and where the gradients were.

python examples/dynamic_lora.py                                         # makes its own tiny model and rows
python examples/dynamic_lora.py --strategy early,late
python examples/dynamic_lora.py --model MODEL_OR_HUB_ID --data FILE     # uses yours
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from smolora import (
    DataConfig,
    DynamicLoRAConfig,
    ExperimentConfig,
    GPTConfig,
    GradientNormLog,
    LoRAConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
)
from smolora.recipes.finetune import finetune
from smolora.recipes.pretrain import pretrain
from smolora.records.run_dir import RunDir

ANIMALS = ("fox", "hen", "owl", "cat", "dog", "pig", "bee", "ant")
PLACES = ("in the barn", "by the pond", "on the hill", "under the tree", "at the gate")
FOODS = ("corn", "seeds", "fish", "apples", "honey")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model: a folder, a run or a hub id (default: one is pretrained first)")
    parser.add_argument("--data", help="rows to learn from: txt, csv, jsonl, json or parquet (default: made up)")
    parser.add_argument("--strategy", default="both,mlp,attn", help="phases by name (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=90, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the run (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smolora-phases-") as scratch:
        tune_in_phases(arguments, Path(scratch))


def tune_in_phases(arguments: argparse.Namespace, scratch: Path) -> None:
    model = arguments.model or pretrain_tiny(scratch)
    data = arguments.data or write_rows(scratch / "rows.jsonl")
    config = ExperimentConfig(
        model=ModelConfig(name_or_path=str(model)),
        data=DataConfig(sources=(str(data),)),
        adapter=LoRAConfig(r=8),
        training=TrainingConfig(max_steps=arguments.steps, learning_rate=2e-3),
        phases=DynamicLoRAConfig(strategy=arguments.strategy, learning_rate="restart"),
    )
    run = finetune(config, arguments.output or scratch / "run")
    print_certificates(run)
    print_norms(run)


def print_certificates(run: RunDir) -> None:
    print("phase  steps      trains                 tensors  how far each group moved, of its length")
    for phase in json.loads(run.phase_report.read_text(encoding="utf-8"))["phases"]:
        moved = ", ".join(
            f"{name} {100 * group['relative_distance']:.1f} %" if group["trained"] else f"{name} not at all"
            for name, group in phase["groups"].items()
        )
        steps = f"{phase['start'] + 1}-{phase['end']}"
        print(f"{phase['phase']:<5}  {steps:<9}  {phase['selects']:<21}  {len(phase['declared']):<7}  {moved}")


def print_norms(run: RunDir) -> None:
    print("\nstep  phase  attention      mlp  (gradient norms; - is frozen)")
    for row in GradientNormLog(run.path).read_groups():
        attention, mlp = ("        -" if row[name] is None else f"{row[name]:9.4f}" for name in ("attention", "mlp"))
        print(f"{row['step']:>4}  {row['phase']:>5}  {attention}{mlp}")


def pretrain_tiny(scratch: Path) -> Path:
    """Pretrain a small GPT on sentences about who is where."""
    chance = random.Random(0)
    lines = (f"The {chance.choice(ANIMALS)} is {chance.choice(PLACES)}." for _ in range(2000))
    text = scratch / "text.txt"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = PretrainConfig(
        gpt=GPTConfig(num_layers=4, num_heads=4, width=64, context=64),
        data=DataConfig(sources=(str(text),)),
        training=TrainingConfig(max_steps=150, learning_rate=3e-3, per_device_train_batch_size=16),
    )
    return pretrain(config, scratch / "base")


def write_rows(file: Path) -> Path:
    """Write rows of another kind: the same animals, and what they eat."""
    chance = random.Random(1)
    rows = ({"text": f"The {animal} eats {chance.choice(FOODS)}."} for animal in ANIMALS for _ in range(40))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
