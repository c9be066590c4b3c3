from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smolora.config.model import GPTConfig
from smolora.errors import ModelError
from smolora.models.gpt import GPTModel
from smolora.models.gpt2_weights import to_gpt2
from tests.tiny import random_input_ids, save_tiny_model

# Another order of sums (one fused matrix instead of three); the logits are about 1.
ROUNDING = {"atol": 2e-6, "rtol": 1e-5}


def build_gpt(**changes):
    """A GPT whose every tensor differs from its initial value."""
    torch.manual_seed(0)
    model = GPTModel(
        GPTConfig(num_layers=2, num_heads=2, width=16, context=32, vocab_size=288).replace(**changes)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_a_saved_gpt_loads_in_plain_transformers_with_equal_logits(tmp_path, activation, bias):
    model = build_gpt(activation=activation, bias=bias)
    model.save_pretrained(tmp_path / "gpt", eos_token_id=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt")
    ids = random_input_ids(12)
    torch.testing.assert_close(plain(ids).logits, model(ids), **ROUNDING)
    assert plain.config.eos_token_id == 0
    assert plain.config.model_type == "gpt2"


def test_a_saved_gpt_is_these_files_and_others_can_read_them(tmp_path):
    build_gpt().save_pretrained(tmp_path / "gpt")
    files = sorted((tmp_path / "gpt").iterdir())
    assert [file.name for file in files] == ["config.json", "generation_config.json", "model.safetensors"]
    assert len({file.stat().st_mode & 0o777 for file in files}) == 1


def test_a_tied_head_is_stored_once(tmp_path):
    build_gpt().save_pretrained(tmp_path / "gpt")
    assert "lm_head.weight" not in load_file(tmp_path / "gpt/model.safetensors")


def test_a_gpt_goes_to_disk_and_back_bit_by_bit(tmp_path):
    model = build_gpt(activation="gelu", dropout=0.25, bias=True)
    model.save_pretrained(tmp_path / "gpt")
    again = GPTModel.from_pretrained(tmp_path / "gpt")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.lm_head.weight is again.token_embedding.weight


def test_gpt2_weights_load_into_gpt_model_with_equal_logits(tmp_path):
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    plain, ids = AutoModelForCausalLM.from_pretrained(folder), random_input_ids(12)
    torch.testing.assert_close(GPTModel.from_pretrained(folder)(ids), plain(ids).logits, **ROUNDING)


def test_weights_in_several_files_load_too(tmp_path):
    model, folder = build_gpt(bias=True), tmp_path / "gpt"
    to_gpt2(model).save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    again = GPTModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_openai_names_without_the_prefix_load_too(tmp_path):
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    expected = GPTModel.from_pretrained(folder)(random_input_ids(12))
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # The mask that OpenAI's files carry.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(GPTModel.from_pretrained(folder)(random_input_ids(12)), expected)


def test_an_untied_head_stays_untied(tmp_path):
    folder = save_tiny_model("gpt2", tmp_path / "gpt2", tie_word_embeddings=False)
    model, ids = GPTModel.from_pretrained(folder), random_input_ids(12)
    torch.testing.assert_close(model(ids), AutoModelForCausalLM.from_pretrained(folder)(ids).logits, **ROUNDING)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids), **ROUNDING
    )


def test_a_gpt2_in_memory_is_a_copy_and_draws_no_random_number():
    model = build_gpt()
    state, before = torch.get_rng_state(), model(random_input_ids(9))
    gpt2 = to_gpt2(model, eos_token_id=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not gpt2.training
    torch.testing.assert_close(gpt2(random_input_ids(9)).logits, before, **ROUNDING)
    with torch.no_grad():
        gpt2.transformer.wte.weight.zero_()
    assert torch.equal(model(random_input_ids(9)), before)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' model; GPTModel reads gpt2"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=False, found True"),
        ({"n_inner": 33}, "n_inner=33"),
        ({"attn_pdrop": 0.5}, "one dropout, found"),
        ({"n_layer": 3}, "no tensor 'h.2"),
        ({"n_positions": 5}, "doesn't have the shape"),
    ],
)
def test_a_checkpoint_that_gpt_model_would_compute_wrongly_is_refused(tmp_path, change, message):
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        GPTModel.from_pretrained(folder)


def test_dropout_can_be_chosen_where_the_file_has_several(tmp_path):
    folder = save_tiny_model("gpt2", tmp_path / "gpt2", attn_pdrop=0.5)
    assert GPTModel.from_pretrained(folder, dropout=0.1).config.dropout == 0.1


@pytest.mark.parametrize(("content", "message"), [("{", "can't be read"), ("[]", "must hold a JSON object")])
def test_a_damaged_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config\.json {message}"):
        GPTModel.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        GPTModel.from_pretrained(tmp_path)
