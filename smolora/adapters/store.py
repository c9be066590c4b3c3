"""Adapters to and from disk, and `load_bundle`, which opens whatever a person names: a model, an adapter or a run."""

from __future__ import annotations

import copy
import json
import logging
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from smolora.adapters.adapter_files import (
    CONFIG_FILE,
    IDENTITY_FILE,
    WEIGHTS_FILE,
    StoredAdapter,
    is_adapter_folder,
    read_adapter,
)
from smolora.adapters.attach import adapt, refuse_unadaptable
from smolora.adapters.methods import count_virtual_tokens
from smolora.adapters.starts import double_rank, subtract_start
from smolora.adapters.state import fill_adapter
from smolora.adapters.tensors import copy_tensors
from smolora.config import ExperimentConfig
from smolora.config.adapter import METHODS, LoRAConfig, PEFTConfig, SoftPromptConfig
from smolora.config.model import ModelConfig, Quantization
from smolora.data.prompts import read_prompt_format, write_prompt_format
from smolora.errors import ConfigError, ModelError
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import ModelBundle
from smolora.models.folders import resolve_model_folder
from smolora.models.loading import load_model
from smolora.models.structure import PreTrainedModel
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_file, share, write_json
from smolora.runtime.available_memory import is_out_of_memory
from smolora.runtime.device import resolve_device

logger = logging.getLogger(__name__)

_METADATA = {"format": "pt"}
"""What transformers and peft write into a file's header."""


