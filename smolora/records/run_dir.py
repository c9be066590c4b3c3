"""The folder of a run: the only place that knows a file's name, who writes in it, and which checkpoint is whole."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smolora.errors import ConfigError, FolderInUseError, ModelError
from smolora.records.staging import describe_os_error, find_damage, require_writable, retire_folder

logger = logging.getLogger(__name__)

_PREPARED = "train.jsonl"
"""What `prepare` writes, beside an account that is about it."""

_CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with resumable training state."""

    step: int
    path: Path


class RunDir:
    """Names and guards of one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.resolved_config = self.path / "resolved_config.yaml"
        self.env = self.path / "env.json"
        self.data_report = self.path / "data_report.json"
        self.rejects = self.path / "rejects.jsonl"
        self.trained_rows = self.path / "trained_rows.bin"
        self.metrics = self.path / "metrics.jsonl"
        self.profile = self.path / "profile.json"
        self.group_norms = self.path / "gradient_analysis.group_norms.csv"
        self.layer_norms = self.path / "gradient_analysis.layer_norms.csv"
        self.gradient_summary = self.path / "gradient_analysis.summary.json"
        self.prefix_cache = self.path / "prefix_cache"
        self.phase_report = self.path / "phase_report.json"
        self.verdict = self.path / "verdict.json"
        self.adapter = self.path / "adapter_checkpoint"
        self.merged = self.path / "final_merged"
        self.model = self.path / "model"
        self.evaluations = self.path / "evaluation"
        self.trackers = self.path / "trackers"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"
        self.lock_file = self.path / "run.lock"

    @property
    def account(self) -> frozenset[Path]:
        """What is left of data alone, where too many rejected rows stopped the work."""
        return frozenset((self.data_report, self.rejects))

    @staticmethod
    def is_run(path: str | Path) -> bool:
        """Whether a run was started in this folder."""
        return RunDir(path).resolved_config.is_file()

    @property
    def is_started(self) -> bool:
        """Whether there is something to resume: what a run was started with, or a checkpoint."""
        return self.is_run(self.path) or bool(self.checkpoints())

    def require_usable(self, *, resume: bool) -> None:
        """Raise unless a run may start here, or go on where `resume` is set; creates no folder.

        Raises:
            ConfigError: As `require_vacant`, unless there is a run and `resume` is set.
            FolderInUseError: Another process writes here.
            StorageError: The folder can't be written.
        """
        require_writable(self.path)
        if self.is_run(self.path):
            with self.locked():
                pass
        if not (resume and self.is_started):
            self.require_vacant()

    def require_vacant(self) -> None:
        """Raise unless a new run may start here, where it would overwrite nothing; creates nothing.

        Raises:
            ConfigError: Something is here that a run writes, but for what an attempt leaves that failed before it was
                a run.
        """
        self.refuse_existing()
        found = set(self.path.iterdir()) if self.path.is_dir() else set()
        left = {self.lock_file, self.env}
        if self.path / _PREPARED not in found:
            left |= self.account
        if lost := sorted(path.name for path in found & set(vars(self).values()) - left):
            raise ConfigError(
                f"{self.path} holds {lost[0]} already, which a run would overwrite. "
                "Choose another output folder, or move away what is there."
            )

    def refuse_existing(self) -> None:
        """Raise where a run is; creates nothing.

        Raises:
            ConfigError: A run is here already, or the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; the output must be a folder.")
        if self.is_started:
            raise ConfigError(
                f"{self.path} already holds a run. Continue it with --resume, or choose another output folder."
            )

    @property
    def is_lockable(self) -> bool:
        """Whether this process has the right to hold the lock of a folder that is there."""
        return os.access(self.lock_file if self.lock_file.exists() else self.path, os.W_OK)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock; the kernel lets go of it when this process ends, however it ends.

        Raises:
            FolderInUseError: Another process holds it.
            StorageError: The folder can't be created.
        """
        with _held_once(self.path):  # Before the file is opened: closing it again would let go of the first lock.
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = self.lock_file.open("a+", encoding="utf-8")
            except OSError as error:
                raise describe_os_error(error, self.path) from error
            with file:
                _lock(file.fileno(), self.path)
                yield

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or will be."""
        return self.path / f"step-{step:06d}"

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint folder, lowest step first, whole or not."""
        if not self.path.is_dir():
            return []
        found = [(match, entry) for entry in self.path.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))]
        return sorted((Checkpoint(int(match[1]), entry) for match, entry in found), key=lambda item: item.step)

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the highest step whose manifest verifies; None where there is no checkpoint.

        Raises:
            ModelError: There are some, and none is whole.
        """
        damages: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            damage = find_damage(checkpoint.path)
            if damage is None:
                return checkpoint
            damages.append(f"{checkpoint.path.name} ({damage})")
        if damages:
            raise ModelError(
                f"{self.path} has no whole checkpoint to go on from: {', '.join(damages)}. "
                "Restore one from a copy, or start a new run in another folder."
            )
        return None

    def set_aside_damaged(self, newest: Checkpoint) -> None:
        """Name the checkpoints past the newest whole one and rename them, so that their steps can be saved anew."""
        for checkpoint in self.checkpoints():
            if checkpoint.step > newest.step:
                damage = find_damage(checkpoint.path)
                aside = checkpoint.path.rename(self._vacant(f"damaged-{checkpoint.path.name}"))
                logger.warning("%s is skipped: %s. It is now %s.", checkpoint.path.name, damage, aside.name)

    def _vacant(self, name: str) -> Path:
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(path for path in map(self.path.joinpath, names) if not path.exists())

    def prune_checkpoints(self, *, keep: int, protected: Collection[int | None]) -> None:
        """Delete all but the `keep` highest steps and the `protected` ones; a kill in between loses none of those."""
        for checkpoint in self.checkpoints()[:-keep]:
            if checkpoint.step not in protected:
                retire_folder(checkpoint.path)

    def sweep_leftovers(self) -> None:
        """Delete what a killed writer left behind; call it with the lock held."""
        for leftover in self.path.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


_held: set[Path] = set()
"""Folders that this process holds. A record lock doesn't keep a process out of its own folder, and goes as soon as
any file of it is closed, so a second run in one notebook must be stopped here."""


@contextmanager
def _held_once(folder: Path) -> Iterator[None]:
    resolved = folder.resolve()
    if resolved in _held:
        raise FolderInUseError(f"this process is writing in {folder} already. Choose another output folder.")
    _held.add(resolved)
    try:
        yield
    finally:
        _held.discard(resolved)


def _lock(descriptor: int, folder: Path) -> None:
    if sys.platform == "win32":
        logger.warning("this system has no POSIX locks: nothing keeps a second run out of %s.", folder)
        return
    import fcntl

    try:
        # A record lock, unlike flock, is not inherited by forked children, so a worker that outlives a killed run
        # keeps nobody out.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise FolderInUseError(
            f"another process is writing in {folder}. Wait for it, stop it, or choose another output folder."
        ) from None
    except OSError as error:  # Some network file systems have no locks.
        raise describe_os_error(error, folder) from error
