"""Puts a fresh adapter on a base model: float32, seeded, and changing no logit until it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import peft
import torch

from smolora.adapters.targets import resolve_pattern, resolve_target_modules
from smolora.config.adapter import LoRAConfig
from smolora.errors import ConfigError, ModelError
from smolora.models.anatomy import Anatomy, build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.models.structure import PreTrainedModel


def attach_adapter(bundle: ModelBundle, config: LoRAConfig, *, seed: int) -> ModelBundle:
    """Freeze the base and put a new adapter on it; `bundle.model` itself is changed.

    The adapter's weights are float32 over a base of any type (AdamW in half precision doesn't move, or overflows).
    Matrix B starts at 0, so no logit changes; A is drawn from `seed`, and the global random generator stays as it
    was.

    Raises:
        ConfigError: A target that the model doesn't have, or a model that carries an adapter already.
        ModelError: A GPTModel, which is adapted in its saved form.
    """
    model = refuse_unadaptable(bundle)
    peft_config = _build_peft_config(config, bundle.anatomy, source=bundle.source, revision=bundle.revision)
    return replace(bundle, model=_adapt(model, peft_config, seed=seed))


def setup_model_with_lora(model: PreTrainedModel, config: LoRAConfig | None = None, *, seed: int = 0) -> peft.PeftModel:
    """Put a fresh adapter on a plain model that is in memory already, without a bundle; `model` itself is changed."""
    peft_config = _build_peft_config(config or LoRAConfig(), build_anatomy(model), source=model.name_or_path or None)
    return _adapt(model, peft_config, seed=seed)


def _build_peft_config(
    config: LoRAConfig, anatomy: Anatomy, *, source: str | None, revision: str | None = None
) -> peft.LoraConfig:
    targets = resolve_target_modules(anatomy, config.target_modules)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        rank_pattern=resolve_pattern(anatomy, targets, config.rank_pattern, field="rank_pattern"),
        alpha_pattern=resolve_pattern(anatomy, targets, config.alpha_pattern, field="alpha_pattern"),
        base_model_name_or_path=source,
        revision=revision,
    )


def _adapt(model: PreTrainedModel, peft_config: peft.LoraConfig, *, seed: int) -> peft.PeftModel:
    is_training = model.training
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), quiet_peft():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=True)
    assert isinstance(adapted, peft.PeftModel)
    return adapted.train(is_training)  # peft's new dropout layers would drop in an eval model.


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's warnings inside the block; what matters in them is checked and raised by us.

    Among them: peft 0.21 uses a property that transformers 5 deprecates, and it tells that it has set fan_in_fan_out
    for GPT-2, whose matrices are stored [in, out].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