def save_adapter(bundle: ModelBundle, folder: Path) -> None:
    """Write the adapter as a peft folder, with the identity of its base and the prompt format, into `folder`.

    Files are written one after the other; whoever needs all or none passes a staged folder (records.staging).

    Raises:
        ConfigError: The bundle has no adapter.
    """
    if not isinstance(bundle.model, peft.PeftModel):
        raise ConfigError("there is no adapter to save: the model has none. Attach one with attach_adapter.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, peft_config = copy_tensors(bundle.model), copy.deepcopy(bundle.model.peft_config["default"])
    if bundle.taken is not None:
        tensors = subtract_start(tensors, bundle.taken)
        double_rank(peft_config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, _METADATA)
    share(folder / WEIGHTS_FILE)
    _write_config(peft_config, folder)
    write_json(
        folder / IDENTITY_FILE,
        {
            "fingerprint": bundle.fingerprint,
            "source": bundle.source,
            "relative_source": _find_way(bundle.source, folder),
            "revision": bundle.revision,
            "quantization": bundle.quantization,
            "weights": hash_file(folder / WEIGHTS_FILE),
        },
    )
    if bundle.prompt_format:
        write_prompt_format(bundle.prompt_format, folder)


def load_adapter(base: ModelBundle, folder: Path, *, trainable: bool = False) -> ModelBundle:
    """Put a saved adapter, ours or plain peft's, on its base; `base.model` itself is changed.

    Args:
        base: The model it was trained on.
        folder: The adapter.
        trainable: Whether to train it further; otherwise it is frozen.

    Raises:
        ConfigError: The base carries an adapter already, or one of this method can't be trained further.
        ModelError: The adapter is damaged, was trained on another base, or its tensors aren't exactly those the base
        takes.
    """
    model = refuse_unadaptable(base)
    adapter = read_adapter(folder)
    adapter.refuse_other_base(base.fingerprint, base.source)
    if trainable:
        _refuse_continuation(adapter)
    peft_config = copy.deepcopy(adapter.config)
    peft_config.inference_mode = not trainable
    try:
        adapted = adapt(model, peft_config, source=base.source, revision=base.revision)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        reason = textwrap.shorten(str(error), 160).rstrip(".")
        raise ModelError(f"{folder} doesn't fit this base: {reason}. It is for another model.") from None
    try:
        if trainable:
            _refuse_narrow(adapted, adapter)
        fill_adapter(adapted, adapter)
    except (ConfigError, ModelError):
        take_off(adapted)
        raise
    return bundle_adapted(base, adapted, adapter)


def bundle_adapted(base: ModelBundle, adapted: peft.PeftModel, adapter: StoredAdapter) -> ModelBundle:
    """Return what is known of a base with a saved adapter on; warns where it is held otherwise than in training."""
    if adapter.identity and adapter.quantization != base.quantization:
        logger.warning(
            "%s was trained on its base with quantization %s, and goes on it with %s: it answers somewhat differently",
            adapter.folder,
            adapter.quantization,
            base.quantization,
        )
    fmt = read_prompt_format(adapter.folder)
    return replace(
        base,
        model=adapted,
        prompt_format=fmt or base.prompt_format,
        head_labels=fmt.labels if fmt else (),
        num_virtual_tokens=count_virtual_tokens(adapter.config),
        has_drawn_head=False,  # The adapter's own head is on.
    )


def follow_adapter(config: ExperimentConfig) -> ExperimentConfig:
    """Return a run with the method and the task of the adapter that it continues; without one, as it is.

    Raises:
        ConfigError: Another method or task was asked for, or one of its settings can't go with them.
        ModelError: The adapter can't be read.
    """
    if config.adapter.path is None:
        return config
    adapter = read_adapter(find_adapter(config.adapter.path))
    task = adapter.named_task or config.model.task_type
    if config.model.task_type not in (ModelConfig.model_fields["task_type"].default, task):
        raise ConfigError(
            f"model.task_type: {adapter.folder} is for {task}, and goes on as that; found {config.model.task_type}. "
            "Leave --task out, or start a new adapter without adapter.path."
        )
    followed: ExperimentConfig = config.replace(
        model=config.model if config.model.task_type == task else config.model.replace(task_type=task),
        adapter=_read_own_section(config.adapter, adapter),
    )
    return followed


def _read_own_section(config: PEFTConfig, adapter: StoredAdapter) -> PEFTConfig:
    if config.method not in (LoRAConfig.model_fields["method"].default, adapter.method):
        raise ConfigError(
            f"adapter.method: {adapter.folder} is of the method {adapter.method}, and goes on as that; found "
            f"{config.method}. Leave the method out, or start a new adapter without adapter.path."
        )
    if idle := config.model_dump(exclude_defaults=True).keys() - {"method", "path"}:
        names = ", ".join(f"adapter.{name}" for name in sorted(idle))
        logger.warning("%s: no effect, since %s keeps its own settings", names, adapter.folder)
    return METHODS[adapter.method](method=adapter.method, path=config.path)


def reserve_virtual_tokens(base: ModelBundle, config: PEFTConfig) -> ModelBundle:
    """Return the base with the context that is left once an adapter of `config` is on.

    Raises:
        ConfigError: Nothing is.
        ModelError: The adapter to continue can't be read.
    """
    count = config.num_virtual_tokens if isinstance(config, SoftPromptConfig) else 0
    if config.path:
        count = count_virtual_tokens(read_adapter(find_adapter(config.path)).config)
    reserved = replace(base, num_virtual_tokens=count)
    if count and reserved.context is not None and reserved.context < 2:
        raise ConfigError(
            f"adapter.num_virtual_tokens = {count} leaves no room in the model's context of {base.context} tokens."
        )
    return reserved


def _refuse_continuation(adapter: StoredAdapter) -> None:
    """Raise where what is saved is less than what was trained."""
    config = adapter.config
    reason = None
    if isinstance(config, peft.AdaLoraConfig):
        reason = "AdaLoRA spreads its ranks over one run. Merge it, and adapt the merged model"
    elif config.peft_type == "P_TUNING" or (isinstance(config, peft.PrefixTuningConfig) and config.prefix_projection):
        reason = "the network that made its virtual tokens isn't saved with them. Start anew"
    elif isinstance(config, peft.LoraConfig) and config.layer_replication:
        reason = "it repeats layers of its base, which no other adapter here does"
    elif adapter.trained_biases:
        reason = "it has biases of its own for its base, which no run here trains. Merge it, and adapt the merged model"
    if reason:
        raise ConfigError(f"adapter.path: {adapter.folder} can't be trained further: {reason}.")


def _refuse_narrow(adapted: peft.PeftModel, adapter: StoredAdapter) -> None:
    """Raise where peft would train a copy of a module in 16 bits, in which AdamW's small updates are lost."""
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"adapter.path: {adapter.folder} trains {name.removeprefix(PEFT_PREFIX)} whole, which is held as "
                f"{parameter.dtype} here: small updates would be lost. Set model.dtype=float32."
            )


def take_off(adapted: peft.PeftModel) -> PreTrainedModel:
    """Return the plain model under an adapter, which is forgotten; soft prompts leave the model as it is anyway."""
    plain = adapted.get_base_model() if adapted.active_peft_config.is_prompt_learning else adapted.unload()
    assert isinstance(plain, PreTrainedModel)
    return plain


def load_bundle(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quantization: Quantization = "none",
) -> ModelBundle:
    """Open what a person names: a model folder or hub id, an adapter on its base, or a run.

    A run is its model (pretraining), else its adapter on the base, else its merged model.

    Args:
        path_or_id: A path or a hub id.
        dtype: Type of the base's weights in memory; None keeps the file's own.
        device: Where the weights go.
        quantization: How a model without an adapter is held; an adapter's base is held as in its training.

    Raises:
        ModelError: There is nothing to open there, or it can't be opened.
    """
    if RunDir.is_run(path_or_id):
        return load_bundle(_find_result(RunDir(path_or_id)), dtype=dtype, device=device, quantization=quantization)
    folder = resolve_model_folder(path_or_id)
    if not is_adapter_folder(folder):
        return load_model(path_or_id, dtype=dtype, device=device, quantization=quantization)
    return load_adapter(load_base(read_adapter(folder), dtype=dtype, device=device), folder)


