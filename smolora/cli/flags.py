"""Flags that stand for a path of the configuration. The configuration itself decides which values are allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from cyclopts import Parameter


@dataclass(frozen=True)
class At:
    """The configuration's path that a flag sets."""

    path: str


@dataclass(frozen=True, kw_only=True)
class LoopFlags:
    """What pretraining and tuning share."""

    data: Annotated[tuple[str, ...], At("data.sources")] = ()
    """File, folder or hub id to read. May be repeated."""

    eval_data: Annotated[str | None, At("data.eval_source")] = None
    """Held-out rows. Left out, some of the data is held out."""

    max_steps: Annotated[int | None, At("training.max_steps")] = None
    """Updates; where given it decides alone, and the data repeats."""

    lr: Annotated[float | None, At("training.learning_rate")] = None
    """Peak learning rate."""

    seed: Annotated[int | None, At("training.seed")] = None
    """Seed of initial weights, data order and dropout."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PretrainFlags(LoopFlags):
    """Flags of `smolora pretrain`."""

    tokenizer: Annotated[str | None, At("tokenizer.kind")] = None
    """char or bpe."""

    layers: Annotated[int | None, At("gpt.num_layers")] = None
    """Transformer blocks."""

    heads: Annotated[int | None, At("gpt.num_heads")] = None
    """Attention heads per block; divides the width."""

    width: Annotated[int | None, At("gpt.width")] = None
    """Width of the model, in features."""

    context: Annotated[int | None, At("gpt.context")] = None
    """Longest sequence in tokens."""

    device: Annotated[str | None, At("device")] = None
    """auto, cpu, cuda or mps."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainFlags(LoopFlags):
    """Flags of `smolora train`."""

    model: Annotated[str | None, At("model.name_or_path")] = None
    """Base model: a folder, a run or a hub id."""

    prompt_field: Annotated[str | None, At("data.prompt_field")] = None
    """Column that the model is given; it is not trained on."""

    completion_field: Annotated[str | None, At("data.completion_field")] = None
    """Column that the model learns to answer."""

    text_field: Annotated[str | None, At("data.text_field")] = None
    """Column of plain text, where there is no prompt."""

    adapter: Annotated[str | None, At("adapter.path")] = None
    """Adapter, or the run that holds it, to continue from."""

    epochs: Annotated[float | None, At("training.num_train_epochs")] = None
    """Passes over the data, where --max-steps isn't given."""

    r: Annotated[int | None, Parameter(name="--r"), At("adapter.r")] = None
    """Rank of the adapter."""

    target: Annotated[str | None, At("adapter.target_modules")] = None
    """attention_only, mlp_only, both, all, or module names with commas."""

    dynamic_lora: Annotated[bool | None, At("phases.enabled")] = None
    """Train in phases. Alone: both,mlp,attn in equal shares of the run."""

    phase_strategy: Annotated[str | None, At("phases.strategy")] = None
    """both,mlp,attn, attn,mlp,both, both,mlp,both or early,late (with commas: an unquoted arrow redirects)."""

    phase1_end: Annotated[int | None, Parameter(name="--phase1-end"), At("phases.phase1_end")] = None
    """Last update of the first phase."""

    phase2_end: Annotated[int | None, Parameter(name="--phase2-end"), At("phases.phase2_end")] = None
    """Last update of the second phase."""

    max_length: Annotated[int | None, At("data.max_length")] = None
    """Longest example in tokens. Left out, the model's context."""

    overlong: Annotated[str | None, At("data.overlong")] = None
    """What to do with a longer one: raise, truncate or drop."""

    dtype: Annotated[str | None, At("model.dtype")] = None
    """Type of the frozen base: auto, float32, bfloat16 or float16."""

    device: Annotated[str | None, At("model.device")] = None
    """auto, cpu, cuda or mps."""


def collect_settings(flags: LoopFlags) -> dict[str, object]:
    """Return what was given, by path of the configuration."""
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value not in (None, ())}
    return {_path_of(type(flags), name): value for name, value in given.items()}


def _path_of(kind: type[LoopFlags], name: str) -> str:
    [place] = [note for note in get_type_hints(kind, include_extras=True)[name].__metadata__ if isinstance(note, At)]
    return place.path
