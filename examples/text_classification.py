"""Sentiment, from config to inference: a GPT reads made-up reviews, is tuned to name their sentiment, and is asked.

python examples/text_classification.py            # offline, about half a minute of one core
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from pathlib import Path

from smolora import (
    DataConfig,
    ExperimentConfig,
    GPTConfig,
    InferencePipeline,
    LoRAConfig,
    ModelConfig,
    PretrainConfig,
    TrainingConfig,
)
from smolora.recipes.finetune import finetune
from smolora.recipes.pretrain import pretrain

LABELS = ("negative", "positive")
THINGS = ("film", "story", "music", "ending", "cast", "plot", "script")
WORDS = {
    "negative": ("dull", "awful", "boring", "weak", "clumsy", "empty"),
    "positive": ("great", "lovely", "clever", "moving", "funny", "warm"),
}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="smolora-classification-") as scratch:
        walk(Path(scratch))


def walk(folder: Path) -> None:
    chance = random.Random(0)
    reviews = [write_review(chance) for _ in range(3000)]
    (folder / "reviews.txt").write_text("\n".join(text for text, _ in reviews), encoding="utf-8")
    rows = [{"prompt": f"Review: {text}\nSentiment:", "completion": label} for text, label in reviews[:1000]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    base = pretrain(
        PretrainConfig(
            gpt=GPTConfig(num_layers=2, num_heads=4, width=64, context=96),
            data=DataConfig(sources=(str(folder / "reviews.txt"),)),
            training=TrainingConfig(max_steps=200, learning_rate=3e-3, per_device_train_batch_size=16),
        ),
        folder / "base",
    )
    run = finetune(
        ExperimentConfig(
            model=ModelConfig(name_or_path=str(base), dtype="float32"),
            data=DataConfig(sources=(str(folder / "rows.jsonl"),)),
            adapter=LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.0),
            training=TrainingConfig(max_steps=200, learning_rate=5e-3, per_device_train_batch_size=16),
        ),
        folder / "tuned",
    )
    print("verdict:", json.loads(run.verdict.read_text(encoding="utf-8"))["verdict"])

    fresh = [write_review(chance) for _ in range(200)]
    pipeline = InferencePipeline.from_path(run.path)
    prompts = [f"Review: {text}\nSentiment:" for text, _ in fresh]
    for name, adapter in (("base", "base"), ("tuned", None)):
        found = pipeline.classify(prompts, LABELS, adapter=adapter)
        right = sum(one.label == label for one, (_, label) in zip(found, fresh, strict=True))
        print(f"{name}: {right} of {len(fresh)} right")
    majority = Counter(label for _, label in fresh).most_common(1)[0][1]
    print(f"always the same label: {majority} of {len(fresh)} right")
    print(f"{fresh[0][0]!r}: {pipeline.classify(prompts[0], LABELS)}")


def write_review(chance: random.Random) -> tuple[str, str]:
    label = chance.choice(LABELS)
    first, second = chance.sample(THINGS, 2)
    praise = chance.sample(WORDS[label], 2)
    return f"The {first} is {praise[0]} and the {second} is {praise[1]}.", label


if __name__ == "__main__":
    main()
