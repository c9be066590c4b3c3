"""Several adapters on one base in memory, of which one at a time is on, or none."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import peft
import torch

from smolora.adapters.adapter_files import StoredAdapter, read_adapter
from smolora.adapters.attach import refuse_unadaptable
from smolora.adapters.state import fill_adapter
from smolora.adapters.store import bundle_adapted, find_adapter, load_adapter
from smolora.adapters.tensors import quiet_peft
from smolora.adapters.toggling import disabled_adapter
from smolora.errors import ConfigError, ModelError, did_you_mean
from smolora.models.bundle import ModelBundle

BASE = "base"
"""The name that stands for no adapter."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AdapterSwitch:
    """One base with its adapters by name; the first one is on unless another is asked for."""

    def __init__(self, base: ModelBundle, adapters: Mapping[str, str | Path]) -> None:
        """Put adapters on a base, whose model is changed by it.

        Args:
            base: A model without an adapter.
            adapters: Runs, adapter folders or hub ids by the name they get here.

        Raises:
            ConfigError: A name isn't one, or the base carries an adapter.
            ModelError: An adapter is damaged, or was trained on another base or for another head.
        """
        for name in adapters:
            if not _NAME.fullmatch(name) or name == BASE:
                raise ConfigError(f"{name!r} names no adapter: take letters, digits, '.', '_', '-'; not {BASE!r}.")
        if not adapters:
            raise ConfigError("no adapter is named.")
        refuse_unadaptable(base)
        folders = {name: find_adapter(source) for name, source in adapters.items()}
        for folder in folders.values():
            adapter = read_adapter(folder)
            adapter.refuse_other_base(base.fingerprint, base.source)
            _refuse_other_head(adapter, base)
        self._base = base
        self._bundles: dict[str, ModelBundle] = {}
        self._inner: dict[str, str] = {}
        for number, (name, folder) in enumerate(folders.items()):
            self._inner[name] = f"adapter_{number}" if number else "default"  # peft takes no dots in a name.
            self._bundles[name] = self._add(folder, self._inner[name]) if number else load_adapter(base, folder)
        self._used: str | None = None
        self._first = next(iter(folders))
        self._without = replace(self._bundles[self._first], head_labels=())

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters."""
        return tuple(self._bundles)

    @contextmanager
    def switched_to(self, name: str | None = None) -> Iterator[ModelBundle]:
        """Yield the bundle with one adapter on, in whose form its prompts are put.

        Args:
            name: An adapter, or `base` for none, asked in the first one's form. Left out, the first.

        Raises:
            ConfigError: There is none of that name, or another one is in use.
        """
        name = name or self._first
        if name not in (BASE, *self._bundles):
            known = (*self._bundles, BASE)
            raise ConfigError(f"no adapter {name!r}.{did_you_mean(name, known)} Adapters: {', '.join(known)}.")
        if self._used not in (None, name):
            raise ConfigError(f"the adapter {self._used!r} is answering. Finish or close its stream first.")
        before, self._used = self._used, name
        try:
            if name == BASE:
                with disabled_adapter(self._without):
                    yield self._without
            else:
                self._set(self._inner[name])
                yield self._bundles[name]
        finally:
            self._used = before

    @property
    def _model(self) -> peft.PeftModel:
        model = next(iter(self._bundles.values())).model
        assert isinstance(model, peft.PeftModel), "the first adapter was put on"
        return model

    def _add(self, folder: Path, inner: str) -> ModelBundle:
        adapter = read_adapter(folder)
        peft_config = copy.deepcopy(adapter.config)
        peft_config.inference_mode = True
        try:
            with quiet_peft(), torch.random.fork_rng():
                self._model.add_adapter(inner, peft_config)
        except (ValueError, TypeError) as error:  # Such as another method than the first one's.
            raise ModelError(f"{folder} can't be beside the other adapters: {error}") from None
        fill_adapter(self._model, adapter, inner)
        self._model.train(self._model.training)  # peft's new dropout layers would drop in an eval model.
        return bundle_adapted(self._base, self._model, adapter)

    def _set(self, inner: str) -> None:
        self._model.set_adapter(inner, inference_mode=True)


def _refuse_other_head(adapter: StoredAdapter, base: ModelBundle) -> None:
    """Raise if a model that is open for one task, or for so many labels, has no place for the adapter's head."""
    if adapter.named_task not in {None, base.task}:
        raise ModelError(
            f"{adapter.folder} is for {adapter.named_task}, and the model is open for {base.task}: adapters of one "
            "model share its task. Open it in a pipeline of its own."
        )
    if len(adapter.labels) != len(base.labels):
        raise ModelError(
            f"{adapter.folder} tells {len(adapter.labels)} labels apart, and the model is open for {len(base.labels)}: "
            "adapters of one model share the size of its head. Open it in a pipeline of its own."
        )
