"""Opens a pretrained model: a Hugging Face folder or hub id comes in, a ModelBundle goes out.

Weights are read from safetensors only, code that comes with a model is never run, and a checkpoint that lacks a
tensor is refused (transformers would fill it with random numbers and go on).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from smolora.config.model import Quantization, TaskType
from smolora.data.prompts import read_prompt_format
from smolora.errors import ConfigError, ModelError, SmoloraError
from smolora.models.anatomy import build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.models.folders import read_json, refuse_code, resolve_model_folder
from smolora.models.heads import choose_labels, is_of_head, settle_head
from smolora.models.quantised import quantise, require_quantisation
from smolora.models.tasks import AUTO_MODELS, LABEL_TASKS, TASK_NAMES, find_heads, offer_tasks, read_saved_task
from smolora.models.weight_files import (
    StoredTensor,
    fingerprint_weights,
    list_weight_files,
    name_in_files,
    read_stored_tensors,
)
from smolora.records.run_dir import RunDir
from smolora.runtime.available_memory import is_out_of_memory
from smolora.tokenizers.pretrained import load_tokenizer


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    revision: str | None = None,
    quantization: Quantization = "none",
    task: TaskType | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
) -> ModelBundle:
    """Open a pretrained model, in eval mode.

    A task's head that the files don't have, or have for other labels, is drawn; any other tensor must be there.

    Args:
        name_or_path: A folder in Hugging Face format, or a hub id.
        dtype: Type of the weights in memory; None keeps the file's own.
        device: Where the weights go. On "meta" there are none: the model has its shapes alone, and the files are looked
            at, not read.
        revision: Branch, tag or commit of a hub id.
        quantization: How the linear layers are held; the rest, and what they compute, is of `dtype`.
        task: What the model is asked; None for what its config.json says.
        labels: Of a classifier; left out, its config.json's.
        seed: Draws a head that the files lack.

    Raises:
        ConfigError: `quantization` isn't possible here, or for this model, or a classifier has no labels.
        ModelError: No such model, code of its own, no safetensors, or a damaged or incomplete checkpoint.
    """
    require_quantisation(quantization)
    folder = resolve_model_folder(name_or_path, revision=revision)
    settings = read_model_settings(folder)
    _refuse_requantising(folder, settings, quantization)
    stored = [tensor for file in list_weight_files(folder) for tensor in read_stored_tensors(file)]
    task = task or read_saved_task(settings)
    labels, keeps_head = choose_labels(settings, task, labels)
    opening = _Opening(folder, task, labels)
    opening.refuse_family()
    if quantization == "none" and device == "meta":
        model, missing = opening.build_skeleton(stored)
    else:
        model, missing = opening.load(dtype, device=device, quantization=quantization)
    heads = settle_head(model, missing, keeps_head=keeps_head, seed=seed)
    return ModelBundle(
        model=model,
        tokenizer=load_tokenizer(folder),
        anatomy=build_anatomy(model, heads),
        source=str(folder.resolve()) if Path(name_or_path).is_dir() else str(name_or_path),
        fingerprint=fingerprint_weights(folder),
        prompt_format=read_prompt_format(folder),
        revision=revision,
        quantization=quantization,
        task=task,
        has_drawn_head=bool(heads) and (bool(missing) or not keeps_head),
    )


def _refuse_requantising(folder: Path, settings: Mapping[str, object], quantization: Quantization) -> None:
    if quantization != "none" and "quantization_config" in settings:
        raise ConfigError(
            f"model.quantization: {folder} is quantised already. Leave it at none, or name the original model."
        )


def read_model_settings(folder: Path) -> dict[str, object]:
    """Return config.json of a model folder.

    Raises:
        ModelError: It is missing, unreadable, names no model type, or asks to run code.
    """
    refuse_code(folder)
    settings = read_json(folder / "config.json")
    if settings is None:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is an adapter, and no model. Name its base instead, and the adapter with --adapter."
            )
        if (found := set(folder.iterdir())) and found <= RunDir(folder).account:
            raise ModelError(
                f"{folder} holds no model: what was begun there was stopped by rows that can't be used, listed in "
                f"{RunDir(folder).rejects.name}. Repair them and start it again."
            )
        raise ModelError(
            f"{folder} has no config.json, so it is no model folder. Name a model folder, a run, or a hub id."
        )
    if not isinstance(settings.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} names no model_type. Save the model again with save_pretrained.")
    return settings


_transformers = RLock()
"""Held while what all threads share is changed: transformers' verbosity, and the `tie_weights` of every model, which
transformers 5.23 puts something else in the place of while it loads one."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the bars and warnings of transformers inside the block; what matters in them is checked and raised.

    Threads that load or save take turns.
    """
    with _transformers:
        level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        try:
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if has_bars:
                transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class _Opening:
    """A folder that is opened as the model of one task."""

    folder: Path
    task: TaskType
    labels: tuple[str, ...]

    def refuse_family(self) -> None:
        """Raise where a model of this family can't be asked this."""
        with _opening(self.folder, self.task):
            config = self._read_config()
        if self.task not in offer_tasks(config):
            raise ModelError(
                f"{self.folder} is a {config.model_type} model, which can't become a {TASK_NAMES[self.task]} "
                f"(--task {self.task}{', the default' if self.task == 'causal_lm' else ''}). "
                f"{self._propose_tasks(config)}"
            )

    def load(
        self, dtype: torch.dtype | None, *, device: str, quantization: Quantization
    ) -> tuple[PreTrainedModel, list[str]]:
        """Return the model, and the tensors of its head that the files lack."""
        if quantization == "none":
            model, missing = self._load(dtype)
            return model.to(device), missing
        model, missing = self._load(None)  # Mapped from the files: a weight is read where it is quantised.
        with _opening(self.folder, self.task):
            quantise(model, quantization, dtype=dtype or model.dtype, device=device)
        return model, missing

    def build_skeleton(self, stored: Sequence[StoredTensor]) -> tuple[PreTrainedModel, list[str]]:
        """Build the model without weights; where the files don't hold a tensor as it is, transformers must find it."""
        with _opening(self.folder, self.task), torch.device("meta"):
            with no_init_weights():  # Layers draw their weights on meta too: half of the time.
                model = AUTO_MODELS[self.task].from_config(self._read_config())
            assert isinstance(model, PreTrainedModel)
            model.tie_weights()  # Left out with the drawing.
        shapes, heads = {tensor.name: tensor.shape for tensor in stored}, find_heads(model)
        missing = [
            name
            for name, parameter in model.named_parameters()  # Tied ones once.
            if all(shapes.get(place) != tuple(parameter.shape) for place in name_in_files(name))
        ]
        if any(not (heads and is_of_head(name, heads)) for name in missing):
            missing = self._load(None)[1]
        return model.eval(), missing

    def _load(self, dtype: torch.dtype | None) -> tuple[PreTrainedModel, list[str]]:
        with _opening(self.folder, self.task), torch.random.fork_rng():  # What is missing is drawn again, by the seed.
            model, report = AUTO_MODELS[self.task].from_pretrained(
                self.folder,
                config=self._read_config(),
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=self.task in LABEL_TASKS,
            )
        assert isinstance(model, PreTrainedModel)
        self._refuse_incomplete(model, report)
        return model, sorted(report["missing_keys"])

    def _read_config(self) -> PretrainedConfig:
        head: dict[str, object] = {"num_labels": 2} if self.task == "qa" else {}  # Where it begins, and ends.
        if self.labels:
            names = dict(enumerate(self.labels))
            head = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, **head)
        assert isinstance(config, PretrainedConfig)
        return config

    def _refuse_incomplete(self, model: PreTrainedModel, report: Mapping[str, Iterable[object]]) -> None:
        heads = find_heads(model)
        mismatched = [str(found[0] if isinstance(found, tuple) else found) for found in report["mismatched_keys"]]
        lacking = [str(name) for name in report["missing_keys"]] + mismatched
        missing = sorted(name for name in lacking if not (heads and is_of_head(name, heads)))
        if missing:
            saved = str((model.config.architectures or ["model of another kind"])[0])
            is_cut = saved == type(model).__name__
            advice = "Copy or download it again." if is_cut else self._propose_tasks(model.config)
            raise ModelError(
                f"{self.folder} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]}: it is "
                f"{'incomplete' if is_cut else f'a {saved}, or incomplete'}. {advice}"
            )

    def _propose_tasks(self, config: PretrainedConfig) -> str:
        another = f"take another base for {self.task}"
        if others := [task for task in offer_tasks(config) if task != self.task]:
            return f"It can be trained with --task {' or '.join(others)}; or {another}."
        return f"{another.capitalize()}."


@contextmanager
def _opening(folder: Path, task: TaskType) -> Iterator[None]:
    """Turn what transformers raises inside the block into a word about `folder`."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, SmoloraError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} can't be opened as a {TASK_NAMES[task]}: {reason}") from error
