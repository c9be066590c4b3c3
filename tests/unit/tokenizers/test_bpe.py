import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolora.errors import ConfigError
from smolora.tokenizers.bpe import BPETokenizer

TEXTS = ["the cat sat on the mat, the dog sat on the log\n" * 20, "naïve café 日本 日本 日本\n" * 20]
TOKENIZER = BPETokenizer(300).train(TEXTS)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_frequent_runs_become_one_token():
    assert len(TOKENIZER.encode(" the")) == 1
    assert TOKENIZER.vocab_size <= 300


def test_merges_build_the_vocabulary():
    assert TOKENIZER.merges
    assert all(left + right in TOKENIZER.vocab for left, right in TOKENIZER.merges)


def test_training_twice_gives_the_same_tokenizer():
    again = BPETokenizer(300).train(TEXTS)
    assert (again.merges, again.vocab) == (TOKENIZER.merges, TOKENIZER.vocab)


def test_a_long_run_without_a_space_is_learned_in_pieces_and_encoded_whole():
    tokenizer = BPETokenizer(400).train("a" * 5000)
    assert 500 < max(map(len, tokenizer.vocab)) <= 960
    assert tokenizer.backend.to_str() == BPETokenizer(400).train(["a" * 960] * 5 + ["a" * 200]).backend.to_str()
    assert tokenizer.decode(tokenizer.encode("a" * 5000)) == "a" * 5000


def test_text_that_spells_the_end_of_text_stays_text():
    assert TOKENIZER.eos_token_id not in TOKENIZER.encode("<|endoftext|>")


def test_an_untrained_tokenizer_spells_bytes():
    tokenizer = BPETokenizer(300)
    assert tokenizer.decode(tokenizer.encode("日本")) == "日本"


def test_a_vocabulary_without_room_for_every_byte_is_refused():
    with pytest.raises(ConfigError, match="need 257"):
        BPETokenizer(256)
