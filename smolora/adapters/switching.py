"""The adapters of a model in memory, of which one at a time is on, or none."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import peft
import torch

from smolora.adapters.adapter_files import StoredAdapter, read_adapter
from smolora.adapters.attach import is_adapted, refuse_unadaptable
from smolora.adapters.state import fill_adapter
from smolora.adapters.store import bundle_adapted, find_adapter, load_adapter
from smolora.adapters.tensors import quiet_peft
from smolora.adapters.toggling import disabled_adapter, refuse_inseparable
from smolora.errors import ConfigError, ModelError, did_you_mean
from smolora.models.bundle import ModelBundle
from smolora.models.exclusive import lock_of

BASE = "base"
"""The name that stands for no adapter."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AdapterSwitch:
    """A model's adapters by name, of which one is on, or none."""

    def __init__(self, bundle: ModelBundle, adapters: Mapping[str, str | Path] | None = None) -> None:
        """Take a model as it is, or put adapters on it, by which it is changed.

        Args:
            bundle: A model, with or without an adapter; with `adapters` without.
            adapters: Runs, adapter folders or hub ids by the name they get here; the first one is on.

        Raises:
            ConfigError: A name isn't one, or the base of `adapters` carries an adapter.
            ModelError: An adapter is damaged, or was trained on another base or for another head.
        """
        self._bundles: dict[str, ModelBundle] = {}
        self._inner: dict[str, str] = {}
        if adapters is not None:
            self._put_on(bundle, adapters)
        self._default = next(iter(self._bundles.values()), bundle)
        self._without = replace(self._default, head_labels=()) if is_adapted(self._default) else self._default
        self._on: str | None = None
        self._off = ExitStack()
        """Undoes what switched the adapters off."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names; none where the model was taken as it is."""
        return tuple(self._bundles)

    def find(self, name: str | None = None) -> ModelBundle:
        """Return the bundle in whose form an adapter's prompts are put; it answers while that adapter is on.

        Args:
            name: An adapter, or `base` for none, asked in the first one's form. Left out, the first.

        Raises:
            ConfigError: There is none of that name.
            ModelError: `base` is asked for, and an adapter has changed it.
        """
        if name is None:
            return self._default
        if name == BASE:
            if isinstance(self._default.model, peft.PeftModel):
                refuse_inseparable(*self._default.model.peft_config.values())
            return self._without
        if name in self._bundles:
            return self._bundles[name]
        if not self._bundles:
            raise ConfigError(f"no adapter {name!r}: this model was opened without several. Name them in adapters=.")
        known = (*self._bundles, BASE)
        raise ConfigError(f"no adapter {name!r}.{did_you_mean(name, known)} Adapters: {', '.join(known)}.")

    def switch_to(self, name: str | None = None) -> None:
        """Switch one adapter on, as `find` takes names; hold the model's `lock_of` as long as it shall stay on."""
        name = next(iter(self._bundles), None) if name is None else name
        if name == self._on:
            return
        self._off.close()
        self._on = None
        if name == BASE:
            self._off.enter_context(disabled_adapter(self._without))
        elif name is not None:
            self._model.set_adapter(self._inner[name], inference_mode=True)
        self._on = name

    @contextmanager
    def opened(self, name: str | None = None) -> Iterator[ModelBundle]:
        """Yield the bundle of `find` with its adapter on, while nobody else has the model.

        Raises:
            ConfigError: There is none of that name.
        """
        bundle = self.find(name)
        with self.left_alone(), lock_of(bundle.model):
            self.switch_to(name)
            yield bundle

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Switch on what is on unasked when the block ends, unless somebody has the model and will do so."""
        lock = lock_of(self._default.model)
        try:
            yield
        finally:
            # It may end an abandoned stream, at any moment of whoever has the model: waiting would be for ever.
            if lock.acquire(blocking=False):
                try:
                    self.switch_to()
                finally:
                    lock.release()

    @property
    def _model(self) -> peft.PeftModel:
        model = next(iter(self._bundles.values())).model
        assert isinstance(model, peft.PeftModel), "the first adapter was put on"
        return model

    def _put_on(self, base: ModelBundle, adapters: Mapping[str, str | Path]) -> None:
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
            if len(folders) > 1:
                refuse_inseparable(adapter.config)
        for number, (name, folder) in enumerate(folders.items()):
            self._inner[name] = f"adapter_{number}" if number else "default"  # peft takes no dots in a name.
            added = self._add(base, folder, self._inner[name]) if number else load_adapter(base, folder)
            self._bundles[name] = added

    def _add(self, base: ModelBundle, folder: Path, inner: str) -> ModelBundle:
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
        return bundle_adapted(base, self._model, adapter)


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
