"""Base and tuned model on the same rows: losses and answers, and what happens when the time is up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.toggling import disabled_adapter
from smolora.config import LoRAConfig
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.evaluation import paired_answers
from smolora.evaluation.comparison import Budget
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.evaluation.paired_answers import compare_answers
from smolora.evaluation.paired_loss import compare_losses
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from tests.tiny import tiny_bundle

PLENTY, NONE = 60.0, -1.0
SHORT = SamplingSettings(temperature=0.0, max_new_tokens=8)
LONG = SHORT.replace(max_new_tokens=30)


@pytest.fixture(scope="module")
def tuned(bundle):
    """The base of the session, opened anew, with an adapter that does something."""
    base = replace(load_model(bundle.source), prompt_format=bundle.prompt_format)
    adapted = attach_adapter(base, LoRAConfig(lora_dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return adapted


def dataset(count=100):
    """Prompts of two tokens, answers of three."""
    return TokenDataset([build_example([1 + n % 7, 9, 20 + n % 5, 30, 0], [(2, 5)]) for n in range(count)])


def test_the_base_of_a_pair_is_the_plain_base(bundle, tuned):
    rows = dataset(20)
    loss, _ = compare_losses(tuned, rows, budget=Budget(PLENTY))
    for name, model in (("base", bundle), ("tuned", tuned)):
        measured = LikelihoodScorer(model).measure_examples(list(rows))
        mean = sum(one.loss_sum for one in measured) / sum(one.num_tokens for one in measured)
        assert vars(loss)[name] == pytest.approx(mean, rel=1e-5)
    assert loss.low < loss.difference < loss.high


def test_an_answer_is_measured_after_the_prompt_of_a_row_with_another_answer(tuned):
    rows = dataset(20)
    _, use = compare_losses(tuned, rows, budget=Budget(PLENTY))
    assert use.num_rows == 20
    assert use.own != use.other


def test_one_answer_after_another_prompt_is_too_few_for_an_interval(tuned):
    alike = [build_example([1 + n, 9, 20, 30, 31, 0], [(2, 6)]) for n in range(20)]
    long = build_example([*[9] * (tuned.context - 2), 40, 0], [(tuned.context - 2, tuned.context)])
    rows = TokenDataset([*alike, long])  # Its prompt leaves no room for their answer.
    _, use = compare_losses(tuned, rows, budget=Budget(PLENTY))
    assert (use.num_rows, use.low, use.is_sure) == (1, None, False)


def test_answers_that_are_all_the_same_have_no_other_prompt(tuned):
    same = TokenDataset([build_example([1 + n, 9, 30, 0], [(2, 4)]) for n in range(20)])
    assert compare_losses(tuned, same, budget=Budget(PLENTY))[1] is None


@pytest.mark.parametrize("batch_size", [3, 8, 32])
def test_without_time_16_rows_are_measured_in_whole_batches(tuned, batch_size):
    loss, _ = compare_losses(tuned, dataset(), budget=Budget(NONE), batch_size=batch_size)
    assert loss.num_rows == {3: 18, 8: 16, 32: 32}[batch_size]


class CountingBudget(Budget):
    """Time that passes by looks at it, a second each, so that every round takes one."""

    looks = 0

    @property
    def spent(self):
        self.looks += 1
        return float(self.looks)


@pytest.mark.parametrize(("seconds", "num_rows"), [(3.4, 16), (3.5, 24), (4.0, 32)])
def test_as_many_batches_are_begun_as_there_is_time_to_end(tuned, seconds, num_rows):
    loss, _ = compare_losses(tuned, dataset(), budget=CountingBudget(seconds))
    assert loss.num_rows == num_rows


def test_rows_past_the_context_are_measured_as_far_as_they_go(tuned):
    long = TokenDataset([build_example([*np.arange(1, 70)], [(60, 69)]) for _ in range(3)])
    loss, use = compare_losses(tuned, long, budget=Budget(PLENTY))
    assert np.isfinite(loss.tuned)
    assert use is None


def test_answers_are_scored_in_pairs(tuned, rows):
    found = compare_answers(tuned, rows, ("rouge", "exact_match"), SHORT, budget=Budget(PLENTY))
    assert found.num_rows == 20
    assert not found.skipped
    assert found.reached == 1
    assert [score.name for score in found.scores] == ["rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match"]
    assert len(found.samples) == 5


def test_a_model_against_itself_differs_by_nothing(bundle, rows):
    found = compare_answers(bundle, rows, ("exact_match",), SHORT, budget=Budget(PLENTY))
    assert (found.scores[0].low, found.scores[0].high, found.scores[0].verdict) == (0.0, 0.0, 0)


def test_without_time_no_answer_is_asked_and_that_is_said(tuned, rows):
    found = compare_answers(tuned, rows, ("exact_match",), SHORT, budget=Budget(NONE))
    said = "answers: there was no time for any; a larger evaluation.verdict_share gives more"
    assert (found.samples, found.skipped, found.reached) == ([], [said], 0)


NO_TIME_FOR_WHOLE_ONES = (
    "answers: there was no time for whole ones, so none is scored; where it was up those shown end in '...'; a larger "
    "evaluation.verdict_share gives more"
)


def test_with_little_time_the_samples_are_cut_and_not_scored(tuned, rows):
    found = compare_answers(tuned, rows, ("exact_match",), LONG, budget=CountingBudget(30.0))
    assert (found.scores, found.reached, found.num_rows) == ([], 0, 0)
    assert found.skipped == [NO_TIME_FOR_WHOLE_ONES]
    whole = compare_answers(tuned, rows, ("exact_match",), LONG, budget=Budget(PLENTY)).samples
    assert len(found.samples) == 5
    for cut, sample in zip(found.samples, whole, strict=True):
        for part, text in ((cut.base, sample.base), (cut.tuned, sample.tuned)):
            assert part.endswith("...")
            assert text.startswith(part.removesuffix("..."))
            assert 3 < len(part) < len(text) + 3


def test_answers_that_end_before_the_time_does_are_scored_however_long_they_might_be(tuned, rows):
    one = TextGenerator(tuned).generate([rows[0].prompt], settings=SHORT)[0][:1]
    endless = SHORT.replace(max_new_tokens=10**6, stop=(one,))
    found = compare_answers(tuned, rows[:1], ("exact_match",), endless, budget=CountingBudget(200.0))
    assert (found.num_rows, found.reached, found.skipped) == (1, 1, [])


def find_stop(bundle, tuned, prompt, *, of):
    """Return a letter that one of both says in its answer, the tuned model or the base, and the other one doesn't."""
    answers = {
        name: TextGenerator(model).generate(prompt, settings=LONG)[0]
        for name, model in (("base", bundle), ("tuned", tuned))
    }
    [other] = answers.keys() - {of}
    return next(letter for letter in answers[of] if letter not in answers[other])


