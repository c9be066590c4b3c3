"""What is trained on a base model: one small section per method, told apart by `method`. Nothing here imports peft."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from smolora.config.base import Section
from smolora.config.layers import LayerChoice
from smolora.errors import ConfigError, did_you_mean

ATTENTION_ONLY = ["q_proj", "v_proj"]
"""Llama's names of the LoRA paper's choice; `target_modules="attention_only"` means the same on any family."""

MLP_ONLY = ["gate_proj", "up_proj", "down_proj"]
"""Llama's names of the MLP; `target_modules="mlp_only"` on any family."""

BOTH = [*ATTENTION_ONLY, *MLP_ONLY]
"""Attention and MLP; `target_modules="both"` on any family."""

NAMED_TARGETS = ("attention_only", "mlp_only", "both", "all")

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class PEFTConfig(Section):
    """What every method has. `PEFTConfig.predefined` gives a ready configuration by name."""

    method: str
    """The method."""

    path: str | None = None
    """An adapter, or the run that holds it, to continue from; its own settings are kept."""

    @classmethod
    def predefined(cls, name: str) -> PEFTConfig:
        """Return a ready configuration: a method by its name, or LoRA on a part of the model.

        >>> PEFTConfig.predefined("lora_attention").target_modules
        'attention_only'

        Raises:
            ConfigError: There is none of that name.
        """
        known = {**{name: {"method": name} for name in METHODS}, **_LORA_ON}
        if name not in known:
            raise ConfigError(f"no configuration '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        return METHODS[known[name]["method"]](**known[name])

    @classmethod
    def describe_setting(cls) -> str:
        return f"setting of {cls.model_fields['method'].default}"


class _TargetedConfig(PEFTConfig):
    target_modules: str | tuple[str, ...] = "all"
    """attention_only (query and value), mlp_only, both, all (every linear layer but the head), or module names. Experts
    that a model holds in one tensor are no linear layers: no adapter goes on them, and the run says so."""

    layers: LayerChoice = None
    """Layers to adapt, from 0, such as 4-11 or [0, 5]; left out, all."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str) and value not in (*NAMED_TARGETS, cls.model_fields["target_modules"].default):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError(f"name at least one module, or one of {', '.join(NAMED_TARGETS)}")
        return value


class LowRankConfig(_TargetedConfig):
    """What LoRA and the methods that add a matrix B A to a weight share."""

    r: Rank = 8
    """Rank of the update."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scale: the update is multiplied by lora_alpha / r (rslora: by lora_alpha / sqrt(r))."""

    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of modules that differ from `r`, by name as in `target_modules`; the longest name that fits one wins."""

    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Alphas of modules that differ from `lora_alpha`, by name; a module's scale is its alpha over its rank."""


class LoRAConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + (lora_alpha / r) B A x."""

    method: Literal["lora"] = "lora"
    """The PEFT method."""


class RSLoRAConfig(LowRankConfig):
    """LoRA scaled by lora_alpha / sqrt(r), for high ranks (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""

    method: Literal["rslora"] = "rslora"
    """The PEFT method."""


class DoRAConfig(LowRankConfig):
    """LoRA on a weight's direction, its length trained apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

    method: Literal["dora"] = "dora"
    """The PEFT method."""


class PiSSAConfig(LowRankConfig):
    """LoRA that starts as the weight's largest directions (Meng et al. 2024, https://arxiv.org/abs/2404.02948).

    It is saved as LoRA of twice the rank, which goes on the base as it was.
    """

    method: Literal["pissa"] = "pissa"
    """The PEFT method."""

    num_iterations: int | None = Field(default=None, ge=1)
    """Iterations of a fast search for these directions, such as 16. Left out, an exact decomposition."""


class LoftQConfig(LowRankConfig):
    """LoRA that starts as what quantising lost of the weight (Li et al. 2023, https://arxiv.org/abs/2310.08659)."""

    method: Literal["loftq"] = "loftq"
    """The PEFT method."""


class AdaLoRAConfig(_TargetedConfig):
    """LoRA as P diag(e) Q, whose ranks move to where they count (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    Every module starts at `init_r`. From update `tinit` until `tfinal` updates before the end the least important
    directions are set to zero, until `target_r` a module are left on average.
    """

    method: Literal["adalora"] = "adalora"
    """The PEFT method."""

    init_r: Rank = 12
    """Rank of every module at the start."""

    target_r: Rank = 8
    """Mean rank at the end; below `init_r`."""

    tinit: int | None = Field(default=None, ge=0)
    """Updates before the first reallocation. Left out, a tenth of the run."""

    tfinal: int | None = Field(default=None, ge=1)
    """Updates after the last reallocation. Left out, three tenths of the run."""

    deltaT: int = Field(default=1, ge=1)  # noqa: N815 - peft's spelling
    """Updates between two reallocations."""

    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Decay of the mean importance of a weight."""

    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Decay of its uncertainty."""

    orth_reg_weight: float = Field(default=0.5, ge=0.0)
    """Weight of the penalty that keeps P and Q orthogonal; it isn't part of the logged loss."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scale: the update is multiplied by lora_alpha / init_r."""

    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaLoRAConfig:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r must be below init_r = {self.init_r}, so that ranks can be taken away")
        return self


class IA3Config(_TargetedConfig):
    """A factor for each feature (Liu et al. 2022, https://arxiv.org/abs/2205.05638): the fewest parameters."""

    method: Literal["ia3"] = "ia3"
    """The PEFT method."""

    target_modules: str | tuple[str, ...] = "default"
    """default (keys, values and the last module of the MLP), attention_only, mlp_only, both, all, or module names."""


class VeRAConfig(_TargetedConfig):
    """Random matrices, shared and frozen, with trained factors (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454)."""

    method: Literal["vera"] = "vera"
    """The PEFT method."""

    r: Rank = 256
    """Rank of the shared matrices; a unit costs one parameter a module."""

    d_initial: float = Field(default=0.1, gt=0.0)
    """Start of the factors between the two matrices."""

    vera_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""


class LayerNormConfig(PEFTConfig):
    """Trains the norms alone (Zhao et al. 2023, https://arxiv.org/abs/2312.11420)."""

    method: Literal["layernorm"] = "layernorm"
    """The PEFT method."""

    layers: LayerChoice = None
    """Layers whose norms are trained, such as 4-11 or [0, 5]; left out, all, and the last norm."""


class SoftPromptConfig(PEFTConfig):
    """What the methods share that put virtual tokens before every row and leave all weights as they are."""

    num_virtual_tokens: int = Field(default=20, ge=1)
    """Virtual tokens; the context is shorter by as many."""


class PromptTuningConfig(SoftPromptConfig):
    """Trained embeddings before every row (Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    """The PEFT method."""

    prompt_tuning_init: Literal["sample_vocab", "random"] = "sample_vocab"
    """Start: embeddings of random tokens of the vocabulary, or random numbers."""


class PTuningConfig(SoftPromptConfig):
    """Embeddings before every row, made by a small MLP (Liu et al. 2021, https://arxiv.org/abs/2103.10385)."""

    method: Literal["p_tuning"] = "p_tuning"
    """The PEFT method."""

    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of the MLP. Left out, the model's."""


class PrefixTuningConfig(SoftPromptConfig):
    """Trained keys and values before every row, in each layer (Li & Liang 2021, https://arxiv.org/abs/2101.00190)."""

    method: Literal["prefix_tuning"] = "prefix_tuning"
    """The PEFT method."""

    prefix_projection: bool = False
    """Whether an MLP makes them; it is dropped when the adapter is saved."""

    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Width of that MLP. Left out, the model's."""


class FullConfig(PEFTConfig):
    """Trains the whole model, without an adapter. The run ends with a model folder."""

    method: Literal["full"] = "full"
    """All weights."""

    @field_validator("path")
    @classmethod
    def _no_adapter(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("full trains the model itself; merge the adapter first, and name the merged model")
        return value


_KINDS = (
    LoRAConfig,
    RSLoRAConfig,
    DoRAConfig,
    PiSSAConfig,
    LoftQConfig,
    AdaLoRAConfig,
    IA3Config,
    VeRAConfig,
    LayerNormConfig,
    PromptTuningConfig,
    PTuningConfig,
    PrefixTuningConfig,
    FullConfig,
)
METHODS: dict[str, type[PEFTConfig]] = {kind.model_fields["method"].default: kind for kind in _KINDS}
"""The section of each method, by its name."""

_LORA_ON: dict[str, dict[str, Any]] = {
    "lora_attention": {"method": "lora", "target_modules": "attention_only"},
    "lora_mlp": {"method": "lora", "target_modules": "mlp_only"},
    "lora_both": {"method": "lora", "target_modules": "both"},
}


def _name_method(value: object) -> object:
    if not isinstance(value, dict):
        return value
    method = value.get("method", "lora")
    if not isinstance(method, str) or method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ConfigError(f"method: no method {method!r}.{hint} Methods: {', '.join(METHODS)}.")
    return {"method": method, **value}


AdapterConfig = Annotated[
    LoRAConfig
    | RSLoRAConfig
    | DoRAConfig
    | PiSSAConfig
    | LoftQConfig
    | AdaLoRAConfig
    | IA3Config
    | VeRAConfig
    | LayerNormConfig
    | PromptTuningConfig
    | PTuningConfig
    | PrefixTuningConfig
    | FullConfig,
    Field(discriminator="method"),
    BeforeValidator(_name_method),
]
"""Any of the methods' sections; without a method it is LoRA's."""


def keep_fitting(settings: dict[str, Any], method: object) -> dict[str, Any]:
    """Return those of an adapter's settings that another method reads too, its own name left out.

    >>> keep_fitting({"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "both"}, "vera")
    {'r': 4, 'target_modules': 'both'}
    """
    kind = METHODS.get(str(method))
    known = kind.model_fields if kind else {}
    return {name: value for name, value in settings.items() if name in known and name != "method"}
