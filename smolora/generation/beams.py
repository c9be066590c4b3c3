"""Beam search, by transformers' own `generate`: the likeliest whole answers that a few beginnings at a time lead to.

Its length penalty and early stopping are the model's generation_config.json's, else transformers' defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from smolora.errors import BrokenRunError
from smolora.generation.choosing import Row, penalise
from smolora.generation.decoding import Switch, in_eval_mode, in_use, keep_as_it_is
from smolora.generation.fallback import build_settings, pad_prompts, quiet_positions
from smolora.models.bundle import read_config


def search_rows(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    use_cache: bool = True,
    switch: Switch = keep_as_it_is,
) -> Iterator[None]:
    """Answer `rows`, whose settings have beams, `batch_size` beams at a time; yield after each batch.

    Without a cache all of a beam is read again for each token.

    Raises:
        BrokenRunError: The model's logits aren't finite.
    """
    alike = sorted(rows, key=lambda row: (*_shape(row), row.num_asked))
    for (num_beams, *_), group in groupby(alike, key=_shape):
        waiting = list(group)
        at_once = max(1, batch_size // num_beams)
        for start in range(0, len(waiting), at_once):
            with in_use(model, switch):
                _search(model, waiting[start : start + at_once], use_cache=use_cache)
            yield


def _shape(row: Row) -> tuple[int, int, list[int]]:
    """Return what rows of one batch have in common."""
    return row.settings.num_beams, row.room, sorted(row.end_ids)


def _search(model: nn.Module, rows: Sequence[Row], *, use_cache: bool) -> None:
    inputs = pad_prompts(rows, next(model.parameters()).device)
    width = max(len(row.prompt_ids) for row in rows)

    def are_done(input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        return torch.tensor([_is_stopped(*one) for one in _pair(input_ids, rows, width)], device=input_ids.device)

    with quiet_positions():
        found: Tensor = model.generate(  # type: ignore[operator]
            **inputs,
            **build_settings(max_new_tokens=rows[0].room, num_beams=rows[0].settings.num_beams),
            use_cache=use_cache,
            eos_token_id=sorted(rows[0].end_ids) or None,
            logits_processor=LogitsProcessorList([_RowPenalty(rows, width)]),
            stopping_criteria=StoppingCriteriaList([are_done]),
        )
    for row, ids in zip(rows, found[:, width:].tolist(), strict=True):
        for token in ids:  # What is past the end is padding, with an id that may be any token's.
            if not row.is_done:
                row.take(token)


def _pair(input_ids: Tensor, rows: Sequence[Row], width: int) -> Iterator[tuple[Row, list[int]]]:
    """Yield each beginning's row, and its tokens after the prompt."""
    num_each = len(input_ids) // len(rows)
    for number, ids in enumerate(input_ids[:, width:].tolist()):
        yield rows[number // num_each], ids


def _is_stopped(row: Row, ids: list[int]) -> bool:
    return row.stops is not None and row.stops(ids)


def is_cache_reordered(model: nn.Module) -> bool:
    """Whether what `model` keeps of its texts goes with them where beams change places.

    Some states can't, and others stay where they are without a word, so that a beam goes on from another one's text.
    Two searches of three tokens. Of fewer than four words, with which it can't ask, it says no.
    """
    if read_config(model).get_text_config().vocab_size < _TwoBeams.NUM_WORDS:
        return False
    with in_eval_mode(model):
        try:
            changed, unchanged = _search_two(model, swap=True), _search_two(model, swap=False)
        except ValueError:  # So transformers says that a cache has no order to change.
            return False
    # The same batch in the same order: what is left is no more than rounding, whatever the model computes in.
    return bool((changed - unchanged).abs().max() <= (unchanged[0] - unchanged[1]).abs().max() / 10)


def _search_two(model: nn.Module, *, swap: bool) -> Tensor:
    """Return the probabilities [2, V] after two beams whose texts end alike, which changed places before or didn't."""
    watch = _TwoBeams(swap=swap)
    settings = {**build_settings(max_new_tokens=3, num_beams=2), "eos_token_id": _TwoBeams.other}
    start = torch.tensor([[_TwoBeams.last]], device=next(model.parameters()).device)
    model.generate(  # type: ignore[operator]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        logits_processor=LogitsProcessorList([watch]),
        **settings,
    )
    return watch.seen


class _TwoBeams(LogitsProcessor):  # type: ignore[misc]
    """Leads a search of two beams: one token each, then the same one, with which `winner` becomes the better beam."""

    NUM_WORDS = 4
    winner, loser, last, other = range(NUM_WORDS)
    seen: Tensor
    """The probabilities after that."""

    def __init__(self, *, swap: bool) -> None:
        self._first = (self.loser, self.winner) if swap else (self.winner, self.loser)
        self._num_steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log-probabilities [2, V] that leave no other choice."""
        self._num_steps += 1
        led = torch.full_like(scores, -1e9)
        if self._num_steps == 1:
            led[:, self._first[0]], led[:, self._first[1]] = 0.0, -1.0
        elif self._num_steps == 2:
            led[:, self.last] = torch.where(input_ids[:, -1] == self.winner, 0.0, -5.0)
        else:
            self.seen = scores.exp()
        return led


class _RowPenalty(LogitsProcessor):  # type: ignore[misc]
    """Each row's repetition penalty; that of transformers would punish the padding's token, too."""

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        self._rows = rows
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log-probabilities [beginnings, V] with those of tokens that a beginning holds made smaller."""
        if scores.isnan().any():
            raise BrokenRunError(
                "the model's logits are not finite, so no answer can be looked for. Check its weights."
            )
        for own, (row, ids) in zip(scores, _pair(input_ids, self._rows, self._width), strict=True):
            if row.penalty != 1.0:
                penalise(own, {*row.prompt_ids, *ids}, row.penalty)
        return scores
