"""Flags that stand for a path of the configuration. The configuration itself decides which values are allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args, get_type_hints

from cyclopts import Parameter

if TYPE_CHECKING:
    from smolora.config import DataConfig


@dataclass(frozen=True)
class At:
    """The configuration's path that a flag sets."""

    path: str


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """The column of rows that are plain text."""

    text_field: Annotated[str | None, At("data.text_field")] = None
    """Column of plain text, where it has another name than text."""


@dataclass(frozen=True, kw_only=True)
class FieldFlags(TextFlags):
    """The columns of rows of any task."""

    prompt_field: Annotated[str | None, At("data.prompt_field")] = None
    """Column that the model is given; it is not trained on."""

    completion_field: Annotated[str | None, At("data.completion_field")] = None
    """Column that the model learns to answer."""

    text_pair_field: Annotated[str | None, At("data.text_pair_field")] = None
    """Column of the second text, where two are classified together."""

    label_field: Annotated[str | None, At("data.label_field")] = None
    """Column of labels, where it has another name than label (of words: tags)."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PrepareFlags(FieldFlags):
    """Flags of `smolora prepare`."""

    task: Annotated[str | None, At("task")] = None
    """What the rows are for, as in train: causal_lm, classification, token_classification, qa or seq2seq."""

    chunk_size: Annotated[int | None, At("data.chunk_size")] = None
    """Split texts into pieces of so many words."""

    file_type: Annotated[str | None, At("data.file_type")] = None
    """txt, csv, jsonl, json, parquet, arrow or hub, where the name doesn't tell."""

    seed: Annotated[int | None, At("seed")] = None
    """Seed of the split."""


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

    batch_size: int | None = None
    """Rows per update, however many passes and processes they take."""

    quiet: bool = False
    """Show warnings only."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PretrainFlags(TextFlags, LoopFlags):
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

    dtype: Annotated[str | None, At("dtype")] = None
    """Type of matrix products: float32, or bfloat16 for mixed precision."""

    device: Annotated[str | None, At("device")] = None
    """auto, cpu, cuda or mps."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainFlags(FieldFlags, LoopFlags):
    """Flags of `smolora train`."""

    task: Annotated[str | None, At("model.task_type")] = None
    """causal_lm, classification, token_classification, qa or seq2seq."""

    model: Annotated[str | None, At("model.name_or_path")] = None
    """Base model: a folder, a run or a hub id."""

    method: Annotated[str | None, At("adapter.method")] = None
    """lora, rslora, dora, pissa, loftq, adalora, ia3, vera, layernorm, prompt_tuning, p_tuning, prefix_tuning, full."""

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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How answers are drawn; what isn't given is greedy, and as long as the benchmark's answers are."""

    max_new_tokens: int | None = None
    """Longest answer in tokens."""

    temperature: float | None = None
    """Draw answers at random: below 1 is safer, above 1 wilder."""

    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""

    num_beams: int | None = None
    """Look for the likeliest whole answer among so many beginnings at a time."""

    seed: int | None = None
    """The same seed gives the same answers."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RowFlags(FieldFlags):
    """Which rows are answered."""

    benchmark: str | None = None
    """e2e_nlg, samsum, wikisql, multi_nli, sst2, ag_news, sick or squad."""

    data_dir: Path | None = None
    """Folder with the benchmark's files. Left out, they are downloaded."""

    split: str = "test"
    """Split of the benchmark: test, validation or train."""

    data: tuple[str, ...] = ()
    """Own rows in place of a benchmark: file, folder or hub id. May be repeated."""

    num_samples: int | None = None
    """Rows to take from the start."""

    def to_data(self) -> DataConfig:
        """Return where a person's own rows are, and how they are read."""
        from smolora.config import DataConfig

        fields = {path.removeprefix("data."): value for path, value in collect_settings(self).items()}
        return DataConfig(sources=self.data, **fields)


def collect_settings(flags: TextFlags | LoopFlags) -> dict[str, object]:
    """Return what was given, by path of the configuration."""
    values = dataclasses.asdict(flags)
    return {path: values[name] for path, name in paths_of(type(flags)).items() if values[name] not in (None, ())}


def paths_of(kind: type[TextFlags | LoopFlags]) -> dict[str, str]:
    """Return the names of the fields that set the configuration, by the path that each sets."""
    hints = get_type_hints(kind, include_extras=True)
    notes = [(note, name) for name, hint in hints.items() for note in get_args(hint)]
    return {note.path: name for note, name in notes if isinstance(note, At)}
