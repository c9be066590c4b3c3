"""The next token of each row, from logits.

Chance is a pure function of a row's key and the position: what a row draws doesn't depend on the rows beside it.

`B` rows, `V` vocabulary, `C` candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from smolora.errors import BrokenRunError
from smolora.generation.sampling import SamplingSettings

_NUCLEUS = 256
"""Sorting this many candidates is nearly free; whole vocabularies are sorted only where these don't reach top_p."""

_PART = 256
"""Logits whose maximum is found at once: of 35 rows and 32,000 words 92 us in all, by parts of 64 137, of 3,200 223."""


@dataclass(eq=False)
class Row:
    """A prompt and the answer to it as far as it goes."""

    prompt_ids: list[int]
    room: int
    """Longest answer in tokens."""

    settings: SamplingSettings
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the answer and are no part of it."""

    key: bytes = b""
    """Decides what is drawn at random."""

    stops: Callable[[list[int]], bool] | None = None
    """Whether the answer so far ends here."""

    source_ids: list[int] = field(default_factory=list)
    """What the encoder of an encoder-decoder reads; `prompt_ids` is then the token that every answer begins with."""

    ids: list[int] = field(default_factory=list)
    is_done: bool = False

    def take(self, token: int) -> None:
        """Go on by a token, or end."""
        if token in self.end_ids:
            self.is_done = True
            return
        self.ids.append(token)
        self.is_done = len(self.ids) >= self.room or self._is_stopped

    @property
    def penalty(self) -> float:
        """What the settings divide the logits of tokens by that the row holds; 1 for none."""
        return self.settings.repetition_penalty or 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether its next token is the one that the model gives the highest logit."""
        return not self.settings.is_drawn and self.penalty == 1.0

    @property
    def reach(self) -> int:
        """Tokens of prompt and longest answer."""
        return len(self.prompt_ids) + self.room

    @property
    def is_cut(self) -> bool:
        """Whether the context ended the answer: nothing else did, and its settings allow more."""
        return len(self.ids) == self.room < self.settings.max_new_tokens and not self._is_stopped

    @property
    def _is_stopped(self) -> bool:
        return self.stops is not None and self.stops(self.ids)

    @property
    def num_asked(self) -> int:
        """Tokens of what is asked."""
        return len(self.source_ids or self.prompt_ids)

    @property
    def last_id(self) -> int:
        """The token that the next one follows."""
        return self.ids[-1] if self.ids else self.prompt_ids[-1]

    def tail(self, count: int) -> tuple[int, ...]:
        """Return the last `count` tokens, or all where there are fewer."""
        own = self.ids[-count:]
        return tuple(own) if len(own) == count else (*self.prompt_ids[-count:], *own)[-count:]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.ids)


class Highest(NamedTuple):
    """The highest logit of each row, and the first token that has it."""

    logits: Tensor
    tokens: Tensor

    def to_list(self) -> list[int]:
        """Return the tokens of rows [B].

        Raises:
            BrokenRunError: A row's highest logit isn't finite, so nothing can be chosen.
        """
        if not self.logits.isfinite().all():
            raise BrokenRunError(
                "the model's logits are not finite, so no next token can be chosen. Check its weights."
            )
        tokens: list[int] = self.tokens.tolist()
        return tokens


def choose_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Return a token for each row of logits [B, V], by the row's own settings.

    Raises:
        BrokenRunError: A row's logits hold no finite maximum, so nothing can be chosen.
    """
    if any(row.penalty != 1.0 for row in rows):
        logits = logits.to(torch.float32, copy=True)
        for number, row in enumerate(rows):
            if row.penalty != 1.0:
                penalise(logits[number], {*row.prompt_ids, *row.ids}, row.penalty)
    tokens = find_highest(logits).to_list()
    for settings, numbers in _group_sampled(rows).items():
        chances = [_uniform(rows[number].key, len(rows[number].ids)) for number in numbers]
        drawn = _draw(logits[numbers].float(), settings, torch.tensor(chances, device=logits.device))
        for number, token in zip(numbers, drawn.tolist(), strict=True):
            tokens[number] = token
    return tokens


def find_highest(logits: Tensor) -> Highest:
    """Return the highest of each row of logits [B, V], the first of equals, as `logits.max(-1)` does.

    On a CPU torch finds a maximum without its place ten times as fast, so it is looked for in parts first.
    """
    num_parts = logits.shape[1] // _PART
    if logits.device.type != "cpu" or num_parts < 2:
        return Highest(*logits.max(-1))
    highest = logits[:, : num_parts * _PART].view(-1, num_parts, _PART).amax(-1)  # [B, parts]
    if rest := logits.shape[1] % _PART:
        highest = torch.cat((highest, logits[:, -rest:].amax(-1, keepdim=True)), dim=1)
    peaks, part = highest.max(-1)
    start = (part * _PART).clamp_(max=logits.shape[1] - _PART)
    near = logits.gather(1, start[:, None] + torch.arange(_PART))
    return Highest(peaks, start + near.argmax(-1))


def penalise(logits: Tensor, held: Collection[int], penalty: float) -> None:
    """Divide the positive logits [V] of the tokens that a row holds, and multiply the negative (CTRL, Keskar 2019)."""
    seen = torch.tensor(sorted(held), device=logits.device)
    values = logits[seen]
    logits[seen] = torch.where(values < 0, values * penalty, values / penalty)


def _group_sampled(rows: Sequence[Row]) -> dict[tuple[float, int | None, float | None], list[int]]:
    """Return the numbers of rows that draw, by the settings that shape what they draw from."""
    groups = defaultdict(list)
    for number, row in enumerate(rows):
        if row.settings.is_drawn:
            groups[row.settings.temperature, row.settings.top_k, row.settings.top_p].append(number)
    return groups


def _uniform(key: bytes, position: int) -> float:
    """Return a number in [0, 1) that only `key` and `position` decide."""
    digest = blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draw(logits: Tensor, shape: tuple[float, int | None, float | None], chances: Tensor) -> Tensor:
    """Return a token [B] of each row of logits [B, V]: where the summed probabilities pass its chance [B]."""
    temperature, top_k, top_p = shape
    candidates = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, candidates = logits.topk(top_k)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None and top_p < 1.0:
        probabilities, kept = _nucleus(probabilities, top_p)
        candidates = kept if candidates is None else candidates.gather(1, kept)
    sums = probabilities.cumsum(-1)  # [B, C]
    whole = sums[:, -1:].contiguous()
    chosen = torch.searchsorted(sums, chances.to(sums.dtype)[:, None] * whole, right=True)
    # Rounding may lift a chance to the whole sum: none passes that, and the last candidate that can come reaches it.
    chosen = torch.minimum(chosen, torch.searchsorted(sums, whole))
    return (chosen if candidates is None else candidates.gather(1, chosen))[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest candidates that together reach `top_p`, their probabilities [B, C] (else 0) and ids."""
    count = min(_NUCLEUS, probabilities.shape[1])
    highest, ids = probabilities.topk(count)
    if count < probabilities.shape[1] and (highest.sum(-1) < top_p).any():
        highest, ids = probabilities.sort(descending=True)
    before = highest.cumsum(-1) - highest
    return highest.masked_fill(before >= top_p, 0.0), ids
