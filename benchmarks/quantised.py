"""LoRA tuning on bases of fewer bits: a step's time and memory next to a whole base, in turns; and what a merge keeps.

Arms: the base in the type that this machine multiplies natively, bfloat16 or float32; `8bit`; `4bit`. All compute in
that type. Each measurement is a process of its own. The 15m shape is 320 wide, not 288 as in tuning.py: 4-bit layers
take inputs in blocks of 64. Memory is the process's: once the model is there, and at its peaks until then and in
training; mapped files count while they are read.

The KL is from a 4-bit run's model to itself merged, in nats per token of held-out text: into the base's own weights,
into the dequantised ones (which `smolora merge` does), and the latter quantised again. It needs the real data.

python benchmarks/quantised.py --shape 15m --rounds 3       # needs: pip install -e .[quant]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _measuring import find_shared, median, print_table
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from tuning import NATIVE, ROWS_PER_STEP, SHAPES, StepTimes, make_rows

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import load_bundle
from smolora.config import ExperimentConfig, LoRAConfig, SpeedConfig, TrainingConfig, resolve_config
from smolora.config.model import Quantization
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset
from smolora.models.bundle import ModelBundle
from smolora.models.loading import load_model
from smolora.models.structure import is_quantised
from smolora.recipes.finetune import finetune
from smolora.records.staging import write_json
from smolora.runtime.memory import MemoryManager, keep_large_blocks
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained
from smolora.training.trainer import Trainer

PLAIN = str(NATIVE).removeprefix("torch.")
ARMS = (PLAIN, "8bit", "4bit")


class Cost(NamedTuple):
    """What one process measured."""

    seconds: float
    """Median step."""
    layer_bytes: int
    """Weights of the blocks' linear layers, with their scales."""
    loaded_bytes: int
    loading_peak_bytes: int
    training_peak_bytes: int
    loss: float
    """Of the last step."""


def shape_of(name: str) -> dict[str, int]:
    wide = {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5}
    return SHAPES[name] | (wide if name == "15m" else {})


def prepare(shape: str, folder: Path) -> None:
    """Write a random base model."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape_of(shape), tie_word_embeddings=True, max_position_embeddings=1024)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    to_pretrained(CharTokenizer.train(["abc"]), 1024).save_pretrained(folder)


def measure(args: argparse.Namespace) -> Cost:
    """Run one arm in this process."""
    keep_large_blocks()
    held: Quantization = args.child if args.child in ("8bit", "4bit") else "none"
    base = load_model(args.folder, dtype=NATIVE, quantization=held)
    loaded = MemoryManager().get_memory_usage()
    restart_peak()
    layer_bytes = sum(count_bytes(base.model.get_submodule(name)) for name in base.anatomy.linear_modules())
    bundle = attach_adapter(base, LoRAConfig(lora_dropout=0.0), seed=0)
    rows = TokenDataset(make_rows("e2e", SHAPES[args.shape]["vocab_size"], ROWS_PER_STEP * args.steps))
    config = TrainingConfig(max_steps=args.steps, learning_rate=2e-4, lr_scheduler_type="constant", warmup_steps=0)
    times = StepTimes()
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        Trainer(bundle, rows, config, collate=collate_packed, callbacks=[times]).train()
    seconds = median([record.seconds for record in times.records[args.warmup :]])
    peak = MemoryManager().get_memory_usage().process_peak
    return Cost(seconds, layer_bytes, loaded.process, loaded.process_peak, peak, times.records[-1].loss)


def restart_peak() -> None:
    """Let the process's peak start anew at what it holds now; Linux only."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5", encoding="ascii")


def count_bytes(layer: nn.Module) -> int:
    """Return the bytes of a linear layer's weight and of the scales it is held with."""
    weight: Any = layer.get_parameter("weight")
    state: Any = vars(layer).get("state")
    scales = []
    if is_quantised(layer):
        scales = [weight.quant_state.absmax] if weight.dtype == torch.uint8 else [state.SCB]
    return sum(int(tensor.nbytes) for tensor in (weight, *scales))


