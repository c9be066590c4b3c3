"""Labels as rows have them: which ones there are, and that they are told apart as they were meant."""

from __future__ import annotations

import pytest

from smolora.data.labels import learn_labels
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.task_rows import find_label_problem
from smolora.errors import DataError

FMT = PromptFormat(kind="classification", columns={"text": "text", "label": "label"})


def learn(*labels):
    return learn_labels(
        [Row({"text": "a", "label": label}, "a", n) for n, label in enumerate(labels, start=1)], [], FMT
    )


@pytest.mark.parametrize(
    ("labels", "learned"), [((True, False), ("false", "true")), ((1, "0", 1), ("0", "1")), (("half-true", "true"),) * 2]
)
def test_labels_are_learned_by_their_names(labels, learned):
    assert learn(*labels) == learned


@pytest.mark.parametrize("value", [-1, "-1", " -1 ", -100, "-100"])
def test_a_number_that_stands_for_no_label_is_none_as_a_text_too(value):
    assert f"it holds {str(value).strip()}, which stands for no label" in find_label_problem(value)


@pytest.mark.parametrize("value", [0, "0", "1", "-10", True])
def test_other_numbers_are_labels(value):
    assert find_label_problem(value) is None


@pytest.mark.parametrize("odd", [True, "false"])
def test_true_beside_numbers_is_no_third_label(odd):
    with pytest.raises(
        DataError, match=r"true or false, as in a:3, with numbers. Found are: 0, 1, (true|false)\. Write"
    ):
        learn(0, 1, odd)
