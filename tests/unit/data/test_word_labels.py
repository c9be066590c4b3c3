"""Words and their labels become one target a word, where the word begins."""

from __future__ import annotations

import logging

import pytest

from smolora.config import DataConfig
from smolora.data.preprocessing import get_preprocessor
from smolora.data.prompts import PromptFormat, resolve_prompt_format
from smolora.data.task_rows import find_tags_problem
from smolora.data.word_labels import TokenClassificationPreprocessor, find_first_tokens
from smolora.errors import ConfigError, DataError
from tests.tiny import CLS_ID, SEP_ID, tiny_encoder_tokenizer, tiny_tokenizer

FORM = PromptFormat(kind="token_classification", columns={"tokens": "tokens", "tags": "tags"}, labels=("O", "X"))
ROWS = [
    {"tokens": ["The", "Eagle", "isn't", "in", "Zürich-West", "."], "tags": ["O", "X", "O", "O", "X", "O"]},
    {"tokens": ["riverside"], "tags": ["X"]},
]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_encoder_tokenizer()], ids=["plain", "template"])
def test_every_word_is_a_target_at_the_token_of_its_first_character(tokenizer):
    examples = TokenClassificationPreprocessor(FORM, tokenizer).encode(ROWS)
    for row, example in zip(ROWS, examples, strict=True):
        text = tokenizer(" ".join(row["tokens"]))
        starts = [len(" ".join([*row["tokens"][:number], ""])) for number in range(len(row["tokens"]))]
        assert example.is_target.nonzero()[0].tolist() == [text.char_to_token(start) for start in starts]
        assert [FORM.labels[label] for label in example.labels] == row["tags"]


def test_special_tokens_are_no_targets():
    example = TokenClassificationPreprocessor(FORM, tiny_encoder_tokenizer()).encode(ROWS)[0]
    assert (example.input_ids[0], example.input_ids[-1]) == (CLS_ID, SEP_ID)
    assert not example.is_target[[0, -1]].any()


def test_a_word_that_spells_a_special_token_stays_a_word():
    row = {"tokens": ["[SEP]", "a"], "tags": ["X", "O"]}
    example = TokenClassificationPreprocessor(FORM, tiny_encoder_tokenizer()).encode([row])[0]
    assert example.input_ids.tolist().count(SEP_ID) == 1 and example.labels.tolist() == [1, 0]


def test_a_row_that_is_cut_keeps_its_template_and_the_words_whose_first_token_is_left():
    preprocessor = TokenClassificationPreprocessor(FORM, tiny_encoder_tokenizer())
    (whole,) = preprocessor.encode(ROWS[:1])
    third = whole.is_target.nonzero()[0][2]
    (cut,) = preprocessor.cut(whole, ROWS[0], int(third) + 2)
    assert len(cut) == third + 2 and cut.input_ids[-1] == SEP_ID
    assert cut.labels.tolist() == [0, 1, 0]


def test_a_word_without_a_token_is_no_target_and_is_counted(caplog):
    row = {"tokens": ["a", "", "b"], "tags": ["O", "X", "O"]}
    with caplog.at_level(logging.WARNING):
        (example,) = TokenClassificationPreprocessor(FORM, tiny_tokenizer()).encode([row])
    assert example.labels.tolist() == [0, 0]
    assert "1 words have no token of their own" in caplog.text


def test_a_token_over_two_words_is_the_target_of_the_first():
    assert list(find_first_tokens(["ab", "cd", "e"], [(0, 5), (5, 7)])) == [0, None, 1]


def test_a_label_that_is_not_learned_is_refused():
    row = {"tokens": ["a"], "tags": ["Y"]}
    with pytest.raises(DataError, match="'Y' isn't learned"):
        TokenClassificationPreprocessor(FORM, tiny_tokenizer()).encode([row])


def test_the_preprocessor_is_found_by_its_task():
    found = get_preprocessor("token_classification", fmt=FORM, tokenizer=tiny_tokenizer())
    assert type(found) is TokenClassificationPreprocessor


@pytest.mark.parametrize("tags", ["tags", "ner_tags", "labels"])
def test_columns_are_recognised_by_their_usual_names(tags):
    form = resolve_prompt_format(["id", "Tokens", tags], DataConfig(), task="token_classification")
    assert form.columns == {"tokens": "Tokens", "tags": tags}


def test_words_are_not_cleaned_away_under_their_labels():
    with pytest.raises(ConfigError, match="data.clean"):
        resolve_prompt_format(["tokens", "tags"], DataConfig(clean=("lowercase",)), task="token_classification")


@pytest.mark.parametrize(
    ("words", "tags", "problem"),
    [
        (["a", "b"], ["O"], "2 words, but 1 label"),
        ("a b", ["O"], "a list of texts, found str"),
        (["a"], "O", "a list, found str"),
        (["a"], [-100], "-100, which stands for no label"),
        (["a"], [None], "no label"),
    ],
)
def test_rows_that_cannot_be_learned_from_have_a_reason(words, tags, problem):
    assert problem in find_tags_problem(words, tags)
