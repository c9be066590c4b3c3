"""Questions about a text, from config to inference: a GPT is pretrained on made-up facts, tuned to answer, and asked.

python examples/question_answering.py            # offline, about a minute of one core
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from smolora import (
    DataConfig,
    ExperimentConfig,
    GPTConfig,
    InferencePipeline,
    LoRAConfig,
    MetricsCalculator,
    ModelConfig,
    PretrainConfig,
    SamplingSettings,
    TrainingConfig,
)
from smolora.recipes.finetune import finetune
from smolora.recipes.pretrain import pretrain

ANIMALS = ("fox", "hen", "owl", "cat", "dog", "pig")
PLACES = ("barn", "pond", "hill", "tree", "gate", "road")
FOODS = ("corn", "seeds", "apples", "honey", "fish", "grass")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="smolora-answering-") as scratch:
        walk(Path(scratch))


def walk(folder: Path) -> None:
    chance = random.Random(0)
    facts = [write_fact(chance) for _ in range(4000)]
    # The text says each fact twice, so that continuing it needs a look back: what questions need, too.
    told = (f"{context} Yes! {context}" for context, *_ in facts)
    (folder / "facts.txt").write_text("\n".join(told), encoding="utf-8")
    rows = [{"prompt": ask(context, question), "completion": answer} for context, question, answer in facts[:2000]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    base = pretrain(
        PretrainConfig(
            gpt=GPTConfig(num_layers=2, num_heads=4, width=64, context=128),
            data=DataConfig(sources=(str(folder / "facts.txt"),)),
            training=TrainingConfig(max_steps=800, learning_rate=5e-3, per_device_train_batch_size=16),
        ),
        folder / "base",
    )
    run = finetune(
        ExperimentConfig(
            model=ModelConfig(name_or_path=str(base), dtype="float32"),
            data=DataConfig(sources=(str(folder / "rows.jsonl"),)),
            adapter=LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.0),
            training=TrainingConfig(max_steps=400, learning_rate=5e-3, per_device_train_batch_size=16),
        ),
        folder / "tuned",
    )
    print("verdict:", json.loads(run.verdict.read_text(encoding="utf-8"))["verdict"])

    pipeline = InferencePipeline.from_path(run.path, settings=SamplingSettings(max_new_tokens=8, temperature=0))
    fresh = [write_fact(chance) for _ in range(200)]
    prompts, right = [ask(context, question) for context, question, _ in fresh], [answer for *_, answer in fresh]
    for name, adapter in (("base", "base"), ("tuned", None)):
        answers = pipeline.generate(prompts, adapter=adapter)
        print(name, MetricsCalculator(["squad"]).compute(answers, right))
    context, question, _ = fresh[0]
    print(f"{context} {question} {pipeline.answer(question, context)}")


def write_fact(chance: random.Random) -> tuple[str, str, str]:
    animal, place, food = chance.choice(ANIMALS), chance.choice(PLACES), chance.choice(FOODS)
    context = f"The {animal} is at the {place} and eats {food}."
    questions = ((f"Where is the {animal}?", place), (f"What does the {animal} eat?", food))
    return context, *chance.choice(questions)


def ask(context: str, question: str) -> str:
    return f"Context: {context}\nQuestion: {question}\nAnswer:"


if __name__ == "__main__":
    main()
