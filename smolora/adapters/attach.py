"""Puts a fresh adapter on a base model: float32 and seeded, and of most methods one that changes no logit yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn

from smolora.adapters.adapter_files import PEFT_TASKS
from smolora.adapters.methods import Ground, build_peft_config, count_virtual_tokens
from smolora.adapters.starts import start_from_residual
from smolora.adapters.tensors import copy_tensors, quiet_peft
from smolora.config.adapter import FullConfig, LoftQConfig, LoRAConfig, PEFTConfig, PiSSAConfig
from smolora.config.model import TaskType
from smolora.errors import ConfigError, ModelError
from smolora.models.anatomy import Anatomy, build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.models.folders import resolve_model_folder
from smolora.models.structure import PreTrainedModel, find_embedding
from smolora.models.tasks import describe_task, task_of

logger = logging.getLogger(__name__)


def attach_adapter(
    bundle: ModelBundle, config: PEFTConfig, *, seed: int, total_steps: int | None = None
) -> ModelBundle:
    """Freeze the base and put a new adapter on it, or let all of it be trained (full); `bundle.model` is changed.

    A task's head, which is no language model's, is trained whole beside it, and is kept with the adapter.

    The adapter's weights are float32 over a base of any type (AdamW in half precision doesn't move, or overflows), are
    drawn from `seed`, and the global random generator stays as it was. No logit changes before the first update, except
    by soft prompts (prompt, prefix and P-tuning), and by loftq, which takes back what quantising lost.

    Args:
        bundle: The base.
        config: The method's section.
        seed: Of what is drawn.
        total_steps: Updates of the run; adalora needs them.

    Raises:
        ConfigError: A target that the model doesn't have, or a model that carries an adapter already.
        ModelError: A GPTModel, which is adapted in its saved form.
    """
    model = refuse_unadaptable(bundle)
    if bundle.has_drawn_head:
        heads = ", ".join(bundle.anatomy.heads)
        logger.info("a fresh head for %s: %s", describe_task(bundle.task, bundle.labels), heads)
    if isinstance(config, FullConfig):
        return replace(bundle, model=_train_all(model))
    ground = Ground(bundle.anatomy, width=_read_width(model), seed=seed, total_steps=total_steps)
    peft_config = build_peft_config(config, ground)
    if "target_modules" in type(config).model_fields:
        _name_unadaptable(model, bundle.anatomy)
    _name_task(peft_config, bundle.task, bundle.anatomy.heads)
    adapted = adapt(model, peft_config, source=bundle.source, revision=bundle.revision, seed=seed)
    if isinstance(config, LoftQConfig):
        start_from_residual(adapted, resolve_model_folder(bundle.source, revision=bundle.revision))
    return replace(
        bundle,
        model=adapted,
        num_virtual_tokens=count_virtual_tokens(peft_config),
        taken=copy_tensors(adapted) if isinstance(config, PiSSAConfig) else None,
    )


def _read_width(model: PreTrainedModel) -> int | None:
    embedding = find_embedding(model)
    return None if embedding is None else embedding.get_parameter("weight").shape[1]


def _name_unadaptable(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Say which large part of a model no adapter can go on."""
    if paths := anatomy.unadaptable_modules():
        held = sum(p.numel() for path in paths for p in model.get_submodule(path).parameters(recurse=False))
        logger.info(
            "no adapter can go on %s: %s of %s parameters stay as they are",
            " and ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)),
            f"{held:,}",
            f"{sum(p.numel() for p in model.parameters()):,}",
        )


def _train_all(model: PreTrainedModel) -> PreTrainedModel:
    """Let every weight be trained, the embedding and the norms too, in float32."""
    model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def setup_model_with_lora(model: PreTrainedModel, config: PEFTConfig | None = None, *, seed: int = 0) -> peft.PeftModel:
    """Put a fresh adapter on a plain model that is in memory already, without a bundle; `model` itself is changed.

    Raises:
        ConfigError: A target that the model doesn't have, or a method that needs to know the base's files or the run.
    """
    if isinstance(config, (PiSSAConfig, LoftQConfig, FullConfig)):
        raise ConfigError(f"adapter.method: {config.method} needs the base's files. Use load_model and attach_adapter.")
    anatomy = build_anatomy(model)
    ground = Ground(anatomy, width=_read_width(model), seed=seed)
    peft_config = build_peft_config(config or LoRAConfig(), ground)
    _name_task(peft_config, task_of(model), anatomy.heads)
    return adapt(model, peft_config, source=model.name_or_path or None, revision=None, seed=seed)


def adapt(
    model: PreTrainedModel, peft_config: peft.PeftConfig, *, source: str | None, revision: str | None, seed: int = 0
) -> peft.PeftModel:
    """Put what `peft_config` says on `model`, in the mode and with the global random generator as they were."""
    is_training = model.training
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), quiet_peft():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=True)
    assert isinstance(adapted, peft.PeftModel)
    peft_config.base_model_name_or_path, peft_config.revision = source, revision
    for layer in adapted.modules():
        if isinstance(layer, LNTuningLayer):
            _compute_in_float32(layer)
        elif isinstance(layer, AdaLoraLayer):
            layer.ranknum.requires_grad_(False)  # peft unfreezes this constant where it widens it to float32.
    if isinstance(adapted, peft.PeftModelForQuestionAnswering):
        # peft 0.21 hands neither token_type_ids nor position_ids on there, and says nothing.
        vars(adapted)["forward"] = adapted.base_model.forward
    return adapted.train(is_training)  # peft's new dropout layers would drop in an eval model.


def _name_task(peft_config: peft.PeftConfig, task: TaskType, heads: Sequence[str]) -> None:
    """Say what the model is asked, and that its head is trained whole; virtual tokens have no such list."""
    peft_config.task_type = PEFT_TASKS[task]
    if heads and not isinstance(peft_config, peft.PromptLearningConfig):
        peft_config.modules_to_save = list(heads)


def _compute_in_float32(layer: LNTuningLayer) -> None:
    """Let float32 norms stand in a base of another type: they read in float32, and answer in the base's type."""
    layer.ln_tuning_layers.float()
    if next(layer.get_base_layer().parameters()).dtype == torch.float32:
        return
    for norm in layer.ln_tuning_layers.values():
        norm.register_forward_pre_hook(_widen)
    layer.register_forward_hook(_narrow)


def _widen(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])


def _narrow(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def refuse_unadaptable(bundle: ModelBundle) -> PreTrainedModel:
    """Return the plain transformers model of a bundle.

    Raises:
        ConfigError: It carries an adapter already.
        ModelError: It isn't a transformers model.
    """
    if is_adapted(bundle):
        raise ConfigError(
            "the model carries an adapter already. Merge it first (smolora merge), "
            "or continue it with adapter.path (--adapter)."
        )
    if not isinstance(bundle.model, PreTrainedModel):
        raise ModelError(
            f"an adapter goes on a transformers model, found {type(bundle.model).__name__}. "
            "Save it with save_pretrained, then open the folder with load_model."
        )
    return bundle.model


def plain_model(bundle: ModelBundle) -> PreTrainedModel | None:
    """Return the transformers model under an adapter, or the bundle's own; None for a GPTModel."""
    model = bundle.model.get_base_model() if isinstance(bundle.model, peft.PeftModel) else bundle.model
    return model if isinstance(model, PreTrainedModel) else None


def is_adapted(bundle: ModelBundle) -> bool:
    """Whether the bundle's model carries an adapter."""
    return isinstance(bundle.model, peft.PeftModel)
