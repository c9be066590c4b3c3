"""What watching the gradients costs a LoRA training step on the fast path, which should be under 1 %.

One step in ten is a logged one. What is added up is the own time of the callback that every tuning run has, since a
difference of whole steps drowns in a machine's noise.

python benchmarks/gradient_norms.py --shapes 15m 135m
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _measuring import median, print_table
from tuning import NATIVE, ROWS_PER_STEP, SHAPES, make_rows, prepare

from smolora.adapters.fast_path import fast_path
from smolora.adapters.store import load_adapter
from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset
from smolora.models.loading import load_model
from smolora.runtime.memory import keep_large_blocks
from smolora.training.callback import Callback
from smolora.training.gradients import GradientNormCallback
from smolora.training.state import StepRecord
from smolora.training.trainer import Trainer


class Timed(Callback):
    """Passes every event on and adds up what it takes."""

    def __init__(self, inner: GradientNormCallback) -> None:
        self.inner, self.seconds = inner, 0.0
        self.steps: list[float] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.inner.on_train_begin(trainer)

    def on_gradients(self, trainer: Trainer) -> None:
        self._time(lambda: self.inner.on_gradients(trainer))

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        self._time(lambda: self.inner.on_log(trainer, record))

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.steps.append(record.seconds)

    def _time(self, event: Callable[[], None]) -> None:
        started = time.perf_counter()
        event()
        self.seconds += time.perf_counter() - started


def measure_cost(shape: str, steps: int) -> tuple[float, float, float]:
    """Return the median step and the callback's time per step, in milliseconds, and their ratio."""
    rows = TokenDataset(make_rows("e2e", SHAPES[shape]["vocab_size"], ROWS_PER_STEP * steps))
    timed = Timed(GradientNormCallback())
    with tempfile.TemporaryDirectory() as folder:
        prepare(shape, Path(folder))
        base = load_model(Path(folder) / "base", dtype=NATIVE)
        bundle = load_adapter(base, Path(folder) / "adapter", trainable=True)
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        Trainer(bundle, rows, TrainingConfig(max_steps=steps), collate=collate_packed, callbacks=[timed]).train()
    step, own = median(timed.steps), timed.seconds / steps
    return step * 1e3, own * 1e3, own / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    keep_large_blocks()
    rows = [(shape, *measure_cost(shape, args.steps)) for shape in args.shapes]
    type_name = str(NATIVE).removeprefix("torch.")
    title = f"LoRA on all linear modules, E2E-shaped rows, {type_name}"
    print_table(title, ["shape", "step ms", "own ms", "share"], rows)


if __name__ == "__main__":
    main()
