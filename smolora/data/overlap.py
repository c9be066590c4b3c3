"""How much of what is held out was in the training data too: what is measured on that is memory, not learning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from hashlib import blake2b

from smolora.data.prompts import PromptFormat, reduce_to_taught
from smolora.data.rows import Row


@dataclass(frozen=True)
class Overlap:
    """Held-out rows that training rows equal, but for case and white space."""

    num_held_out: int
    rows: int
    """Those with a training row's prompt and answer."""
    prompts: int | None
    """Those with a training row's prompt, whatever the answer; None where the form has no prompt apart."""


_LONG_LINE = re.compile(r"[^\r\n]{20,}")
"""A shorter line, as a speaker's name in a play, may stand in any two texts."""

_ANSWERS = {
    "text": (),
    "prompt_completion": ("completion",),
    "instruction": ("output",),
    "messages": (),
    "classification": ("label",),
    "token_classification": ("tags",),
    "qa": ("answers",),
}
"""The roles that aren't asked."""


def measure_overlap(train: Iterable[Row], held_out: Sequence[Row], fmt: PromptFormat) -> Overlap:
    """Return how many of `held_out` are in `train`; memory is a digest for each held-out row."""
    answers = fmt.columns.keys() & _ANSWERS[fmt.kind]
    rows = _count_seen(train, held_out, fmt, set())
    prompts = _count_seen(train, held_out, fmt, answers) if answers else None
    return Overlap(len(held_out), rows, prompts)


def measure_shared_text(train: Iterable[str], held_out: Sequence[str]) -> float:
    r"""Return the share of the text of `held_out` whose lines stand in `train` too; memory is a set of its lines.

    It finds a text that was cut out of a longer one. Short lines don't count.

    >>> measure_shared_text(["A line of the long text.\nAnother line of it.\n"], ["A line of the long text.\n"])
    1.0
    """
    lines = [match.group() for text in held_out for match in _LONG_LINE.finditer(text)]
    if not (wanted := set(lines)):
        return 0.0
    seen = {line for text in train for match in _LONG_LINE.finditer(text) if (line := match.group()) in wanted}
    return sum(len(line) for line in lines if line in seen) / sum(map(len, lines))


def _count_seen(train: Iterable[Row], held_out: Sequence[Row], fmt: PromptFormat, but_for: Set[str]) -> int:
    digests = [_digest(row, fmt, but_for) for row in held_out]
    wanted = set(digests)
    seen = {digest for row in train if (digest := _digest(row, fmt, but_for)) in wanted}
    return sum(digest in seen for digest in digests)


def _digest(row: Row, fmt: PromptFormat, but_for: Set[str]) -> bytes:
    taught = (
        reduce_to_taught(row.values.get(column), role, fmt)
        for role, column in fmt.columns.items()
        if role not in but_for
    )
    texts = (" ".join(str(value).casefold().split()) for value in taught)
    return blake2b("\x00".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
