"""A configuration as a file for people: YAML whose comments are the fields' own descriptions."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from smolora.config.base import Section

_WIDTH = 110


def annotate_config(
    config: Section,
    *,
    head: Collection[str] = (),
    reasons: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> str:
    """Return YAML of what `config` sets, each setting below its description.

    A comment begins with "# "; a setting that isn't in force stands as "#name: value", and is at its default.

    Args:
        config: What to write; only what it sets itself is in force.
        head: Sentences for the top.
        reasons: Why a setting has its value, by path.
        others: Paths of settings to show with their defaults, where they aren't set.
    """
    blocks = [[line for sentence in head for line in _comment(sentence)]]
    for name, field in type(config).model_fields.items():
        value = config.__dict__[name]
        if isinstance(value, Section):
            in_force = value.model_fields_set if name in config.model_fields_set else set()
            shown = {inner for inner in type(value).model_fields if f"{name}.{inner}" in others} | in_force
            lines = list(_iter_lines(name, value, shown, in_force, reasons or {}))
            blocks.append([*_comment(field.description), *lines] if lines else [])
        elif name in config.model_fields_set:
            blocks.append([*_comment(field.description), *_write(name, value)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _iter_lines(
    name: str, section: Section, shown: Collection[str], in_force: Collection[str], reasons: Mapping[str, str]
) -> Iterator[str]:
    if not shown:
        return
    yield f"{name}:" if in_force else f"#{name}:"
    values = {**section.model_dump(mode="json"), **section.model_dump(mode="json", exclude_unset=True)}
    for inner, value in values.items():
        if inner not in shown:
            continue
        reason = reasons.get(f"{name}.{inner}")
        comments = [*_comment(type(section).model_fields[inner].description), *_comment(reason and f"Here: {reason}")]
        lines = _write(inner, value)
        yield from (f"  {line}" for line in comments)
        yield from (f"  {line}" if inner in in_force else f"  #{line}" for line in lines)


def _write(name: str, value: Any) -> list[str]:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=sys.maxsize)
    return f"{name}: {text}".removesuffix("...\n").rstrip().splitlines()


def _comment(text: str | None) -> list[str]:
    """Return text as comments: a line as it is, longer ones wrapped anew."""
    if text and len(text) <= _WIDTH and "\n" not in text:
        return [f"# {text}"]
    lines = textwrap.wrap(" ".join((text or "").split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]
