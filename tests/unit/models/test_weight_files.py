from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolora.errors import ModelError
from smolora.models.weight_files import fingerprint_weights, list_weight_files, read_stored_tensors
from tests.tiny import save_tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model("llama", tmp_path / "base")


def change_one_number(folder, position):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].view(-1)[position] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_are_listed_with_their_bytes(folder):
    file = folder / "model.safetensors"
    raw, expected = file.read_bytes(), load_file(file)
    stored = read_stored_tensors(file)
    assert {tensor.name for tensor in stored} == expected.keys()
    for tensor in stored:
        found = torch.frombuffer(bytearray(raw[tensor.start : tensor.end]), dtype=torch.float32).reshape(tensor.shape)
        assert torch.equal(found, expected[tensor.name])


@pytest.mark.parametrize("position", [0, 288 * 32 // 2, -1])
def test_two_bases_of_one_shape_have_different_fingerprints(folder, position):
    before = fingerprint_weights(folder)
    assert fingerprint_weights(folder) == before
    change_one_number(folder, position)
    assert fingerprint_weights(folder) != before


def test_a_setting_that_no_shape_shows_changes_the_fingerprint(folder):
    before = fingerprint_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    assert fingerprint_weights(folder) != before


def test_the_fingerprint_does_not_depend_on_shards_or_on_the_place(folder, tmp_path):
    shards = save_tiny_model("llama", tmp_path / "shards", max_shard_size="40KB")
    assert len(list_weight_files(shards)) > 2
    assert fingerprint_weights(shards) == fingerprint_weights(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_weights(tmp_path / "copy") == fingerprint_weights(folder)


def test_only_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="only pickled weights"):
        list_weight_files(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        list_weight_files(folder)


def test_a_missing_shard_is_named(tmp_path):
    shards = save_tiny_model("llama", tmp_path / "shards", max_shard_size="40KB")
    missing = list_weight_files(shards)[1]
    missing.unlink()
    with pytest.raises(ModelError, match=missing.name):
        list_weight_files(shards)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    shards = save_tiny_model("llama", tmp_path / "shards", max_shard_size="40KB")
    outside = save_tiny_model("llama", tmp_path / "outside")
    index = {"weight_map": {"lm_head.weight": f"../{outside.name}/model.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="incomplete"):
        list_weight_files(shards)


def test_an_index_that_is_no_index_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="isn't an index"):
        list_weight_files(folder)


@pytest.mark.parametrize("kept", [4, 100, 5000, -1])
def test_a_cut_file_is_refused(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="isn't a safetensors file|it was cut"):
        read_stored_tensors(file)


def test_a_header_of_absurd_length_is_refused_without_reading_it(folder):
    file = folder / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="longer than 100 MB"):
        read_stored_tensors(file)
