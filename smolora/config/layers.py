"""A choice of layers, as a person writes it: a number, a range such as 4-11, or several of both."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def parse_layers(value: object) -> object:
    """Return layer numbers in order; None, which is all layers, stays None.

    >>> parse_layers("4-6,0")
    (0, 4, 5, 6)

    Raises:
        ValueError: It is none.
    """
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else [value]
    words = [word.strip() for part in parts for word in str(part).split(",")]
    chosen: set[int] = set()
    for word in words:
        found = _RANGE.fullmatch(word)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ValueError("expected layers from 0, such as 4-11 or [0, 5]")
        chosen.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(chosen))


LayerChoice = Annotated[tuple[int, ...] | None, BeforeValidator(parse_layers)]
"""Layers from 0; None is all of them."""
