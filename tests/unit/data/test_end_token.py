"""Rows end with the token that was chosen for them, in every form."""

from __future__ import annotations

import pytest

from smolora.config import DataConfig
from smolora.data.prompts import PromptFormat, encode_row, resolve_prompt_format
from tests.tiny import tiny_tokenizer

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = {
    "text": {"text": "hello"},
    "prompt_completion": {"prompt": "hi", "completion": "hello"},
    "instruction": {"instruction": "say hi", "output": "hello"},
    "messages": {"messages": TALK},
}


@pytest.fixture
def tokenizer():
    """A tokenizer with a second control token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


@pytest.mark.parametrize("kind", ROWS)
def test_a_chosen_token_ends_rows_of_every_form(tokenizer, kind):
    fmt = resolve_prompt_format(list(ROWS[kind]), DataConfig(), tokenizer).with_end_token("<end>")
    example = encode_row(ROWS[kind], fmt, tokenizer)
    assert tokenizer.convert_ids_to_tokens(int(example.input_ids[-1])) == "<end>"
    assert example.is_target[-1]
    assert tokenizer.eos_token_id not in example.input_ids


def test_without_one_the_form_stays_as_it_is():
    fmt = PromptFormat(kind="text", columns={"text": "text"})
    assert fmt.with_end_token(None) is fmt