@pytest.mark.parametrize("ends_early", ["base", "tuned"])
def test_answers_of_one_that_are_whole_beside_parts_are_not_scored(bundle, tuned, rows, ends_early):
    stopped = LONG.replace(stop=(find_stop(bundle, tuned, rows[1].prompt, of=ends_early),))
    found = compare_answers(tuned, rows[1:2], ("exact_match",), stopped, budget=CountingBudget(30.0))
    assert (found.num_rows, found.skipped) == (0, [NO_TIME_FOR_WHOLE_ONES])


class CountedBase:
    """The base of a pair, and how often it was asked."""

    times = 0

    def __call__(self, bundle):
        self.times += 1
        return disabled_adapter(bundle)


def fill_context(bundle):
    """Return a prompt that leaves room for a few tokens of an answer."""
    generator, full = TextGenerator(bundle), "the"
    while generator.count_tokens(f"{full} cat") < bundle.context - 3:
        full += " cat"
    return full


@pytest.mark.parametrize("ends_early", [None, "tuned"])
def test_a_later_part_that_is_not_whole_leaves_the_earlier_ones(bundle, tuned, rows, monkeypatch, ends_early):
    monkeypatch.setattr(paired_answers, "_AT_ONCE", 3)
    before, full, free = CountedBase(), fill_context(tuned), rows[1].prompt
    stop = (find_stop(bundle, tuned, free, of=ends_early),) if ends_early else ()
    asked = [BenchmarkRow(prompt, ("yes",)) for prompt in (full, full, full, free, free)]  # Two have room to answer.
    settings = LONG.replace(stop=stop)
    found = compare_answers(tuned, asked, ("exact_match",), settings, before=before, budget=CountingBudget(45.0))
    assert (found.num_rows, found.reached, len(found.samples)) == (3, 3 / 5, 3)
    assert found.skipped == ["answers to 2 of 5 held-out rows"]
    assert before.times == (2 if ends_early else 1)  # Beside parts of answers of the tuned model the base isn't asked.


