"""Tokens that rows may say next, drafted from what was said before: n-gram lookup, as in prompt lookup decoding.

A step that reads a row's drafts behind its last token knows what comes after each of them, so a draft that turns out to
be what is chosen there costs no step of its own (speculative decoding: Leviathan 2023, https://arxiv.org/abs/2211.17192;
prompt lookup: Saxena 2023). What is chosen is the same in either case up to rounding, drawn tokens included. All rows
of a call share one table: answers of a model that was tuned to a task repeat each other more than their own prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from smolora.generation.choosing import Row

_ORDER = 3
"""Tokens that say which one comes next."""

_LONGEST_DRAFT = 7
_MOST_TOKENS = 256
"""Of all rows in a step: there are logits for each of them."""

_MOST_ENTRIES = 2**16
_COST = 0.5
"""What each further token of `_FULL` rows or more adds to a step, in steps of one token a row."""

_FULL = 32
"""Of fewer rows it adds less, in proportion: a step of one row waits for the weights, and eight tokens take 1.1 to 1.3
of one's time."""

_FRESHNESS = 0.02
"""How much one token changes the acceptance rate."""


class Drafts:
    """What followed the last few tokens whenever they were said before in this call, latest first."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._acceptance = 0.5

    def read(self, ids: Sequence[int]) -> None:
        """Remember a prompt."""
        for start in range(len(ids) - _ORDER):
            self._remember(tuple(ids[start : start + _ORDER]), ids[start + _ORDER])

    def follow(self, row: Row, token: int) -> None:
        """Remember the token that a row is about to take, and whether it would have been drafted."""
        tail = row.tail(_ORDER)
        if (guess := self._next.get(tail)) is not None:
            self._acceptance += _FRESHNESS * ((guess == token) - self._acceptance)
        self._remember(tail, token)

    def draft(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return drafts for each row, none at all where reading them would take longer than they are likely to save."""
        longest = max(0, min(_LONGEST_DRAFT, _MOST_TOKENS // len(rows) - 1))
        drafts = [self._draft_row(row, longest) for row in rows]
        if not any(drafts):
            return drafts
        cost = _COST * min(1.0, len(rows) / _FULL)
        best = max(range(longest + 1), key=lambda length: self._expect_tokens(drafts, length) / (1 + cost * length))
        return [draft[:best] for draft in drafts]

    def _draft_row(self, row: Row, longest: int) -> list[int]:
        tail, draft = row.tail(_ORDER), list[int]()
        # The last token of an answer is chosen, not read.
        while len(draft) < min(longest, row.room - len(row.ids) - 1):
            token = self._next.get(tail)
            if token is None or token in row.end_ids:
                break
            draft.append(token)
            tail = (*tail[1:], token)
        return draft

    def _expect_tokens(self, drafts: Sequence[list[int]], longest: int) -> float:
        """Return how many tokens a step is likely to add to all rows that reads up to `longest` drafts of each."""
        return sum(self._acceptance**place for draft in drafts for place in range(min(len(draft), longest) + 1))

    def _remember(self, tail: tuple[int, ...], token: int) -> None:
        self._next.pop(tail, None)  # Entries lie in the order they were last said.
        self._next[tail] = token
        if len(self._next) > _MOST_ENTRIES:
            del self._next[next(iter(self._next))]
