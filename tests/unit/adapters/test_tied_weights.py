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
from tests.tiny import save_tiny_encoder
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


def test_the_shared_embedding_of_encoder_and_decoder_is_not_parted(tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(save_tiny_encoder("t5", tmp_path / "base"))
    with quiet_peft():
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["lm_head"]))
        move_all(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"changes lm_head\.weight, which is one weight with shared\.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