def test_rows_that_there_is_no_time_for_are_not_begun(tuned, rows):
    budget = CountingBudget(90.0)
    found = compare_answers(tuned, rows, ("exact_match",), LONG, budget=budget)
    assert found.num_rows == 16
    assert budget.looks < 80


def test_rows_that_are_asked_at_a_time_become_more_where_there_is_time(tuned, rows, monkeypatch):
    monkeypatch.setattr(paired_answers, "_count_affordable_rows", lambda *_: 1)
    before = CountedBase()
    found = compare_answers(tuned, rows, ("exact_match",), SHORT, before=before, budget=Budget(PLENTY))
    assert (found.num_rows, before.times) == (20, 3)  # 1, 16 and 3.


def test_where_rows_are_answered_one_length_after_the_other_one_row_is_the_first(tmp_path):
    bundle = attach_adapter(tiny_bundle("rwkv", tmp_path), LoRAConfig(), seed=0)
    rows = [BenchmarkRow("the cat sat on the mat"[:count], ("yes",)) for count in (3, 8, 15)]
    long = SHORT.replace(max_new_tokens=200)
    samples = compare_answers(bundle, rows, ("exact_match",), long, budget=CountingBudget(60.0)).samples
    assert [(bool(sample.base), bool(sample.tuned)) for sample in samples] == [(True, True)]


def test_fewer_rows_at_the_end_are_begun_in_less_time(tuned, rows, monkeypatch):
    monkeypatch.setattr(paired_answers, "_AT_ONCE", 3)
    last = BenchmarkRow(fill_context(tuned), ("yes",))
    found = compare_answers(tuned, [*rows[1:4], last], ("exact_match",), LONG, budget=CountingBudget(120.0))
    assert found.num_rows == 4


def test_a_model_without_slots_ends_when_the_time_does(tmp_path, rows):
    bundle = attach_adapter(tiny_bundle("mamba", tmp_path), LoRAConfig(), seed=0)
    long = SHORT.replace(max_new_tokens=10**5)
    found = compare_answers(bundle, rows, ("exact_match",), long, budget=CountingBudget(30.0))
    assert (found.skipped, len(found.samples)) == ([NO_TIME_FOR_WHOLE_ONES], 5)


def test_that_a_model_has_no_slots_is_said_once(tmp_path, rows, caplog):
    bundle = attach_adapter(tiny_bundle("mamba", tmp_path), LoRAConfig(), seed=0)
    compare_answers(bundle, rows, ("exact_match",), SHORT, budget=Budget(PLENTY))
    assert sum("asked through transformers' generate" in message for message in caplog.messages) == 1


def test_no_row_to_ask_is_said(tuned):
    assert compare_answers(tuned, [], (), SHORT, budget=Budget(PLENTY)).skipped[0].startswith("answers: no held-out")


def test_messages_are_shown_by_their_roles(tuned):
    rows = [BenchmarkRow([{"role": "user", "content": "hello"}], ("yes",))]
    assert compare_answers(tuned, rows, (), SHORT, budget=Budget(PLENTY)).samples[0].prompt == "user: hello"
