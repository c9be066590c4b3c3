"""What a phase of the late layers costs beside a step that trains all of them, with and without the cache below it.

The same rows in the same order, 8 a step, E2E-shaped; the cache is filled in a first epoch that isn't timed. Beside the
measure stands the bound by operations: 4 per weight and token where a layer trains, 2 where it only runs forward (none
with the cache), and the head in full.

python benchmarks/phases.py --shape 135m
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _measuring import median, print_table
from tuning import NATIVE, ROWS_PER_STEP, SHAPES, StepTimes, make_rows, prepare

from smolora.adapters.fast_path import fast_path
from smolora.adapters.store import load_adapter
from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset
from smolora.models.loading import load_model
from smolora.runtime.memory import keep_large_blocks
from smolora.training.prefix_cache import PrefixCacheCallback
from smolora.training.trainer import Trainer

ARMS = ("all layers", "late half", "late half, cached")


def measure(arm: str, folder: Path, rows: TokenDataset) -> float:
    """Return the median seconds of a step in the second epoch."""
    bundle = load_adapter(load_model(folder / "base", dtype=NATIVE), folder / "adapter", trainable=True)
    half = bundle.anatomy.num_layers // 2
    if arm != "all layers":
        for name, parameter in bundle.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (bundle.anatomy.part_of(name).layer or 0) >= half)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as cache, fast_path(bundle, SpeedConfig(), is_packed=True):
        caches = [PrefixCacheCallback(Path(cache) / "cache", 2**30)] if arm.endswith("cached") else []
        config = TrainingConfig(num_train_epochs=2, lr_scheduler_type="constant", warmup_steps=0)
        Trainer(bundle, rows, config, collate=collate_packed, callbacks=[*caches, times]).train()
    return median([record.seconds for record in times.records[len(times.records) // 2 :]])


def bound(arm: str, shape: str, rows: TokenDataset) -> float:
    """Return the operations of a step over those of one that trains all layers."""
    sizes = SHAPES[shape]
    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    block = width * (2 * width + 2 * width * sizes["num_key_value_heads"] // heads + 3 * inner)
    blocks = sizes["num_hidden_layers"] * block * rows.num_input_tokens
    head = 4 * width * sizes["vocab_size"] * rows.num_target_tokens
    below = {"all layers": 2.0, "late half": 1.0, "late half, cached": 0.0}[arm]
    return (blocks * (2 + below) + head) / (4 * blocks + head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    args = parser.parse_args()
    keep_large_blocks()
    rows = TokenDataset(make_rows("e2e", SHAPES[args.shape]["vocab_size"], ROWS_PER_STEP * args.steps))
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.shape, Path(folder))
        for _ in range(args.rounds):
            for arm in ARMS:
                seconds[arm].append(measure(arm, Path(folder), rows))
    full = median(seconds["all layers"])
    table = [
        (arm, median(found) * 1e3, median(found) / full, bound(arm, args.shape, rows)) for arm, found in seconds.items()
    ]
    print_table(f"{args.shape}, E2E-shaped rows", ["phase", "ms a step", "of a full step", "by operations"], table)


if __name__ == "__main__":
    main()
