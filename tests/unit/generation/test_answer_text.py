"""Tokens become text piece by piece without tearing a character or losing a space."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolora.generation.answer_text import decode_answer, iter_pieces
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
