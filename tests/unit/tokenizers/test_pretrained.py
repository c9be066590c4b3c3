import json
import logging

import pytest
from transformers import AutoTokenizer

from smolora.errors import ModelError
from smolora.tokenizers.bpe import BPETokenizer
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import fingerprint_tokenizer, load_tokenizer, to_pretrained

TEXT = "naïve 日本 <|endoftext|>  two\n\n ñ"


@pytest.fixture
def char():
    return CharTokenizer.train("naïve 日本")


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_a_trained_tokenizer_loads_in_plain_transformers_with_the_same_ids(tmp_path, name, char):
    trained = char if name == "char" else BPETokenizer(280).train("naïve naïve")
    to_pretrained(trained, context=64).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded(TEXT, split_special_tokens=True)["input_ids"]
    assert ids == trained.encode(TEXT)
    assert loaded.decode(ids) == TEXT


def test_a_text_longer_than_the_tokenizers_own_limit_is_no_cause_for_a_warning(tmp_path, char, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    to_pretrained(char, context=4).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert len(load_tokenizer(tmp_path)("naïve naïve")["input_ids"]) > 4
    assert not caplog.records


def test_it_ends_a_text_and_has_no_other_special_token(char):
    tokenizer = to_pretrained(char, context=64)
    assert tokenizer.special_tokens_map == {"eos_token": "<|endoftext|>"}
    assert tokenizer.eos_token_id == char.eos_token_id
    assert tokenizer.model_max_length == 64


def test_wrapping_leaves_the_trained_tokenizer_as_it_was(char):
    to_pretrained(char, context=64)("<|endoftext|>")
    assert char.eos_token_id not in char.encode("<|endoftext|>")


def test_the_fingerprint_survives_saving_and_a_state_of_truncation(tmp_path, char):
    tokenizer = to_pretrained(char, context=64)
    before = fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(1)
    assert fingerprint_tokenizer(tokenizer) == before
    assert fingerprint_tokenizer(load_tokenizer(tmp_path)) == before


def test_another_vocabulary_or_template_has_another_fingerprint(char):
    tokenizer = to_pretrained(char, context=64)
    before = fingerprint_tokenizer(tokenizer)
    assert fingerprint_tokenizer(to_pretrained(CharTokenizer.train("naïve 日"), context=64)) != before
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(tokenizer) != before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere is no folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_hub_id_that_is_not_there_is_asked_for_once(hub):
    with pytest.raises(ModelError, match="can't load a tokenizer from someone/model: .*it has no such model"):
        load_tokenizer("someone/model")
    assert hub.requests == ["/api/models/someone/model"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="can't load a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path, char):
    to_pretrained(char, context=64).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(tmp_path)
