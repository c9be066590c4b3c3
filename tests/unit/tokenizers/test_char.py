import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smolora.errors import DataError
from smolora.tokenizers.char import CharTokenizer

TOKENIZER = CharTokenizer.train("To be, or not to be: naïve 😀 日本")

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text)
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text(st.sampled_from("To be,rnt:naïv😀日本")))
def test_a_known_character_is_one_token(text):
    assert len(TOKENIZER.encode(text)) == len(text)


def test_char_to_id_is_what_encode_gives():
    assert TOKENIZER.encode("日") == [TOKENIZER.char_to_id["日"]]
    assert TOKENIZER.id_to_char[TOKENIZER.char_to_id["ï"]] == "ï"


def test_an_unknown_character_never_stands_for_a_known_one():
    unknown = TOKENIZER.encode("ñ")
    assert len(unknown) == 2
    assert not {TOKENIZER.id_to_char.get(token) for token in unknown} & set("naïve")
    assert "ñ" not in TOKENIZER.char_to_id


def test_text_that_spells_the_end_of_text_stays_text():
    ids = TOKENIZER.encode("a<|endoftext|>b")
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids) == "a<|endoftext|>b"


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(DataError, match="character 1: half of a surrogate pair"):
        TOKENIZER.encode("a\ud800")


def test_many_texts_train_as_one():
    assert CharTokenizer.train(["ab", "bé"]).vocab == CharTokenizer.train("abé").vocab


def test_the_saved_file_is_read_by_the_tokenizers_library(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("naïve 日本 ñ").ids == TOKENIZER.encode("naïve 日本 ñ")


def test_importing_tokenizers_loads_no_torch():
    code = "import sys, smolora.tokenizers.char, smolora.tokenizers.bpe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
