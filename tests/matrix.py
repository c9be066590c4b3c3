"""Every method on every task, in every precision, with and without checkpointing: what each combination is held to.

A cell that the table of `smolora.config.compatibility` lets through must train (each declared tensor moves, the loss
of its eight rows falls), come back from disk to the same numbers, and merge where its method changes weights. One that
the table refuses must be refused before a model is loaded. `python -m tests.matrix > docs/matrix.md` writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from smolora.adapters.attach import is_adapted
from smolora.adapters.fast_path import fast_path
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import load_bundle, save_adapter
from smolora.config import ExperimentConfig, resolve_config
from smolora.config.adapter import METHODS
from smolora.config.compatibility import FLOAT32_LINKS, NEEDS_FLOAT32, OBSTACLES, find_float32_need, find_obstacle
from smolora.config.model import Quantization, TaskType
from smolora.data.collate import get_data_collator
from smolora.errors import ConfigError, ModelError
from smolora.models.bundle import ModelBundle
from smolora.models.saving import save_model
from smolora.recipes.finetune import Tuning, open_tuning
from smolora.recipes.run_folder import choose_callbacks
from smolora.records.run_dir import RunDir
from smolora.training.loss import target_logits_of
from smolora.training.trainer import Trainer
from tests.tiny import (
    HAS_BITSANDBYTES,
    WHOLE_BLOCKS,
    save_tiny_encoder,
    save_tiny_model,
)

TASKS: tuple[TaskType, ...] = get_args(TaskType)
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "8bit": {"model.quantization": "8bit"},
    "4bit": {"model.quantization": "4bit"},
}
SOFT_PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")

_STEPS = 12
_RATES = {"ia3": 5e-2, "vera": 5e-2, "full": 3e-3, "pissa": 3e-3}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    method: str
    task: TaskType
    precision: str
    is_checkpointed: bool

    def __str__(self) -> str:
        return f"{self.method}-{self.task}-{self.precision}{'-checkpointed' if self.is_checkpointed else ''}"

    @property
    def quantization(self) -> Quantization:
        """Bits of the base."""
        return "8bit" if self.precision == "8bit" else "4bit" if self.precision == "4bit" else "none"

    @property
    def refusal(self) -> str | None:
        """Why the validator refuses it, or None."""
        found = find_obstacle(
            method=self.method,
            task=self.task,
            quantization=self.quantization,
            gradient_checkpointing=self.is_checkpointed,
        )
        if found:
            return found.reason
        return find_float32_need(method=self.method, quantization="none") if self.precision == "bfloat16" else None


CELLS = tuple(Cell(*values) for values in product(METHODS, TASKS, PRECISIONS, (False, True)))


def cover_pairs(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells that together hold every pair of values that `cells` hold.

    Each next one has a method and a task that haven't met, where some are left, and the most new pairs. For a method 8
    and 4 bits count as one value, for a task as two.
    """
    waiting = {cell: pairs_of(cell) for cell in cells}
    missing = set().union(*waiting.values())
    chosen: list[Cell] = []
    while missing:
        # The first of equals, so the order is fixed.
        best = max(
            waiting, key=lambda cell: (("meet", cell.method, cell.task) in missing, len(waiting[cell] & missing))
        )
        chosen.append(best)
        missing -= waiting[best]
    return chosen


def pairs_of(cell: Cell) -> set[tuple[object, ...]]:
    """Return the pairs of values in a cell."""
    width = "few bits" if cell.precision in ("8bit", "4bit") else cell.precision
    return {
        ("meet", cell.method, cell.task),
        (cell.method, width),
        (cell.method, cell.is_checkpointed),
        (cell.task, cell.precision),
        (cell.task, cell.is_checkpointed),
        (cell.precision, cell.is_checkpointed),
    }


@dataclass(frozen=True)
class Ground:
    """What cells of one task are run on: a tiny base and eight rows."""

    base: Path
    rows: Path