def measure_merges(folder: Path) -> dict[str, float]:
    """Return the KL of each way to merge a 4-bit run on a real model and real rows."""
    rows, model = find_shared("data/e2e/devset.csv"), find_shared("models/stories260K/config.json").parent
    settings = {
        "model.name_or_path": model,
        "model.quantization": "4bit",
        "data.sources": rows,
        "data.prompt_field": "mr",
        "data.completion_field": "ref",
        "training.learning_rate": 3e-3,
        "training.max_steps": 60,
        "training.eval_steps": 60,
    }
    config = resolve_config(ExperimentConfig, assignments=[f"{name}={value}" for name, value in settings.items()])
    run = finetune(config, folder / "run")
    merge_adapter(run.adapter, folder / "dequantised")
    identity = json.loads((run.adapter / "base_identity.json").read_text())
    trained = load_bundle(run.path, dtype=torch.float32)
    write_json(run.adapter / "base_identity.json", {**identity, "quantization": "none"})
    merge_adapter(run.adapter, folder / "own")
    others = {
        "the base alone": load_model(model, quantization="4bit"),
        "merged into the base's own weights": load_model(folder / "own"),
        "merged dequantised, quantised again": load_model(folder / "dequantised", quantization="4bit"),
        "merged dequantised": load_model(folder / "dequantised"),
    }
    texts = [line.replace('"', "") for line in rows.read_text(encoding="utf-8").splitlines()[1:65]]
    return {name: compute_kl(trained, other, texts) for name, other in others.items()}


@torch.no_grad()
def compute_kl(trained: ModelBundle, other: ModelBundle, texts: list[str]) -> float:
    """Return the mean KL(trained || other) over every position of the texts, in nats."""
    sums = []
    for text in texts:
        ids = torch.tensor([trained.tokenizer(text)["input_ids"]])
        expected, found = (bundle.model(input_ids=ids).logits[0].log_softmax(-1) for bundle in (trained, other))
        sums.append(F.kl_div(found, expected, log_target=True, reduction="none").sum(-1))
    return torch.cat(sums).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="15m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        sys.exit("skipped: bitsandbytes isn't installed (pip install -e .[quant]).")
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.shape, Path(folder))
        costs: dict[str, list[Cost]] = {arm: [] for arm in ARMS}
        for _ in range(args.rounds):
            for arm in ARMS:
                options = [f"--{name}={getattr(args, name)}" for name in ("shape", "steps", "warmup")]
                command = [sys.executable, __file__, "--child", arm, "--folder", folder, *options]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                costs[arm].append(Cost(*json.loads(output.splitlines()[-1])))
    _print_costs(args, costs)
    with tempfile.TemporaryDirectory() as folder:
        kl = measure_merges(Path(folder))
    print_table(
        "KL from a 4-bit run's model, nats per token", ["to", "KL"], [(name, f"{x:.2g}") for name, x in kl.items()]
    )


def _print_costs(args: argparse.Namespace, costs: dict[str, list[Cost]]) -> None:
    seconds = {arm: median([cost.seconds for cost in measured]) for arm, measured in costs.items()}
    rows = []
    for arm, measured in costs.items():
        mebibytes = [
            max(getattr(cost, name) for cost in measured) / 2**20
            for name in ("layer_bytes", "loaded_bytes", "loading_peak_bytes", "training_peak_bytes")
        ]
        rows.append((arm, seconds[arm] * 1e3, seconds[arm] / seconds[PLAIN], *mebibytes, measured[0].loss))
    header = [
        "base",
        "ms a step",
        f"of {PLAIN}",
        "layers MiB",
        "loaded MiB",
        "loading peak",
        "training peak",
        "last loss",
    ]
    print_table(f"{args.shape}, {ROWS_PER_STEP} rows a step, {args.rounds} rounds of {args.steps} steps", header, rows)


if __name__ == "__main__":
    main()
