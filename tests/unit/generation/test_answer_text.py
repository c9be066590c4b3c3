"""Tokens become text piece by piece without tearing a character or losing a space."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolora.generation.answer_text import cut_at_stop, decode_answer, ends_at_stop, iter_pieces
from smolora.tokenizers.pretrained import load_tokenizer
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_a_character_of_several_tokens_comes_in_one_piece():
    ids = TOKENIZER("a€🙂b")["input_ids"]
    assert len(ids) == 9
    assert list(iter_pieces(TOKENIZER, [], ids)) == ["a", "€", "🙂", "b"]


@given(st.text(), st.text())
def test_pieces_spell_the_answer_behind_any_prompt(prompt, answer):
    prompt_ids, ids = (TOKENIZER(text, split_special_tokens=True)["input_ids"] for text in (prompt, answer))
    assert "".join(iter_pieces(TOKENIZER, prompt_ids, ids)) == answer
    assert decode_answer(TOKENIZER, prompt_ids, ids) == answer


@pytest.mark.parametrize("unit", ["a€🙂b ", "日本語", "\n\tx  y"])
def test_a_long_answer_is_spelt_to_its_end(sentencepiece, unit):
    for tokenizer in (TOKENIZER, sentencepiece):
        prompt_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Once", unit * 60))
        assert len(ids) > 150
        assert "".join(iter_pieces(tokenizer, prompt_ids, ids)) == decode_answer(tokenizer, prompt_ids, ids)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_any_tokens_give_the_same_text_whole_and_in_pieces(ids):
    assert "".join(iter_pieces(TOKENIZER, [40], ids)) == decode_answer(TOKENIZER, [40], ids)


@pytest.fixture(scope="module")
def sentencepiece():
    folder = Path(os.environ.get("SMOLORA_SHARED", "../shared")) / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}: a SentencePiece tokenizer")
    return load_tokenizer(folder)


def test_the_first_word_of_a_sentencepiece_answer_keeps_its_space(sentencepiece):
    prompt_ids = sentencepiece("Once upon")["input_ids"]
    ids = sentencepiece("Once upon a time")["input_ids"][len(prompt_ids) :]
    assert decode_answer(sentencepiece, prompt_ids, ids) == " a time"


@given(st.lists(st.integers(0, 511), max_size=40))
def test_sentencepiece_bytes_that_spell_nothing_are_the_same_whole_and_in_pieces(sentencepiece, ids):
    assert "".join(iter_pieces(sentencepiece, [1, 403], ids)) == decode_answer(sentencepiece, [1, 403], ids)


@given(st.lists(st.text("stop", max_size=4), max_size=12))
def test_a_stop_cuts_the_same_place_however_the_text_is_cut_up(pieces):
    assert "".join(cut_at_stop(pieces, ["stop"])) == "".join(pieces).partition("stop")[0]


def test_what_may_be_the_beginning_of_a_stop_is_held_back():
    assert list(cut_at_stop(["one s", "t", "ay st", "op"], ["stop"])) == ["one ", "stay "]


def test_a_beginning_that_is_no_stop_is_shown_at_the_end():
    assert list(cut_at_stop(["one st"], ["stop"])) == ["one ", "st"]


def test_a_stop_is_seen_when_its_last_token_comes_and_not_in_the_prompt():
    prompt_ids, ids = TOKENIZER("the €")["input_ids"], TOKENIZER("x € y")["input_ids"]
    seen = [ends_at_stop(TOKENIZER, prompt_ids, ids[:count], ["€"]) for count in range(1, len(ids) + 1)]
    assert seen.index(True) == len(TOKENIZER("x €")["input_ids"]) - 1
