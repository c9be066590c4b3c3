"""Base and tuned model on the same rows: losses and answers, and what happens when the time is up."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.evaluation.comparison import Budget
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.evaluation.paired_answers import compare_answers
from smolora.evaluation.paired_loss import compare_losses
from smolora.generation.sampling import SamplingSettings
from smolora.models.loading import load_model
from tests.tiny import tiny_bundle

PLENTY, NONE = 60.0, -1.0
SHORT = SamplingSettings(temperature=0.0, max_new_tokens=8)


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


def test_with_little_time_the_samples_are_cut_and_not_scored(tuned, rows):
    long = SHORT.replace(max_new_tokens=10**6)
    found = compare_answers(tuned, rows, ("exact_match",), long, budget=Budget(PLENTY))
    assert (found.scores, found.reached) == ([], 0)
    assert len(found.samples) == 5
    assert re.fullmatch(
        r"scores of answers: each was cut at \d+ tokens to save time, and .* up to 1000000; .*verdict_share.*",
        found.skipped[0],
    )


def test_that_a_model_has_no_slots_is_said_once(tmp_path, rows, caplog):
    bundle = attach_adapter(tiny_bundle("mamba", tmp_path), LoRAConfig(), seed=0)
    compare_answers(bundle, rows, ("exact_match",), SHORT, budget=Budget(PLENTY))
    assert sum("asked through transformers' generate" in message for message in caplog.messages) == 1


def test_no_row_to_ask_is_said(tuned):
    assert compare_answers(tuned, [], (), SHORT, budget=Budget(PLENTY)).skipped[0].startswith("answers: no held-out")


def test_messages_are_shown_by_their_roles(tuned):
    rows = [BenchmarkRow([{"role": "user", "content": "hello"}], ("yes",))]
    assert compare_answers(tuned, rows, (), SHORT, budget=Budget(PLENTY)).samples[0].prompt == "user: hello"