def build_ground(task: TaskType, folder: Path) -> Ground:
    """Write a tiny base, wide enough for 4-bit layers, and rows that it can learn."""
    rows = folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in _make_rows(task)), encoding="utf-8")
    if task == "causal_lm":
        return Ground(save_tiny_model("llama", folder / "base", **WHOLE_BLOCKS["llama"]), rows)
    if task == "seq2seq":
        return Ground(save_tiny_encoder("t5", folder / "base", d_model=64, d_ff=128), rows)
    return Ground(save_tiny_encoder("bert", folder / "base", hidden_size=64, intermediate_size=128), rows)


def _make_rows(task: TaskType) -> Iterator[dict[str, Any]]:
    for number in range(8):
        food, is_good = ("bread", "soup")[number % 2], number % 2
        if task == "classification":
            yield {"text": f"the {food} of place {number} is here", "label": ("bad", "good")[is_good]}
        elif task == "token_classification":
            yield {"tokens": ["the", food, "of", f"place{number}"], "tags": ["O", "FOOD", "O", "PLACE"]}
        elif task == "qa":
            context = f"place {number} has {food} today"
            answers = {"text": [food], "answer_start": [context.index(food)]}
            yield {"context": context, "question": "what is there?", "answers": answers}
        else:
            yield {"prompt": f"food: {food}, place: {number}.", "completion": f"there is {food} at {number}"}


def build_config(cell: Cell, ground: Ground) -> ExperimentConfig:
    """Return the run of a cell.

    Raises:
        ConfigError: The combination is refused.
    """
    known = METHODS[cell.method].model_fields
    small = {"r": 4, "lora_dropout": 0.0, "num_virtual_tokens": 4, "init_r": 6, "target_r": 3, "layers": None}
    settings: dict[str, object] = {
        "model.name_or_path": str(ground.base),
        "model.task_type": cell.task,
        "model.device": "cpu",
        "data.sources": (str(ground.rows),),
        "adapter.method": cell.method,
        **{f"adapter.{name}": value for name, value in small.items() if name in known and value is not None},
        "training.max_steps": _STEPS,
        "training.eval_steps": _STEPS,
        "training.learning_rate": _RATES.get(cell.method, 2e-2),
        "training.gradient_checkpointing": cell.is_checkpointed,
        **PRECISIONS[cell.precision],
    }
    return resolve_config(ExperimentConfig, flags=settings)


def run_cell(cell: Cell, ground: Ground, folder: Path) -> None:
    """Hold a combination to what the table says of it; `folder` is empty."""
    if cell.refusal:
        with pytest.raises(ConfigError) as error:
            build_config(cell, ground)
        assert cell.refusal in str(error.value)
        return
    if cell.precision in ("8bit", "4bit") and not HAS_BITSANDBYTES:
        pytest.skip("bitsandbytes isn't installed: pip install 'smolora[quant]'")
    config = build_config(cell, ground)
    tuning = open_tuning(config)
    before, after = _train(config, tuning, folder)
    assert after < before, f"the loss of the rows went from {before:.4f} to {after:.4f}"
    found = _answer(tuning.bundle, tuning)
    saved = folder / "saved"
    if not is_adapted(tuning.bundle):
        save_model(tuning.bundle, saved)
    else:
        save_adapter(tuning.bundle, saved)
    opened = load_bundle(saved, dtype=tuning.bundle.dtype)
    # PiSSA computes with what it left of the base, and is saved for the base as it was: the sums round otherwise.
    torch.testing.assert_close(_answer(opened, tuning), found, rtol=0, atol=1e-4 if cell.method == "pissa" else 0)
    if is_adapted(tuning.bundle):
        _merge(cell, tuning, found, folder)


