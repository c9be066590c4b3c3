"""Labels of words: accuracy and macro F1 over words, and entities by seqeval's rules."""

from __future__ import annotations

import random

import pytest

from smolora.errors import DataError
from smolora.evaluation.head_rows import tag_words
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.word_metrics import is_entity_scheme, iter_entities

RIGHT = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
FOUND = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
LABELS = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER")


def score(found, right, *metrics, labels=LABELS):
    calculator = MetricsCalculator(metrics, resources=Resources(labels=labels))
    for answered, tags in zip(found, right, strict=True):
        row = tag_words(("word",) * len(tags.split()), tuple(tags.split()))
        calculator.add(Answer(answered, labels=tuple(answered.split(" "))), row)
    return {name: one.value for name, one in calculator.conclude().items()}


def test_the_example_of_seqeval_has_its_numbers():
    found = score(FOUND, RIGHT, "words", "entities", "word_majority")
    assert (found["entity_f1"], found["entity_precision"], found["entity_recall"]) == (0.5, 0.5, 0.5)
    assert found["accuracy"] == 0.8
    assert found["majority_accuracy"] == 0.5  # 5 of 10 words are O.


def test_macro_f1_is_the_mean_over_labels():
    # O: 4 right of 4 found and 5 given; B-MISC: 0 of 1 and 1; I-MISC: 2 of 3 and 2; B-PER, I-PER: all.
    expected = (8 / 9 + 0 + 4 / 5 + 1 + 1) / 5
    assert score(FOUND, RIGHT, "words")["f1"] == pytest.approx(expected)


def test_a_word_without_a_label_is_wrong_and_ends_an_entity():
    found = score(["B-PER  O"], ["B-PER I-PER O"], "words", "entities")
    assert found["accuracy"] == pytest.approx(2 / 3) and found["entity_f1"] == 0


def test_precision_and_recall_count_over_all_rows():
    found = score(["B-PER O B-PER", "O"], ["B-PER O O", "B-MISC"], "entities")
    assert (found["entity_precision"], found["entity_recall"], found["entity_f1"]) == (0.5, 0.5, 0.5)


def test_an_answer_to_another_number_of_words_is_refused():
    with pytest.raises(DataError, match="2 labels for the 3 words of its row: the file was changed"):
        score(["O O"], ["O O O"], "words")


def test_a_share_of_no_entity_is_0():
    assert set(score(["O"], ["O"], "entities").values()) == {0.0}


def iter_naively(labels):
    """As conlleval has it: a table of which pairs of prefixes end a chunk and which begin one."""
    ends = {"BB", "BS", "BO", "IB", "IS", "IO", *(f"E{x}" for x in "BIESO"), *(f"S{x}" for x in "BIESO")}
    begins = {"EE", "EI", "SE", "SI", "OE", "OI", *(f"{x}B" for x in "BIESO"), *(f"{x}S" for x in "BIESO")}
    before, kind_before, start = "O", "", 0
    for place, label in enumerate([*labels, "O"]):
        prefix, _, kind = label.partition("-")
        if before + prefix in ends or (before != "O" and kind_before != kind):
            yield start, place, kind_before
        if before + prefix in begins or (prefix != "O" and kind_before != kind):
            start = place
        before, kind_before = prefix, kind


@pytest.mark.parametrize("prefixes", ["BI", "BIES"])
def test_entities_are_those_of_conlleval(prefixes):
    drawn = random.Random(0)
    labels = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("A", "B"))]
    for _ in range(500):
        tags = [drawn.choice(labels) for _ in range(8)]
        assert list(iter_entities(tags)) == list(iter_naively(tags))


def test_labels_mark_entities_only_where_all_of_them_do():
    assert is_entity_scheme(LABELS) and is_entity_scheme(["I-LOC"])
    assert not any(
        is_entity_scheme(labels) for labels in (["O"], ["O", "B-A", "C-A"], ["B", "I", "O"], ["NOUN"], ["0"])
    )
