"""Which rows a run reads and how they become examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from smolora.config.base import Section

FileType = Literal["txt", "csv", "jsonl", "json", "parquet", "arrow", "hub"]


class _Columns(Section):
    """Which column is what, where the names don't tell."""

    text_field: str | None = None
    """Column of plain text; of classification, the text to classify."""

    text_pair_field: str | None = None
    """classification: column of the second text, where two are classified together."""

    label_field: str | None = None
    """Column of labels: classification, one a row; token_classification, a list with one a word."""

    prompt_field: str | None = None
    """Column the model is given; it is not trained on."""

    completion_field: str | None = None
    """Column the model is trained to answer."""


class DataConfig(_Columns):
    """Sources, columns, and the choices about rows that don't fit."""

    sources: tuple[str, ...] = ()
    """Files, folders or hub ids, read in this order."""

    eval_source: str | None = None
    """Held-out rows; rows to learn from that equal one of them are left out. Without this, min(5 %, 500) of the rows
    are held out (none below 50 rows)."""

    file_type: FileType | None = None
    """How to read the sources, and an `eval_source` whose name doesn't tell. Left out, it is inferred from the names.
    txt reads a folder's pages of HTML too."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; of seq2seq, longest prompt and longest answer. Left out, the model's context."""

    overlong: Literal["raise", "truncate", "drop"] = "raise"
    """What to do with an example past `max_length`. truncate cuts its end and counts the target tokens it cut."""

    max_rejects: int = Field(default=0, ge=0)
    """Malformed rows to tolerate before the run stops with exit code 3."""

    stride: int | None = Field(default=None, ge=0)
    """qa: tokens that two windows share, where a context is longer than one. Left out, a quarter of a window's."""

    chunk_size: int = Field(default=0, ge=0)
    """Split plain text into pieces of this many words, or tokens of `chunk_tokenizer`; 0 keeps rows whole. The last
    piece of a text alone is learned with an end."""

    chunk_tokenizer: str | None = None
    """Model folder or hub id whose tokens `chunk_size` counts, the begin and end of a row among them. Left out, it
    counts words, which white space parts."""

    chat_template: str | None = None
    """Jinja template for rows of messages. Left out, the tokenizer's, else a plain one."""

    clean: tuple[str, ...] = ()
    """Cleaning switches to turn on: strip_html (a page, any text file but .txt and .text, is one text then,
    as markup goes over lines), normalize_unicode, normalize_whitespace (line breaks, paragraphs and indentation stay;
    several blank lines become one), flatten_whitespace (all on one line), lowercase."""

    deduplicate: bool = True
    """Drop rows that teach the same as an earlier one in the columns that the task reads, keeping order."""

    validation_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of rows to hold out where no `eval_source` is given. Of fewer than 50 rows none is, whatever stands here:
    name others in `eval_source`. In pretraining, share of the text, unless that is too short for a window."""

    max_validation_rows: int = Field(default=500, ge=0)
    """Bound on the rows that are split off to be held out (0: none), and on those of an `eval_source` or of a benchmark
    that an evaluation during the run reads, from all parts of them (0: all); the verdict draws from all. In
    pretraining, bound on the windows of held-out text that are evaluated (0: none)."""

    def find_idle(self) -> Mapping[str, str]:
        """Return what waits for a size of chunks."""
        return {} if self.chunk_size else {"chunk_tokenizer": "chunk_size"}

    @field_validator("chat_template")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None and "{" not in value:
            raise ValueError("a Jinja template renders messages by {{ ... }}: give its text, not the name of its file")
        return value

    @field_validator("sources", "clean", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value
