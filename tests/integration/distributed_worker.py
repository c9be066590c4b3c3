"""What two processes of a launcher do, one scenario after the other, each leaving FOLDER/<scenario>-<rank>.json.

One launch for all of them, whose processes find each other but once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from torch.distributed.tensor import DTensor

from smolora import SmoLoRA
from smolora.adapters.attach import plain_model
from smolora.cli.app import run as run_command
from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import SmoloraError
from smolora.recipes.finetune import finetune
from smolora.training.callback import Callback
from tests.forked import run_forked
from tests.integration.distributed_runs import STEPS, TUNING, pretraining_words, tuning_words

RANK = int(os.environ.get("RANK", "0"))  # Without a launcher this file is only collected for its doctests.


class At(Callback):
    """Does something in one step of one process: before the update, or after it."""

    def __init__(self, step: int, rank: int, act: Callable[[object], None], *, is_after: bool = False) -> None:
        self.step, self.rank, self.act, self.is_after = step, rank, act, is_after

    def on_gradients(self, trainer):
        if not self.is_after:
            self._act(trainer, trainer.state.step + 1)

    def on_step_end(self, trainer, record):
        if self.is_after:
            self._act(trainer, record.step)

    def _act(self, trainer, step):
        if (step, RANK) == (self.step, self.rank):
            self.act(trainer)


class Kept(Callback):
    """Counts the bytes of the blocks' frozen matrices that this process keeps: before the first step, and after it."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_begin(self, trainer):
        self.counts = [self._count(trainer)]

    def on_step_end(self, trainer, record):
        if record.step == 1:
            self.counts.append(self._count(trainer))

    def _count(self, trainer):
        trained = set(trainer.parameters.values())
        layers = trainer.bundle.anatomy.blocks_of(plain_model(trainer.bundle))
        frozen = [p for layer in layers for p in layer.parameters() if p.ndim == 2 and p not in trained]
        return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)


class FullDisk(Callback):
    """Fails where a checkpoint is saved, which the main process does alone."""

    def on_save(self, trainer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step-000002")


def main(folder: Path) -> None:
    signal.alarm(240)  # Processes that wait for each other have failed.
    full = ["train", "--model", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--method", "full"]
    pretrain = ["pretrain", *pretraining_words(folder)]
    scenarios: dict[str, Callable[[], tuple[int, str]]] = {
        "tune": lambda: command(["train", *tuning_words(folder), "-o", str(folder / "tune")]),
        "pretrain": lambda: command([*pretrain, "-o", str(folder / "pretrain")]),
        "existing": lambda: command(["train", *tuning_words(folder), "-o", str(folder / "tune")]),
        "rejects": lambda: command(["train", *tuning_words(folder, "broken.jsonl"), "-o", str(folder / "rejects")]),
        "uneven": lambda: command(["train", *tuning_words(folder, batch_size=9), "-o", str(folder / "uneven")]),
        "stopped": lambda: tune(folder, "stopped", At(3, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))),
        "cut": lambda: tune(folder, "cut", At(STEPS, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))),
        "cut_resumed": lambda: command(["train", "--resume", "-o", str(folder / "cut")]),
        "resumed": lambda: command(["train", "--resume", "-o", str(folder / "stopped")]),
        "disk": lambda: tune(folder, "disk", FullDisk()),
        "second": lambda: tune(folder, "second", At(2, 1, fail)),
        "nan": lambda: tune(folder, "nan", At(1, 1, plant_nan, is_after=True)),
        "early": lambda: tune(folder, "early", At(2, 1, stop_early, is_after=True)),
        "other_rows": lambda: tune(folder, "other_rows", dataset=Dataset.from_list([row_of_this_process()] * 9)),
        "verb": lambda: command(["report", str(folder / "tune")]),
        "again": lambda: tune(folder, "again"),
        "saved": lambda: save_and_ask(folder / "again"),
        "saved_again": lambda: save_and_ask(folder / "again"),
        "sharded": lambda: sharded(lambda: stop_sharded(folder)),
        "sharded_resumed": lambda: sharded(lambda: resume_recomputing(folder)),
        "sharded_nan": lambda: sharded(lambda: tune(folder, "sharded_nan", At(1, 1, plant_nan, is_after=True))),
        "sharded_full": lambda: sharded(lambda: command([*full, "-o", str(folder / "sharded_full")])),
        "sharded_pretrain": lambda: sharded(lambda: command([*pretrain, "-o", str(folder / "sharded_pretrain")])),
        # The last one: who fails inside a sharded model tells it by ending.
        "inside": lambda: sharded(lambda: tune(folder, "inside", At(2, 1, fail_in_model, is_after=True))),
    }
    for name, scenario in scenarios.items():
        exit_code, said = scenario()
        (folder / f"{name}-{RANK}.json").write_text(json.dumps({"exit_code": exit_code, "said": said}))


def row_of_this_process() -> dict[str, str]:
    return {"prompt": "whose row is it", "completion": f"that of {RANK}"}


def command(words: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        return run_command(words), said.getvalue()


def tune(folder: Path, name: str, *callbacks: Callback, dataset: Dataset | None = None) -> tuple[int, str]:
    settings = [f"{path}={value}" for path, value in TUNING.items()]
    sources = [f"model.name_or_path={folder / 'base'}", f"data.sources={folder / 'rows.jsonl'}"]
    rows = ["training.per_device_train_batch_size=2", f"data.eval_source={folder / 'held_out.jsonl'}"]
    config = resolve_config(ExperimentConfig, assignments=[*settings, *sources, *rows])
    try:
        finetune(config, folder / name, callbacks=callbacks, dataset=dataset)
    except SmoloraError as error:
        return error.exit_code, str(error)
    except (OSError, ValueError) as error:
        return 5 if isinstance(error, OSError) else 1, str(error)
    return 0, ""


def save_and_ask(run: Path) -> tuple[int, str]:
    """Go on with the README's walk after training."""
    trainer = SmoLoRA("a base that the adapter knows", "rows", output_dir=str(run))
    try:
        trainer.save()
    except SmoloraError as error:
        return error.exit_code, str(error)
    trainer.load_model(trainer.merged_model_path)
    return 0, trainer.inference("one", max_new_tokens=5, do_sample=False)


def sharded(scenario: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Run it under accelerate's configuration for FSDP2."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.update(asked)
    try:
        return scenario()
    finally:
        for name in asked:
            del os.environ[name]


def stop_sharded(folder: Path) -> tuple[int, str]:
    """Stop a sharded run after its third step; say what was kept."""
    kept = Kept()
    exit_code, _ = tune(folder, "sharded", kept, At(3, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    return exit_code, json.dumps(kept.counts)


def resume_recomputing(folder: Path) -> tuple[int, str]:
    """Finish it with recomputed activations and a verdict, for which the main process runs the model alone."""
    settings = ["training.gradient_checkpointing=true", "evaluation.verdict_share=0.5"]
    return command(["train", "--resume", "-o", str(folder / "sharded"), *settings])


def fail_in_model(trainer) -> None:
    trainer.bundle.anatomy.blocks_of(plain_model(trainer.bundle))[1].register_forward_pre_hook(fail)


def fail(*_: object) -> None:
    raise ValueError("a mistake of the second process")


def plant_nan(trainer) -> None:
    next(iter(trainer.parameters.values())).data.fill_(float("nan"))


def stop_early(trainer) -> None:
    assert trainer.state.step < STEPS
    trainer.state.should_stop = True


if __name__ == "__main__":
    # torchrun keeps a worker that is done until the other is: a fork of it ends when it is done.
    assert run_forked(main, Path(sys.argv[1])) == 0
