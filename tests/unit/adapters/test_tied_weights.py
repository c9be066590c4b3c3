"""A head that is tied to the token embedding, and adapters on one of them or both."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from smolora.adapters.merge import merge_adapter
from smolora.adapters.tensors import quiet_peft
from smolora.errors import ModelError
from smolora.models.weight_files import list_weight_files
from tests.tiny import random_input_ids, save_tiny_encoder
from tests.unit.adapters.conftest import move_all
from tests.unit.adapters.test_merge import assert_merged, peft_merged

TIED = {"tie_word_embeddings": True}


def read_tensors(folder):
    return {name: tensor for file in list_weight_files(folder) for name, tensor in load_file(file).items()}


def is_tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ],
)
def test_what_changes_both_alike_leaves_them_tied(save_peft_pair, tmp_path, settings):
    base, adapter = save_peft_pair(base=TIED, **settings)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(base).keys()
    assert is_tied(tmp_path / "out")


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_head_or_an_embedding_that_was_trained_whole_gets_a_tensor_of_its_own(
    save_peft_pair, tmp_path, modules, size
):
    base, adapter = save_peft_pair(
        base={**TIED, "max_shard_size": size}, target_modules=["q_proj"], modules_to_save=modules
    )
    report = merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    found, expected = read_tensors(tmp_path / "out"), peft_merged(base, adapter)
    assert found.keys() == expected.keys() == {*read_tensors(base), "lm_head.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    assert not is_tied(tmp_path / "out")
    assert report.num_merged_tensors + report.num_copied_tensors == len(found)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_lora_on_one_of_both_parts_them(save_peft_pair, tmp_path, targets):
    base, adapter = save_peft_pair(base=TIED, target_modules=targets)
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")  # peft's own merge differs from its adapter by up to 20 here.
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    of_base = {name: after[name].equal(before["model.embed_tokens.weight"]) for name in after.keys() - before.keys()}
    assert of_base == {"lm_head.weight": "lm_head" not in targets}
    assert not is_tied(tmp_path / "out")


def test_lora_on_a_tied_head_parts_them_also_without_a_copy_of_the_embedding_in_its_files(save_peft_pair, tmp_path):
    base, adapter = save_peft_pair(base=TIED, target_modules=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    assert len(own) == 2 < len(tensors)
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_a_base_whose_files_hold_a_tied_head_too_is_parted_in_place(save_peft_pair, tmp_path):
    base, adapter = save_peft_pair(base=TIED, target_modules=["q_proj"], modules_to_save=["lm_head"])
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert not is_tied(tmp_path / "out")


def save_seq2seq_pair(folder, family, **settings):
    base = save_tiny_encoder(family, folder / "base")
    with quiet_peft():
        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **settings)
        adapted = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config)
        move_all(adapted)
        adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ],
)
def test_an_embedding_that_encoder_decoder_and_head_share_is_parted(tmp_path, settings):
    base, adapter = save_seq2seq_pair(tmp_path, "bart", **settings)
    ids = random_input_ids(20)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    before = plain(ids, decoder_input_ids=ids.flip(1)).logits
    with quiet_peft():
        expected = peft.PeftModel.from_pretrained(plain, adapter)(ids, decoder_input_ids=ids.flip(1)).logits
    merge_adapter(adapter, tmp_path / "out")
    found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")(ids, decoder_input_ids=ids.flip(1)).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not is_tied(tmp_path / "out")


def test_t5_s_shared_embedding_is_not_parted_since_its_config_can_not_say_so(tmp_path):
    _, adapter = save_seq2seq_pair(tmp_path, "t5", target_modules=["lm_head"])
    with pytest.raises(
        ModelError, match=r"changes lm_head\.weight, which is one weight with shared\.weight, .* no config"
    ):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
