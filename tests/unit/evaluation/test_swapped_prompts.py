"""The answer to a question after another question about the same context, as encoding it anew gives it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from smolora.data.prompts import PromptFormat
from smolora.data.spans import QuestionAnsweringPreprocessor
from smolora.data.token_dataset import TokenDataset
from smolora.evaluation.comparison import Budget
from smolora.evaluation.paired_loss import compare_losses
from smolora.evaluation.swapped_prompts import PromptSwapper
from smolora.models.loading import load_model
from tests.tiny import save_tiny_encoder, tiny_encoder_tokenizer

CONTEXT = "the Eagle sat on the log."
OTHER = "the Mill sat on the mat."


def make_row(question, context, answer):
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


def encode(*rows):
    form = PromptFormat(kind="qa", columns={role: role for role in ("context", "question", "answers")})
    return QuestionAnsweringPreprocessor(form, tiny_encoder_tokenizer()).encode(rows)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_model(save_tiny_encoder("bert", tmp_path_factory.mktemp("qa") / "base"), task="qa")


def test_an_answer_stands_where_it_was_in_the_context_of_another_question(bundle):
    rows = [
        make_row("who?", CONTEXT, "Eagle"),
        make_row("who?", OTHER, "Mill"),
        make_row("where is it?", CONTEXT, "log"),
    ]
    swapper = PromptSwapper(encode(*rows), bundle)
    for index, question in ((0, "where is it?"), (2, "who?")):
        (expected,) = encode({**rows[index], "question": question})
        found = swapper.swap(index)
        for name in ("input_ids", "is_target", "labels", "token_type_ids"):
            assert np.array_equal(vars(found)[name], vars(expected)[name])
    assert swapper.swap(1) is None  # Nothing else is asked about its context.


@pytest.mark.parametrize(
    "other",
    [
        make_row("who?", CONTEXT, "log"),
        make_row("where is it?", CONTEXT, "Eagle"),
        make_row("where?" * 20, CONTEXT, "log"),
    ],
    ids=["the same question", "the same answer", "no room"],
)
def test_a_question_of_no_use_is_not_taken(bundle, other):
    assert PromptSwapper(encode(make_row("who?", CONTEXT, "Eagle"), other), bundle).swap(0) is None


def test_no_answer_has_no_mate_and_is_one(bundle):
    rows = encode(make_row("who?", CONTEXT, "Eagle"), make_row("what for?", CONTEXT, None))
    swapper = PromptSwapper(rows, bundle)
    assert swapper.swap(0) is not None and swapper.swap(1) is None


@pytest.mark.parametrize(("num_contexts", "num_swapped"), [(7, None), (8, 16)])
def test_other_questions_count_from_16_answers_on(bundle, num_contexts, num_swapped):
    contexts = [f"{CONTEXT} {number}" for number in range(num_contexts)]
    rows = [make_row(*asked) for c in contexts for asked in (("who?", c, "Eagle"), ("where?", c, "log"))]
    _, use = compare_losses(bundle, TokenDataset(encode(*rows)), before=lambda _: nullcontext(), budget=Budget(60.0))
    assert (use.num_rows if use else None) == num_swapped
    assert use is None or (use.is_of_questions and use.own != use.other)
