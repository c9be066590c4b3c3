"""Drafts: guessed from what was said before, never trusted."""

from __future__ import annotations

import random

import pytest
import torch

from smolora.generation import decoding, drafts
from smolora.generation.choosing import Row
from smolora.generation.decoding import decode
from smolora.generation.drafts import Drafts
from smolora.generation.sampling import SamplingSettings
from tests.tiny import VOCAB_SIZE, random_input_ids, tiny_model

GREEDY = SamplingSettings(temperature=0.0)


def _row(ids, *, room=20, end_ids=()):
    return Row(list(ids), room, GREEDY, end_ids=frozenset(end_ids))


def _trusting(*prompts):
    """Return drafts that have read `prompts` and whose guesses have held."""
    found = Drafts()
    for prompt in prompts:
        found.read(prompt)
    for _ in range(200):
        repeating = _row([90, 91, 92])
        found.follow(repeating, 93)
    return found


def test_what_followed_the_last_tokens_before_is_drafted():
    found = _trusting([1, 2, 3, 4, 5, 6], [7, 7, 7, 7])
    rows = [_row([9, 2, 3, 4]), _row([7, 7, 7]), _row([3, 2, 1]), _row([1])]
    assert [found.draft([row]) for row in rows] == [[[5, 6]], [[7] * 7], [[]], [[]]]
    # A draft for one row is one for all to read.
    assert found.draft(rows + 28 * [_row([1])]) == [[]] * 32


def test_the_latest_continuation_counts():
    found = _trusting([1, 2, 3, 4], [1, 2, 3, 5])
    assert found.draft([_row([1, 2, 3])]) == [[5]]


def test_a_row_s_own_answer_is_read_on():
    found, row = _trusting(), _row([1, 2], room=9)
    for token in (3, 4, 1, 2, 3):
        found.follow(row, token)
        row.take(token)
    assert found.draft([row]) == [[4, 1, 2]]  # The fourth token to come is chosen, and none is read behind it.


def test_nothing_is_read_behind_an_end():
    found = _trusting([1, 2, 3, 4, 5, 6])
    assert found.draft([_row([1, 2, 3], end_ids=[5])]) == [[4]]


def test_guesses_that_fail_are_read_no_longer():
    found = _trusting([1, 2, 3, 4, 5, 6])
    for number in range(300):
        found.read([10, 11, 12, 13])
        found.follow(_row([10, 11, 12]), 14 + number % 9)
    assert found.draft([_row([1, 2, 3])]) == [[]]


def test_many_rows_read_few_drafts_each():
    found = _trusting([7, 7, 7, 7])
    assert {len(draft) for draft in found.draft([_row([7, 7, 7])] * 32)} == {7}
    assert {len(draft) for draft in found.draft([_row([7, 7, 7])] * 64)} == {3}
    assert found.draft([_row([7, 7, 7])] * 300) == [[]] * 300


def test_what_was_said_long_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(drafts, "_MOST_ENTRIES", 4)
    found = _trusting([1, 2, 3, 4], [5, 6, 7, 8])
    found.read([1, 2, 3, 4])
    found.read([20, 21, 22, 23, 24, 25])
    assert found.draft([_row([5, 6, 7])]) == [[]]
    assert found.draft([_row([1, 2, 3])]) == [[4]]


class _Anything(Drafts):
    """Drafts of any tokens and any length, now and then the right ones."""

    def __init__(self):
        super().__init__()
        self._random = random.Random(0)
        self.num_drafted = 0

    def draft(self, rows):
        found = super().draft(rows)
        for number, row in enumerate(rows):
            allowed = row.room - len(row.ids) - 1
            if self._random.random() < 0.7:
                drawn = [self._random.randrange(VOCAB_SIZE) for _ in range(self._random.randrange(5))]
                place = self._random.randrange(1 + len(found[number]))
                found[number] = (found[number][:place] + drawn)[:allowed]
            self.num_drafted += len(found[number])
        return found


class _Nothing(Drafts):
    def draft(self, rows):
        return [[] for _ in rows]


SETTINGS = {
    "greedy": GREEDY,
    "drawn": SamplingSettings(temperature=0.05),
    "wildly drawn": SamplingSettings(temperature=1.5, top_p=0.9),
    "penalised": SamplingSettings(temperature=0.0, repetition_penalty=1.3),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "afmoe"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_answers_are_the_same_whatever_is_drafted(monkeypatch, family, settings):
    model, made = tiny_model(family), []

    def answer(kind):
        monkeypatch.setattr(decoding, "Drafts", lambda: made.append(kind()) or made[-1])
        prompts = [random_input_ids(length, seed=length)[0].tolist() for length in (9, 1, 17, 5, 2, 23)]
        rows = [
            Row(ids, 6 + 5 * number, settings, frozenset({number}), key=bytes([number]), stops=_ends_at_eleven)
            for number, ids in enumerate(prompts)
        ]
        num_steps = sum(1 for _ in decode(model, rows, num_slots=3))
        return [row.ids for row in rows], num_steps

    expected, plain_steps = answer(_Nothing)
    assert answer(_Anything)[0] == expected
    assert made[-1].num_drafted > 50
    found, num_steps = answer(Drafts)
    assert found == expected
    assert num_steps <= plain_steps


def _ends_at_eleven(ids):
    return ids[-1:] == [11]


def test_rows_that_repeat_take_few_steps():
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # What comes next hangs on the last token alone, so that rows go round in circles.
    rows = [Row(random_input_ids(4, seed=seed)[0].tolist(), 60, GREEDY) for seed in range(4)]
    num_steps = sum(1 for _ in decode(model, rows, num_slots=4))
    assert all(len(row.ids) == 60 for row in rows)
    assert num_steps < 40
