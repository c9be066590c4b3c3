"""The next token: greedy, drawn in proportion, cut by top-k and top-p, and never by what stands beside it."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from smolora.errors import BrokenRunError
from smolora.generation.choosing import Row, choose_tokens
from smolora.generation.sampling import SamplingSettings

V = 700  # More than the candidates that a nucleus sorts first.


def _logits(num_rows, *, scale=2.0):
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(0)) * scale


def _rows(num_rows, **settings):
    return [Row([1, 2], 9, SamplingSettings(**settings), key=number.to_bytes(4, "big")) for number in range(num_rows)]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_temperature_that_no_number_survives_takes_the_likeliest_token(settings):
    logits = _logits(5, scale=30.0)
    assert choose_tokens(logits, _rows(5, temperature=1e-38, **settings)) == logits.argmax(-1).tolist()


def test_zero_temperature_takes_the_likeliest_token():
    logits = _logits(5)
    assert choose_tokens(logits, _rows(5, temperature=0.0)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [300, 512, V])
def test_of_equal_logits_the_first_is_the_likeliest_wherever_they_stand(vocab_size):
    logits = torch.zeros(3, 2, vocab_size)
    for row, places in enumerate([(vocab_size - 1,), (1, 298), (0, 255, 256)]):
        logits[row, 1, list(places)] = 1.0
    # The logits of one place among drafts lie with gaps.
    assert choose_tokens(logits[:, 1], _rows(3, temperature=0.0)) == [vocab_size - 1, 1, 0]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.7}]
)
def test_tokens_are_drawn_in_proportion_to_their_probabilities(settings):
    num_rows = 20_000
    logits = _logits(1, scale=3.0)
    drawn = torch.tensor(choose_tokens(logits.expand(num_rows, -1), _rows(num_rows, **settings)))
    counts = torch.bincount(drawn, minlength=V) / num_rows
    expected = logits[0] / settings.get("temperature", 1.0)
    if top_k := settings.get("top_k"):
        expected = expected.masked_fill(expected < expected.topk(top_k).values[-1], -torch.inf)
    if top_p := settings.get("top_p"):
        expected = TopPLogitsWarper(top_p)(None, expected[None])[0]
    probabilities = expected.softmax(-1)
    assert counts[probabilities == 0].sum() == 0
    # Four standard deviations of a share of 20,000 draws.
    assert (counts - probabilities).abs().max() < 4 * 0.5 / num_rows**0.5


@pytest.mark.parametrize(
    ("settings", "last"), [({}, 3), ({"top_k": 9}, 3), ({"top_p": 0.6}, 1), ({"top_k": 9, "top_p": 0.6}, 1)]
)
def test_a_chance_that_rounds_to_1_draws_the_last_token_that_may_come(settings, last):
    """One of 2**25 does; this key was looked for."""
    row = Row([1, 2], 9, SamplingSettings(**settings), key=(30_092_842).to_bytes(4, "big"))
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1] + [0.0] * (V - 4))
    assert choose_tokens(probabilities.log().clamp(min=-1e4)[None], [row]) == [last]


def test_a_nucleus_wider_than_the_first_candidates_is_found():
    drawn = choose_tokens(torch.zeros(4000, V), _rows(4000, top_p=0.9))
    assert 0.8 * V < len(set(drawn)) <= 0.9 * V + 1


def test_a_row_draws_the_same_alone_and_among_others():
    logits = _logits(6)
    together = choose_tokens(logits, _rows(6))
    assert together == [choose_tokens(logits[n : n + 1], _rows(6)[n : n + 1])[0] for n in range(6)]


def test_each_position_of_a_row_draws_anew():
    [row] = _rows(1)
    drawn = []
    for _ in range(9):
        drawn += choose_tokens(torch.zeros(1, V), [row])
        row.take(drawn[-1])
    assert len(set(drawn)) > 5
    assert row.is_done


def test_a_repetition_penalty_is_that_of_transformers():
    logits, [row] = _logits(1), _rows(1, temperature=0.0, repetition_penalty=50.0)
    row.prompt_ids = logits[0].topk(5).indices.tolist()
    row.take(int(logits[0].argmin()))
    ids = torch.tensor([row.prompt_ids + row.ids])
    before = logits.clone()
    expected = RepetitionPenaltyLogitsProcessor(50.0)(ids, logits.clone()).argmax(-1).tolist()
    assert choose_tokens(logits, [row]) == expected != logits.argmax(-1).tolist()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = _logits(3)
    logits[1, 5] = bad
    with pytest.raises(BrokenRunError, match="not finite"):
        choose_tokens(logits, _rows(3, temperature=temperature))
