"""Keeps what enters the lowest trained layer, so that later epochs skip the frozen layers below it.

Where nothing below a layer trains and nothing is dropped, a row's activations there never change within a phase. They
are stored by the row's tokens in the run's folder, so a resumed run reads the same bits that it would have read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smolora.adapters.attach import plain_model
from smolora.errors import StorageError
from smolora.models.bundle import read_config
from smolora.models.rows import Rows
from smolora.models.structure import replaced_forward
from smolora.records.activation_store import ActivationStore
from smolora.training.callback import Callback
from smolora.training.optim import tensor_checksums

if TYPE_CHECKING:
    from smolora.models.anatomy import Anatomy
    from smolora.models.structure import PreTrainedModel
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)

_GIVEN_UP = "the cache of frozen layers is given up, so that no pass skips them: %s"
"""What is kept only to be faster ends no run."""

_OTHER_HEADS = ("summary_", "classifier_")
"""Settings of heads that a language model doesn't have."""


class PrefixCacheCallback(Callback):
    """Caches the activations below the lowest trained layer, on disk, for packed batches of a transformers model.

    It does nothing, and says why, where dropout is on below that layer, or where layer 0 is trained. A pass skips where
    all of its rows are stored. It says when it is full, and at the end of a phase how many passes skipped.

    Args:
        folder: Where the activations go.
        limit: Bytes of them.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.num_skipped = 0
        """Forward passes of the phase that skipped the frozen layers."""
        self._is_full = False
        self._stack = ExitStack()
        self._lowest: int | None = None
        """The lowest trained layer of the phase at hand."""
        self._store: ActivationStore | None = None
        self._keys: list[str] = []
        self._lengths: list[int] = []
        self._found: Tensor | None = None

    def on_step_begin(self, trainer: Trainer) -> None:
        lowest = _find_lowest(trainer)
        if lowest == self._lowest:
            return
        self._close()
        self._lowest = lowest
        model = plain_model(trainer.bundle)
        reason = "it is no transformers model" if model is None else _why_not(trainer, model, lowest)
        if model is None or reason:
            logger.info("the activations of frozen layers aren't kept: %s", reason)
            return
        try:
            self._store = ActivationStore(self.folder, _identify(trainer, model, lowest), limit=self.limit)
        except StorageError as error:
            logger.warning(_GIVEN_UP, error)
            return
        self.num_skipped, self._is_full = 0, False
        self._install(trainer, model, lowest)

    def on_train_end(self, trainer: Trainer) -> None:
        self._close()

    def _close(self) -> None:
        self._stack.close()
        if self._store is not None:
            skipped, kept = self.num_skipped, self._store.num_bytes / 2**20
            words = "%d passes skipped the layers below layer %d; %.1f MiB of activations are kept"
            logger.info(words, skipped, self._lowest, kept)
        self._store = self._found = self._lowest = None

    def _install(self, trainer: Trainer, model: PreTrainedModel, lowest: int) -> None:
        hook = model.register_forward_pre_hook(self._look_up, with_kwargs=True)
        self._stack.callback(hook.remove)
        for layer, block in enumerate(trainer.bundle.anatomy.blocks_of(model)[: lowest + 1]):
            replace = self._enter if layer == lowest else self._skip
            self._stack.enter_context(replaced_forward(block, replace(block.forward)))

    def _look_up(self, model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        self._keys, self._lengths, self._found = [], [], None
        input_ids, position_ids, rows = (kwargs.get(name) for name in ("input_ids", "position_ids", "rows"))
        if not model.training or not isinstance(input_ids, Tensor) or not isinstance(position_ids, Tensor):
            return
        self._lengths = list(rows.lengths) if isinstance(rows, Rows) else _row_lengths(position_ids[0])
        num_tokens = sum(self._lengths)
        tokens = torch.split(input_ids[0, :num_tokens], self._lengths)
        self._keys = [hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=16).hexdigest() for row in tokens]
        found = self._read(read_config(model).hidden_size, next(model.parameters()))
        if found is not None:
            self._found = F.pad(found, (0, 0, 0, input_ids.shape[1] - num_tokens))

    def _read(self, width: int, like: Tensor) -> Tensor | None:
        assert self._store is not None, "the cache is installed with its store"
        if not all(key in self._store for key in self._keys):
            return None
        rows = [self._store.read(key) for key in self._keys]
        if any(row is None for row in rows):
            return None
        joined = torch.frombuffer(bytearray().join(row for row in rows if row is not None), dtype=like.dtype)
        self.num_skipped += 1
        return joined.view(1, -1, width).to(like.device)

    def _skip(self, plain: Callable[..., object]) -> Callable[..., object]:
        """The forward of a layer below: gives its input on where the activations are known."""

        def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            return hidden_states if self._found is not None else plain(hidden_states, *args, **kwargs)

        return forward

    def _enter(self, plain: Callable[..., object]) -> Callable[..., object]:
        """The forward of the lowest trained layer: takes what is known, or keeps what came."""

        def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            if self._found is not None:
                return plain(self._found, *args, **kwargs)
            if self._keys:
                self._keep(hidden_states[0, : sum(self._lengths)].detach())
            return plain(hidden_states, *args, **kwargs)

        return forward

    def _keep(self, known: Tensor) -> None:
        """Store the activations [N, D] of the pass at hand, row by row."""
        assert self._store is not None, "the cache is installed with its store"
        for key, row in zip(self._keys, torch.split(known, self._lengths), strict=True):
            if key in self._store:
                continue
            try:
                fits = self._store.append(key, row.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            except StorageError as error:
                self._is_full = True
                logger.warning(_GIVEN_UP, error)
                return
            if not fits and not self._is_full:
                self._is_full = True
                logger.warning(
                    "the cache of frozen layers is full at %.1f MiB: passes with a row that isn't in it skip nothing. "
                    "Raise speed.prefix_cache_gib, or set it to 0.",
                    self._store.num_bytes / 2**20,
                )


def _row_lengths(position_ids: Tensor) -> list[int]:
    """Return the lengths of rows whose positions, `[N]`, restart at 0."""
    starts = (position_ids == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(position_ids)], strict=True)]


def _find_lowest(trainer: Trainer) -> int:
    """Return the lowest layer with a tensor that trains."""
    anatomy = trainer.bundle.anatomy
    return min((_place(anatomy, name) for name, p in trainer.parameters.items() if p.requires_grad), default=0)


def _place(anatomy: Anatomy, parameter_name: str) -> int:
    """Return the layer of a parameter; outside of the layers a head counts to the last one, the rest to the first."""
    part = anatomy.part_of(parameter_name)
    if part.group == "head":
        return anatomy.num_layers - 1
    return part.layer or 0


def _identify(trainer: Trainer, model: PreTrainedModel, lowest: int) -> dict[str, object]:
    """Return what the stored activations depend on: the base, and the frozen adapters below the layer."""
    below = {name: p for name, p in trainer.parameters.items() if _place(trainer.bundle.anatomy, name) < lowest}
    frozen = tensor_checksums(below)
    return {"layer": lowest, "base": trainer.bundle.fingerprint, "dtype": str(model.dtype), "frozen": frozen}


def _why_not(trainer: Trainer, model: PreTrainedModel, lowest: int) -> str | None:
    if lowest == 0:
        return "the lowest layer is trained"
    settings = read_config(model).to_dict().items()
    dropout = {
        name: value for name, value in settings if "drop" in name and value and not name.startswith(_OTHER_HEADS)
    }
    if dropout:
        return f"the base drops activations ({', '.join(f'{name}={value}' for name, value in dropout.items())})"
    for name, module in model.named_modules():
        layer = trainer.bundle.anatomy.part_of(f"{name}.").layer
        if isinstance(module, nn.Dropout) and module.p and (layer is None or layer < lowest):
            return f"{name} drops activations (set adapter.lora_dropout=0)"
    return None