def _train(config: ExperimentConfig, tuning: Tuning, folder: Path) -> tuple[float, float]:
    """Train, and return the loss of the rows before and after; the loop itself refuses a tensor that stands still."""
    config = config.replace(evaluation=config.evaluation.replace(batch_size=8))
    with ExitStack() as stack:
        stack.enter_context(fast_path(tuning.bundle, config.speed, is_packed=tuning.layout == "packed"))
        trainer = Trainer(
            tuning.bundle,
            tuning.data.train,
            config.training,
            collate=get_data_collator(tuning.layout, tuning.bundle.task),
            eval_dataset=tuning.data.train,
            evaluation=config.evaluation,
            callbacks=choose_callbacks(RunDir(folder), config, (), is_main=False),
            plan=tuning.steps,
        )
        state = trainer.train()
    assert state.base_eval_loss is not None and state.best_eval_loss is not None
    return state.base_eval_loss, state.best_eval_loss


@torch.no_grad()
def _answer(bundle: ModelBundle, tuning: Tuning) -> Tensor:
    bundle.model.eval()
    batch = get_data_collator(tuning.layout, bundle.task)(list(tuning.data.train))
    logits = target_logits_of(bundle.model, bundle.task)(bundle.model, batch).float()
    return logits[logits.isfinite()]  # Of qa, without the places that can't hold an answer.


def _merge(cell: Cell, tuning: Tuning, found: Tensor, folder: Path) -> None:
    if cell.method in SOFT_PROMPTS:
        with pytest.raises(ModelError):
            merge_adapter(folder / "saved", folder / "merged")
        return
    merge_adapter(folder / "saved", folder / "merged")
    merged = load_bundle(folder / "merged", dtype=torch.float32)
    largest = max(1.0, found.abs().max().item())
    # A merged weight is rounded to the file's float32; a base in fewer bits computed with rounded numbers all along.
    tolerance = 1e-4 if cell.precision == "float32" else 0.1
    torch.testing.assert_close(_answer(merged, tuning) / largest, found / largest, rtol=0, atol=tolerance)


_LETTERS = {"float32": "f", "bfloat16": "b", "8bit": "8", "4bit": "4"}
_HEAD = """# Methods, tasks and precisions

Written by `python -m tests.matrix` from the table that every configuration is checked against. The tests run a cover of
all pairs by default, and each combination in `python3 dev.py test-all`: it trains, comes back from disk to the same
numbers, and merges where its method changes weights.

f: float32, b: bfloat16, 8 and 4: a base of so many bits; -: not this task; [n]: what is refused, and why, below,
with where upstream says so.
"""


def write_page() -> str:
    """Return the documentation's table of methods and tasks, and the reasons of what is refused."""
    reasons = list(dict.fromkeys(cell.refusal for cell in CELLS if cell.refusal))
    links = {row.reason: row.link for row in OBSTACLES}
    links |= {reason: FLOAT32_LINKS.get(method) for method, reason in NEEDS_FLOAT32.items()}
    lines = [_HEAD, f"| method | {' | '.join(TASKS)} |", f"|---|{'---|' * len(TASKS)}"]
    for method in METHODS:
        lines.append(f"| {method} | {' | '.join(_describe(method, task, reasons) for task in TASKS)} |")
    for number, reason in enumerate(reasons, start=1):
        cells = [cell for cell in CELLS if cell.refusal == reason]
        methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
        is_checkpointing = all(cell.is_checkpointed for cell in cells)
        source = f"[upstream]({links[reason]})" if links[reason] else "a choice of this project"
        condition = " with gradient checkpointing" if is_checkpointing else ""
        lines.append(f"{number}. {methods}{condition}: {reason} ({source})")
    lines.insert(-len(reasons), "")
    return "\n".join([*lines, ""])


def _describe(method: str, task: TaskType, reasons: Sequence[str]) -> str:
    cells = [cell for cell in CELLS if (cell.method, cell.task) == (method, task)]
    works = "".join(_LETTERS[cell.precision] for cell in cells if not (cell.refusal or cell.is_checkpointed))
    numbers = sorted({reasons.index(cell.refusal) + 1 for cell in cells if cell.refusal})
    return " ".join([works or "-", *(f"[{number}]" for number in numbers)])


if __name__ == "__main__":
    print(write_page(), end="")
