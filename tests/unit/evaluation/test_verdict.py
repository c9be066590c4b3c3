"""From measurements to a word."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from smolora.adapters.movement import Movement
from smolora.data.overlap import Overlap
from smolora.evaluation.comparison import Comparison
from smolora.evaluation.paired_loss import PromptUse
from smolora.evaluation.verdict import Evidence, judge

SURE, UNSURE = PromptUse(1.0, 2.0, 0.9, 1.1, 40), PromptUse(1.0, 1.01, -0.1, 0.1, 40)
A_TRACE = PromptUse(1.661, 1.6651, 0.001, 0.007, 320)


def loss(tuned, spread=0.1, base=2.0):
    low, high = tuned - base - spread, tuned - base + spread
    return Comparison(
        name="loss", base=base, tuned=tuned, low=low, high=high, num_rows=40, variant="nats", version="smolora"
    )


def score(difference, num_rows=40):
    bounds = {"low": difference - 0.1, "high": difference + 0.1}
    return Comparison(
        name="rougeL", base=0.5, tuned=0.5 + difference, num_rows=num_rows, variant="F", version="1", **bounds
    )


def gather(loss, *scores, use=SURE, moved=0.1, seen=0, prompts=None):
    movement = Movement(moved, {"layers.0.q_proj": moved})
    return Evidence(
        loss=loss,
        prompt_use=use,
        scores=scores,
        movement=movement,
        overlap=Overlap(40, seen, prompts),
        skipped=("this",),
    )


@pytest.mark.parametrize(
    ("evidence", "word"),
    [
        (gather(loss(1.0)), "learned"),
        (gather(loss(1.0), score(0.3)), "learned"),
        (gather(loss(1.0), use=None), "learned"),
        (gather(loss(1.0), score(-0.3)), "no change"),
        (gather(loss(1.0), score(-0.3, num_rows=5)), "learned"),
        (gather(loss(1.0), use=UNSURE), "no change"),
        (gather(loss(1.0), use=A_TRACE), "no change"),
        (gather(loss(1.95)), "no change"),
        (gather(loss(1.99, spread=0.001)), "no change"),
        (gather(loss(1.95), score(0.3)), "learned"),
        (gather(loss(3.0)), "worse"),
        (gather(loss(1.95), score(-0.3)), "worse"),
        (gather(loss(1.0), moved=50.0), "worse"),
        (gather(loss(math.nan)), "broken"),
        (gather(loss(math.inf)), "broken"),
        (gather(loss(1.0), moved=0.0), "broken"),
        (gather(loss(1.0), moved=math.nan), "broken"),
    ],
)
def test_each_kind_of_run_has_its_word(evidence, word):
    assert judge(evidence).word == word


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (
            PromptUse(0.4743, 0.4865, -0.0017, 0.035, 4),
            "4 held-out rows are too few to tell whether the answers depend",
        ),
        (PromptUse(0.5, 0.52, None, None, 1), "1 held-out row is too few to tell whether the answers depend"),
        (PromptUse(1.0, 1.001, -0.1, 0.1, 40), "Either 40 held-out rows are too few to tell (hold out more"),
        (A_TRACE, "an answer is as likely as after its own (to 1 %): the form of the answers was learned"),
    ],
)
def test_that_rows_are_too_few_is_told_from_a_form_that_was_learned(use, reason):
    found = judge(gather(loss(1.0), use=use)).reason
    assert reason in found
    assert ("paired rightly" in found) != ("whether the answers depend" in found)


@pytest.mark.parametrize(
    ("num_rows", "line"),
    [
        (1, "only 1 held-out row, so there are no intervals (hold out more"),
        (9, "only 9 held-out rows, so the intervals are wide (hold out more"),
        (10, None),
    ],
)
def test_what_few_held_out_rows_do_to_the_intervals_is_said(num_rows, line):
    found = [said for said in judge(gather(replace(loss(1.0), num_rows=num_rows))).lines if "intervals" in said]
    assert len(found) == (line is not None)
    assert all(said.startswith(str(line)) for said in found)


def test_held_out_rows_that_were_trained_on_are_named():
    assert "20 of 40 held-out rows were trained on" in judge(gather(loss(1.0), seen=20)).reason


def test_prompts_that_were_trained_on_with_other_answers_are_named():
    verdict = judge(gather(loss(1.0), seen=2, prompts=32))
    assert "the prompts of 30 of 40 held-out rows were trained on, with other answers" in verdict.reason
    assert any("the prompts of 30 of 40 held-out rows" in line for line in verdict.lines)


def test_a_few_seen_prompts_are_left_unsaid():
    verdict = judge(gather(loss(1.0), prompts=3))
    assert "prompts" not in verdict.reason and not any("were trained on" in line for line in verdict.lines)


def test_the_findings_say_what_was_skipped_and_are_valid_json():
    evidence = gather(loss(math.nan), score(0.3))
    assert judge(evidence).lines[-1] == "skipped: this"
    assert json.loads(json.dumps(evidence.to_dict(), allow_nan=False))["loss"]["tuned"] is None
