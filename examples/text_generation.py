"""Text, from config to inference: a GPT learns made-up stories and continues one, greedily, drawn and streamed.

python examples/text_generation.py            # offline, about half a minute of one core
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from smolora import DataConfig, GPTConfig, InferencePipeline, PretrainConfig, SamplingSettings, TrainingConfig
from smolora.recipes.pretrain import pretrain

ANIMALS = ("fox", "hen", "owl", "cat", "dog", "pig")
PLACES = ("in the barn", "by the pond", "on the hill", "under the tree")
FOODS = ("corn", "seeds", "apples", "honey")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="smolora-generation-") as scratch:
        walk(Path(scratch))


def walk(folder: Path) -> None:
    chance = random.Random(0)
    (folder / "stories.txt").write_text("\n".join(write_story(chance) for _ in range(3000)), encoding="utf-8")
    base = pretrain(
        PretrainConfig(
            gpt=GPTConfig(num_layers=2, num_heads=4, width=64, context=128),
            data=DataConfig(sources=(str(folder / "stories.txt"),)),
            training=TrainingConfig(max_steps=400, learning_rate=3e-3, per_device_train_batch_size=16),
        ),
        folder / "base",
    )
    pipeline = InferencePipeline.from_path(base)
    line = SamplingSettings(max_new_tokens=80, temperature=0, stop=("\n",))
    starts = ["The fox", "The owl is"]
    print("greedy:")
    for start, answer in zip(starts, pipeline.generate(starts, settings=line), strict=True):
        print(f"  {start}{answer}")
    print("drawn, top-p .9, three seeds:")
    for seed in range(3):
        drawn = line.replace(temperature=0.8, top_p=0.9, seed=seed)
        print(f"  The hen{pipeline.generate('The hen', settings=drawn)}")
    print("streamed, with a penalty on what was said: ", end="")
    for piece in pipeline.stream("The dog", settings=line.replace(repetition_penalty=1.2)):
        print(piece, end="", flush=True)
    print()


def write_story(chance: random.Random) -> str:
    first, second = chance.sample(ANIMALS, 2)
    place, food = chance.choice(PLACES), chance.choice(FOODS)
    return f"The {first} is {place}. It sees the {second} and they eat {food}."


if __name__ == "__main__":
    main()
