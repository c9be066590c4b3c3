"""What is trained on top of a frozen base: a LoRA adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from smolora.config.base import Section

ATTENTION_ONLY = ["q_proj", "v_proj"]
"""Llama's names of the LoRA paper's choice; `target_modules="attention_only"` means the same on any family."""

MLP_ONLY = ["gate_proj", "up_proj", "down_proj"]
"""Llama's names of the MLP; `target_modules="mlp_only"` on any family."""

BOTH = [*ATTENTION_ONLY, *MLP_ONLY]
"""Attention and MLP; `target_modules="both"` on any family."""

NAMED_TARGETS = ("attention_only", "mlp_only", "both", "all")


class LoRAConfig(Section):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + (lora_alpha / r) B A x."""

    method: Literal["lora"] = "lora"
    """The PEFT method."""

    r: int = Field(default=8, ge=1)
    """Rank of the update."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scale: the update is multiplied by lora_alpha / r."""

    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""

    target_modules: str | tuple[str, ...] = "all"
    """attention_only (query and value), mlp_only, both, all (every linear layer but the head), or module names."""

    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Ranks of modules that differ from `r`, by name as in `target_modules`; the longest name that fits one wins."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Alphas of modules that differ from `lora_alpha`, by name; a module's scale is its alpha over its rank."""

    path: str | None = None
    """An adapter, or the run that holds it, to continue from; its own r, alpha and targets are kept."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str) and value not in NAMED_TARGETS:
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError(f"name at least one module, or one of {', '.join(NAMED_TARGETS)}")
        return value
