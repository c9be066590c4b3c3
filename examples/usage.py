"""The class SmoLoRA from the base model to an answer, with the seconds that each part took.

python examples/usage.py                                         # makes its own tiny model and rows
python examples/usage.py --model MODEL_OR_HUB_ID --data FILE     # uses yours
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smolora import (
    DataConfig,
    GPTConfig,
    LoRAConfig,
    PretrainConfig,
    SamplingSettings,
    SmoLoRA,
    TextGenerator,
    TrainingConfig,
    load_bundle,
)

ANIMALS = ("fox", "hen", "owl", "cat", "dog", "pig", "bee", "ant")
PLACES = ("in the barn", "by the pond", "on the hill", "under the tree", "at the gate")
FOODS = ("corn", "seeds", "fish", "apples", "honey")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model: a folder, a run or a hub id (default: one is pretrained first)")
    parser.add_argument("--data", help="rows to learn from: txt, csv, jsonl, json or parquet (default: made up)")
    parser.add_argument("--text-field", default="text", help="column of plain text (default: %(default)s)")
    parser.add_argument("--prompt", default="The fox", help="what the model is asked (default: %(default)r)")
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the run (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smolora-usage-") as scratch:
        walk(arguments, Path(scratch))


def walk(arguments: argparse.Namespace, scratch: Path) -> None:
    model = arguments.model or pretrain_tiny(scratch)
    data = arguments.data or write_rows(scratch / "rows.jsonl")

    with timed("open the base and ask it"):
        greedy = SamplingSettings(max_new_tokens=40, temperature=0)
        before = TextGenerator(load_bundle(model)).generate(arguments.prompt, settings=greedy)[0]

    trainer = SmoLoRA(str(model), str(data), arguments.text_field, str(arguments.output or scratch / "out"))
    trainer.config = trainer.config.replace(
        training=TrainingConfig(max_steps=arguments.steps, learning_rate=2e-3), adapter=LoRAConfig(r=16, lora_alpha=32)
    )
    with timed("read the rows"):
        print(f"{trainer.dataset.num_rows} rows, such as {trainer.dataset[0]}")
    with timed("fine-tune"):
        trainer.train()
    with timed("merge and check"):
        trainer.save()
    with timed("load the merged model"):
        trainer.load_model(trainer.merged_model_path)
    with timed("answer"):
        after = trainer.inference(arguments.prompt, max_new_tokens=40, do_sample=False)

    print(f"before: {arguments.prompt + before!r}\nafter:  {arguments.prompt + after!r}")


@contextmanager
def timed(part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"[{time.perf_counter() - started:6.1f} s] {part}")


def pretrain_tiny(scratch: Path) -> Path:
    """Pretrain a small GPT on sentences about who is where."""
    from smolora.recipes.pretrain import pretrain

    chance = random.Random(0)
    lines = (f"The {chance.choice(ANIMALS)} is {chance.choice(PLACES)}." for _ in range(4000))
    text = scratch / "text.txt"
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = PretrainConfig(
        gpt=GPTConfig(num_layers=2, num_heads=4, width=64, context=64),
        data=DataConfig(sources=(str(text),)),
        training=TrainingConfig(max_steps=300, learning_rate=3e-3, per_device_train_batch_size=16),
    )
    with timed("pretrain a tiny base"):
        return pretrain(config, scratch / "base")


def write_rows(file: Path) -> Path:
    """Write rows of another kind: the same animals, and what they eat."""
    chance = random.Random(1)
    rows = ({"text": f"The {animal} eats {chance.choice(FOODS)}."} for animal in ANIMALS for _ in range(40))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
