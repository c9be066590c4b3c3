"""From a method's section to peft's configuration: one table, and what each entry needs to know of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import peft

from smolora.adapters.targets import resolve_norms, resolve_pattern, resolve_target_modules
from smolora.config.adapter import (
    AdaLoRAConfig,
    DoRAConfig,
    IA3Config,
    LayerNormConfig,
    LoftQConfig,
    LoRAConfig,
    LowRankConfig,
    PEFTConfig,
    PiSSAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RSLoRAConfig,
    SoftPromptConfig,
    VeRAConfig,
)
from smolora.errors import ConfigError
from smolora.models.anatomy import Anatomy

_TINIT_SHARE, _TFINAL_SHARE = 0.1, 0.3


@dataclass(frozen=True)
class Ground:
    """What an adapter goes on, as far as its configuration depends on it."""

    anatomy: Anatomy
    width: int | None
    """Features of an embedding; None where the model looks none up."""
    seed: int
    total_steps: int | None = None
    """Updates of the run, where there is one."""


def build_peft_config(config: PEFTConfig, ground: Ground) -> peft.PeftConfig:
    """Return what peft is to do for `config`.

    Raises:
        ConfigError: A target that the model doesn't have, a schedule that doesn't fit the run, or virtual tokens for a
            model without embeddings of tokens.
    """
    if isinstance(config, SoftPromptConfig) and ground.width is None:
        raise ConfigError(
            f"adapter.method: {config.method} puts virtual tokens before the embeddings of others, and this model "
            "looks up no embedding of a token. Choose another method, such as lora."
        )
    return _BUILDERS[type(config)](config, ground)


def _low_rank(config: LowRankConfig, ground: Ground, **more: object) -> peft.PeftConfig:
    targets = resolve_target_modules(ground.anatomy, config.target_modules, layers=config.layers)
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        rank_pattern=resolve_pattern(ground.anatomy, targets, config.rank_pattern, field="rank_pattern"),
        alpha_pattern=resolve_pattern(ground.anatomy, targets, config.alpha_pattern, field="alpha_pattern"),
        **more,
    )


def _rslora(config: RSLoRAConfig, ground: Ground) -> peft.PeftConfig:
    return _low_rank(config, ground, use_rslora=True)


def _dora(config: DoRAConfig, ground: Ground) -> peft.PeftConfig:
    return _low_rank(config, ground, use_dora=True)


def _pissa(config: PiSSAConfig, ground: Ground) -> peft.PeftConfig:
    return _low_rank(
        config,
        ground,
        init_lora_weights="pissa" if config.num_iterations is None else f"pissa_niter_{config.num_iterations}",
    )


def _adalora(config: AdaLoRAConfig, ground: Ground) -> peft.PeftConfig:
    steps = ground.total_steps
    if steps is None:
        raise ConfigError("adapter.method: adalora spreads its ranks over a run, so it needs to know the run's steps.")
    tinit = int(steps * _TINIT_SHARE) if config.tinit is None else config.tinit
    tfinal = max(1, int(steps * _TFINAL_SHARE)) if config.tfinal is None else config.tfinal
    if tinit + 1 >= steps - tfinal:
        raise ConfigError(
            f"adapter.tinit = {tinit} and adapter.tfinal = {tfinal} leave no update to reallocate ranks in a run of "
            f"{steps}. Lower them, or train longer."
        )
    return peft.AdaLoraConfig(
        init_r=config.init_r,
        target_r=config.target_r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_reg_weight,
        total_step=steps,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=resolve_target_modules(ground.anatomy, config.target_modules, layers=config.layers),
    )


def _ia3(config: IA3Config, ground: Ground) -> peft.PeftConfig:
    targets = resolve_target_modules(ground.anatomy, config.target_modules, layers=config.layers)
    # What the MLP ends with is scaled where it reads, as in the paper; every other module where it writes.
    inputs = set(ground.anatomy.modules_with_role("down"))
    return peft.IA3Config(target_modules=targets, feedforward_modules=[path for path in targets if path in inputs])


def _vera(config: VeRAConfig, ground: Ground) -> peft.PeftConfig:
    return peft.VeraConfig(
        r=config.r,
        d_initial=config.d_initial,
        vera_dropout=config.vera_dropout,
        projection_prng_key=ground.seed,
        target_modules=resolve_target_modules(ground.anatomy, config.target_modules, layers=config.layers),
    )


def _layernorm(config: LayerNormConfig, ground: Ground) -> peft.PeftConfig:
    return peft.LNTuningConfig(target_modules=resolve_norms(ground.anatomy, layers=config.layers))


_ONE_STACK = 1
"""Stacks of layers that get virtual tokens. peft 0.21 would make some for a decoder too, and put them nowhere."""


def _prompt_tuning(config: PromptTuningConfig, ground: Ground) -> peft.PeftConfig:
    start = {"sample_vocab": "SAMPLE_VOCAB", "random": "RANDOM"}[config.prompt_tuning_init]
    return peft.PromptTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens, prompt_tuning_init=start, num_transformer_submodules=_ONE_STACK
    )


def _p_tuning(config: PTuningConfig, ground: Ground) -> peft.PeftConfig:
    return peft.PromptEncoderConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_hidden_size=config.encoder_hidden_size or ground.width,
        num_transformer_submodules=_ONE_STACK,
    )


def _prefix_tuning(config: PrefixTuningConfig, ground: Ground) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        encoder_hidden_size=config.encoder_hidden_size or ground.width,
    )


_Kind = TypeVar("_Kind", bound=PEFTConfig)
_Builder = Callable[[Any, Ground], peft.PeftConfig]

_BUILDERS: Mapping[type[PEFTConfig], _Builder] = {
    LoRAConfig: _low_rank,
    RSLoRAConfig: _rslora,
    DoRAConfig: _dora,
    PiSSAConfig: _pissa,
    LoftQConfig: _low_rank,
    AdaLoRAConfig: _adalora,
    IA3Config: _ia3,
    VeRAConfig: _vera,
    LayerNormConfig: _layernorm,
    PromptTuningConfig: _prompt_tuning,
    PTuningConfig: _p_tuning,
    PrefixTuningConfig: _prefix_tuning,
}


def count_virtual_tokens(peft_config: peft.PeftConfig) -> int:
    """Return how many virtual tokens a method puts before every row."""
    if not peft_config.is_prompt_learning:
        return 0
    return int(cast("peft.PromptLearningConfig", peft_config).num_virtual_tokens)