def open_model(source: str | Path, base: str | Path | None = None, *, device: str = "auto") -> ModelBundle:
    """Open a model for asking: on the device that `device` resolves to, its base in the file's own number type.

    Args:
        source: What `load_bundle` opens; with `base`, a run or an adapter folder.
        base: The base of an adapter, where its folder doesn't name it.
        device: auto, cpu, cuda or mps.

    Raises:
        ModelError: There is no such model, or the adapter was trained on another base.
    """
    place = str(resolve_device(device).device)
    if base is None:
        return load_bundle(source, device=place)
    adapter = read_on_base(find_adapter(source), base)
    return load_adapter(load_base(adapter, device=place), adapter.folder)


def open_base(source: str | Path, adapter: str | Path, *, device: str = "auto") -> ModelBundle:
    """Open a model for adapters to be put on: held and asked as one of them had it in its training.

    Args:
        source: A model folder, a run's model or a hub id.
        adapter: A run, an adapter folder or a hub id.
        device: auto, cpu, cuda or mps.

    Raises:
        ModelError: There is no such model or no such adapter.
    """
    return load_base(read_on_base(find_adapter(adapter), source), device=str(resolve_device(device).device))


def read_on_base(folder: Path, base: str | Path | None) -> StoredAdapter:
    """Read an adapter folder, as one that names `base`, where there is one: a model folder, a run or a hub id.

    Of plain peft's adapter on a base of another name a line says that it is taken on trust.

    Raises:
        ModelError: As `read_adapter`; or a run has made no model yet.
    """
    adapter = read_adapter(folder)
    if base is None:
        return adapter
    source = str(_find_result(RunDir(base)) if RunDir.is_run(base) else base)
    adapter.warn_of_unproved_base(source)
    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path, config.revision = source, None
    return replace(adapter, config=config)


def load_base(adapter: StoredAdapter, *, dtype: torch.dtype | None = None, device: str = "cpu") -> ModelBundle:
    """Open the base that an adapter names, held and asked as in its training.

    Raises:
        ModelError: It names none, or that one isn't there.
    """
    resolve_base_folder(adapter)
    return load_model(
        str(adapter.base),
        dtype=dtype,
        device=device,
        revision=adapter.config.revision,
        quantization=adapter.quantization,
        task=adapter.named_task,  # Left open, the base says it.
        labels=adapter.labels,
    )


def resolve_base_folder(adapter: StoredAdapter) -> Path:
    """Return the local folder of the base that an adapter names.

    Raises:
        ModelError: It names none, or that one isn't there.
    """
    if not adapter.base:
        raise ModelError(
            f"{adapter.folder / CONFIG_FILE} names no base model. Write its path or hub id as base_model_name_or_path."
        )
    try:
        return resolve_model_folder(adapter.base, revision=adapter.config.revision)
    except ModelError as error:
        raise ModelError(
            f"the base of {adapter.folder} isn't there: {error} If it was moved: generate, chat, merge and evaluate "
            "take --base PATH, and Python's from_path takes base=."
        ) from error


def find_adapter(source: str | Path) -> Path:
    """Return the adapter folder of a run, an adapter folder itself, or that of a hub id.

    Raises:
        ModelError: There is none.
    """
    if not RunDir.is_run(source):
        return resolve_model_folder(source)
    run = RunDir(source)
    if is_adapter_folder(run.adapter):
        return run.adapter
    advice = (
        "It trained a whole model, which needs no merge: the run itself is a model."
        if run.model.is_dir()
        else _advise_unfinished(run)
    )
    raise ModelError(f"the run {source} has no adapter in {run.adapter.name}. {advice}")


def _find_result(run: RunDir) -> Path:
    for folder in (run.model, run.adapter, run.merged):
        if folder.is_dir():
            return folder
    raise ModelError(f"the run {run.path} has no model or adapter yet. {_advise_unfinished(run)}")


def _advise_unfinished(run: RunDir) -> str:
    saved = run.newest_checkpoint()
    if saved is None or not is_adapter_folder(saved.path):  # One of a whole model lacks its settings and tokenizer.
        return "Finish it with --resume."
    return f"Finish it with --resume, or name its last checkpoint, which is an adapter: {saved.path}"


def _find_way(source: str, folder: Path) -> str | None:
    """Return the path of a local base from the folder that an adapter's lies in."""
    if not Path(source).is_dir():
        return None
    try:
        return os.path.relpath(source, folder.resolve().parent)
    except ValueError:  # Another drive of Windows.
        return None


def _write_config(peft_config: peft.PeftConfig, folder: Path) -> None:
    """Write adapter_config.json, its sets in a fixed order: else the same run would write other bytes each time."""
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    is_set = {name for name, value in peft_config.to_dict().items() if isinstance(value, set)}
    write_json(folder / CONFIG_FILE, {name: sorted(v) if name in is_set else v for name, v in written.items()})
