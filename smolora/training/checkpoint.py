"""Checkpoints of a run: weights, optimiser, state and manifest in one folder that appears whole or not at all.

A tuning run writes its adapter as peft does, so every `step-...` folder also loads in plain peft.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolora.adapters.attach import is_adapted
from smolora.adapters.state import restore_adapter, restore_training, training_tensors
from smolora.adapters.store import save_adapter
from smolora.errors import ConfigError, DataError, ModelError
from smolora.models.bundle import ModelBundle
from smolora.records.run_dir import RunDir
from smolora.records.staging import find_damage, read_manifest, replaced_folder, write_json, write_manifest
from smolora.training.plan import require_reach

logger = logging.getLogger(__name__)

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optim.safetensors", "state.json"
_CALLBACKS = "callbacks.safetensors"


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to. Each is a SHA-256; a resume against anything else is refused."""

    base: str
    tokenizer: str
    data: str
    held_out: str = ""
    settings: str = ""
    """Of what can't change within a run, such as the adapter's rank."""

    def require(self, checkpoint: Path) -> None:
        """Raise unless `checkpoint` was written by a run on the same base, tokenizer, rows and settings.

        Raises:
            ModelError: Another base or tokenizer, or other settings.
            DataError: Other training or held-out rows.
        """
        recorded = read_manifest(checkpoint).get("identity")
        if differing := self.find_difference(recorded if isinstance(recorded, dict) else {}):
            error, name = differing
            raise error(
                f"{checkpoint} was written with other {name}: it can't be resumed. "
                f"Bring them back as they were, or start a new run in another folder."
            )

    def find_difference(self, found: Mapping[str, object]) -> tuple[type[DataError | ModelError], str] | None:
        """Return what differs first from a recorded identity, and the error that this is."""
        for item in fields(self):
            if found.get(item.name) != vars(self)[item.name]:
                return DataError if item.name in ("data", "held_out") else ModelError, item.name.replace("_", "-")
        return None


def require_one_identity(identities: Sequence[RunIdentity]) -> None:
    """Raise unless all processes of a run, in order, have the same base, tokenizer, rows and settings.

    Raises:
        ModelError: Another base or tokenizer, or other settings.
        DataError: Other training or held-out rows.
    """
    first, *others = identities
    for index, other in enumerate(others, start=1):
        if differing := first.find_difference(vars(other)):
            error, name = differing
            raise error(
                f"process {index} has other {name} than process 0. Every machine must read the same files, with "
                "the same versions of the libraries."
            )


def require_same_count(checkpoint: Path, num_processes: int) -> None:
    """Raise where a checkpoint was written by another number of processes, which share out rows and noise differently.

    Raises:
        ConfigError: It was.
    """
    wrote = read_manifest(checkpoint).get("processes", num_processes)
    if wrote != num_processes:
        raise ConfigError(
            f"{checkpoint} was written by a run of {wrote} processes, and this one has {num_processes}. Rows and "
            f"dropout depend on their number: resume with {wrote}, or start a new run in another folder."
        )


@dataclass(frozen=True)
class TrainingSnapshot:
    """Everything that a checkpoint holds beside the weights."""

    optimizer: dict[str, Tensor]
    state: dict[str, object]
    callbacks: dict[str, Mapping[str, object]]
    callback_tensors: dict[str, Mapping[str, Tensor]]
    """By the callback's name; those without tensors are left out."""


def save_checkpoint(
    folder: Path, bundle: ModelBundle, snapshot: TrainingSnapshot, identity: RunIdentity, *, num_processes: int = 1
) -> None:
    """Write a checkpoint of a run of `num_processes` at `folder`, in place of one of the same step.

    Raises:
        StorageError: The disk is full or can't be written; what was at `folder` stays.
    """
    with replaced_folder(folder) as staging:
        if is_adapted(bundle):
            save_adapter(bundle, staging)
            if tensors := training_tensors(bundle):
                save_file(_contiguous(tensors), staging / _MODEL)
        else:
            save_file(_contiguous(dict(bundle.model.named_parameters())), staging / _MODEL)
        save_file(_contiguous(snapshot.optimizer), staging / _OPTIMIZER)
        if snapshot.callback_tensors:
            named = {
                f"{name}/{key}": t for name, tensors in snapshot.callback_tensors.items() for key, t in tensors.items()
            }
            save_file(_contiguous(named), staging / _CALLBACKS)
        write_json(staging / _STATE, {"trainer": snapshot.state, "callbacks": snapshot.callbacks}, indent=None)
        facts = {"step": snapshot.state["step"], "processes": num_processes, "identity": vars(identity)}
        write_manifest(staging, facts)


def load_checkpoint(folder: Path, bundle: ModelBundle) -> TrainingSnapshot:
    """Put the weights of a verified checkpoint into `bundle` and return the rest.

    Raises:
        ModelError: The checkpoint's tensors aren't those of `bundle`.
    """
    if is_adapted(bundle):
        if (folder / _MODEL).is_file():
            restore_training(bundle, load_file(folder / _MODEL), folder)
        else:
            restore_adapter(bundle, folder)
    else:
        _restore_parameters(bundle, load_file(folder / _MODEL), folder)
    state = _read_state(folder)
    optimizer = load_file(folder / _OPTIMIZER)
    return TrainingSnapshot(optimizer, state["trainer"], state["callbacks"], _load_callback_tensors(folder))


def load_newest(
    run: RunDir, bundle: ModelBundle, identity: RunIdentity, *, num_processes: int, total_steps: int
) -> TrainingSnapshot | None:
    """Put the weights of the newest whole checkpoint into `bundle` and return the rest; None where there is none.

    Damaged ones are set aside, and where the one with the lowest held-out loss is damaged, that loss is forgotten.

    Raises:
        ConfigError: The run was one of another number of processes, or has done more than `total_steps`.
        ModelError, DataError: It belongs to another base, tokenizer or data, or no checkpoint is whole.
    """
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        return None
    run.set_aside_damaged(checkpoint)
    require_same_count(checkpoint.path, num_processes)
    require_reach(checkpoint.step, total_steps)
    identity.require(checkpoint.path)
    snapshot = load_checkpoint(checkpoint.path, bundle)
    best = snapshot.state["best_step"]
    if isinstance(best, int) and (damage := find_damage(run.checkpoint_path(best))):
        logger.warning("the checkpoint with the lowest held-out loss, of step %d, is lost: %s.", best, damage)
        snapshot.state["best_step"] = snapshot.state["best_eval_loss"] = None
    return snapshot


def read_lowest(checkpoint: Path) -> tuple[float, int] | None:
    """Return the held-out loss of the weights that a run keeps, as its checkpoint says, and their step, if any."""
    state = _read_state(checkpoint)["trainer"]
    if state["best_eval_loss"] is None:
        return None
    return float(state["best_eval_loss"]), int(state["best_step"])


def _read_state(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return found


def _load_callback_tensors(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    stored = load_file(folder / _CALLBACKS) if (folder / _CALLBACKS).is_file() else {}
    by_callback: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        callback, _, key = name.partition("/")
        by_callback.setdefault(callback, {})[key] = tensor
    return dict(by_callback)


@torch.no_grad()
def _restore_parameters(bundle: ModelBundle, tensors: Mapping[str, Tensor], folder: Path) -> None:
    parameters = dict(bundle.model.named_parameters())
    if parameters.keys() != tensors.keys():
        raise ModelError(
            f"{folder} holds other tensors than this model: {sorted(parameters.keys() ^ tensors.keys())[:3]}."
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(f"{folder}: {name} is {list(tensors[name].shape)}, the model's {list(parameter.shape)}.")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
