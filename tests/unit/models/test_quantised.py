"""Which layers are held in few bits, what they hold, and that they compute the same in training and evaluation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LongT5ForConditionalGeneration, T5ForConditionalGeneration

from smolora.errors import ConfigError, ModelError
from smolora.models.loading import load_model
from smolora.models.quantised import dequantise, describe_quantised, require_quantisation, round_trip
from smolora.models.structure import is_quantised
from tests.tiny import (
    FAMILIES,
    HAS_BITSANDBYTES,
    WHOLE_BLOCKS,
    needs_bitsandbytes,
    random_input_ids,
    save_tiny_model,
    tiny_seq2seq_tokenizer,
)

KINDS = ("8bit", "4bit")


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a tiny model whose layers take 4 bits."""

    def save_wide(family="llama", **changes):
        return save_tiny_model(family, tmp_path / family, **WHOLE_BLOCKS[family], **changes)

    return save_wide


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_is_named_before_the_model_is_looked_for(tmp_path, kind):
    with pytest.raises(ConfigError, match=rf"{kind} needs bitsandbytes.*pip install 'smolora\[quant\]'"):
        load_model(tmp_path / "no-model", quantization=kind)


def test_no_quantisation_needs_no_library():
    require_quantisation("none")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_held_and_the_anatomy_stays(save, family, kind):
    folder = save(family)
    plain, held = load_model(folder), load_model(folder, quantization=kind)
    assert held.anatomy == plain.anatomy
    assert {name for name, module in held.model.named_modules() if is_quantised(module)} == set(
        plain.anatomy.linear_modules()
    )
    assert held.quantization == kind
    assert held.fingerprint == plain.fingerprint
    assert held.num_parameters == plain.num_parameters
    assert describe_quantised(held.model, held.anatomy).startswith("all ")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_holds_the_rounding_of_the_file_s_weight_whatever_it_computes_in(save, family, kind, dtype):
    folder = save(family)
    plain, held = load_model(folder), load_model(folder, quantization=kind, dtype=dtype)
    assert held.dtype == held.model.get_output_embeddings().weight.dtype == dtype
    for name in plain.anatomy.linear_modules():
        weight = plain.model.get_submodule(name).weight
        expected = round_trip(weight.T if family == "gpt2" else weight, kind)
        assert torch.equal(dequantise(held.model.get_submodule(name), dtype), expected.to(dtype))


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(7, 64), (33, 128), (96, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_are_the_nearest_of_16_values_scaled_by_the_largest_of_64(shape, dtype):
    from bitsandbytes.functional import get_4bit_type

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = weight.float().view(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = get_4bit_type("nf4", device="cpu")
    nearest = ((blocks / scales)[..., None] - values).abs().argmin(dim=-1)
    torch.testing.assert_close(round_trip(weight, "4bit"), (values[nearest] * scales).view(shape))


@needs_bitsandbytes
def test_8_bits_are_127_steps_of_the_largest_of_a_row():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    error = (round_trip(weight, "8bit") - weight).abs()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert (error <= step * 0.6).all()  # Half a step, and the rounding to float16 before it.
    assert error.max() > 0


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluation_compute_the_same(save, kind, dtype):
    model = load_model(save(), quantization=kind, dtype=dtype).model
    ids = random_input_ids(20)
    with torch.no_grad():
        evaluated = model(ids).logits
    assert torch.equal(model.train()(ids).logits, evaluated)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_a_layer_that_has_evaluated(save, kind):
    layer = load_model(save(), quantization=kind).model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.eval()(x)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantise(layer, torch.float32).sum(dim=0).expand(3, -1))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_near_the_plain_model_s(save, kind):
    folder, ids = save(), random_input_ids(20)
    expected, found = (load_model(folder, quantization=kind).model(ids).logits for kind in ("none", kind))
    distance = (found - expected).norm() / expected.norm()
    assert 0 < distance < {"8bit": 0.03, "4bit": 0.5}[kind]  # Random weights, 10 % apart in 4 bits, twice over.


@needs_bitsandbytes
def test_a_layer_whose_rows_are_no_whole_blocks_stays_and_is_named(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "base", hidden_size=64, head_dim=16)  # down_proj reads 48.
    bundle = load_model(folder, quantization="4bit")
    assert not is_quantised(bundle.model.model.layers[1].mlp.down_proj)
    assert (
        describe_quantised(bundle.model, bundle.anatomy)
        == "12 linear layers; left as they are, having no multiple of 64 inputs: 2 down_proj (48 inputs)"
    )
    assert is_quantised(load_model(folder, quantization="8bit").model.model.layers[1].mlp.down_proj)


def save_t5(kind, folder, **sizes):
    torch.manual_seed(0)
    config = kind.config_class(d_model=64, d_kv=16, num_layers=1, num_heads=4, vocab_size=288, **sizes)
    kind(config).eval().save_pretrained(folder)
    tiny_seq2seq_tokenizer().save_pretrained(folder)
    return folder


def ask_t5(bundle):
    ids = random_input_ids(9)
    return bundle.model(input_ids=ids, decoder_input_ids=ids).logits


@needs_bitsandbytes
def test_a_layer_that_transformers_leaves_whole_stays_in_4_bits_and_is_named(tmp_path):
    folder = save_t5(T5ForConditionalGeneration, tmp_path / "t5", d_ff=128)
    bundle = load_model(folder, quantization="4bit", task="seq2seq")
    assert not is_quantised(bundle.model.encoder.block[0].layer[1].DenseReluDense.wo)
    assert is_quantised(bundle.model.encoder.block[0].layer[1].DenseReluDense.wi)
    assert describe_quantised(bundle.model, bundle.anatomy) == (
        "14 linear layers; left as they are, as transformers leaves them: 2 wo (128 inputs)"
    )
    plain = ask_t5(load_model(folder, task="seq2seq"))
    assert (ask_t5(bundle) - plain).norm() < 0.3 * plain.norm()  # NF4 rounds by a tenth of a weight.


@needs_bitsandbytes
def test_a_model_that_would_multiply_whole_numbers_in_4_bits_is_refused(tmp_path):
    folder = save_t5(LongT5ForConditionalGeneration, tmp_path / "long", d_ff=128)
    with pytest.raises(ModelError, match=r"here torch\.uint8, so it would multiply whole numbers"):
        ask_t5(load_model(folder, quantization="4bit", task="seq2seq"))
    assert ask_t5(load_model(folder, quantization="8bit", task="seq2seq")).isfinite().all()


@needs_bitsandbytes
def test_a_model_too_narrow_for_4_bits_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no linear layer of .* a multiple of 64 inputs. Choose 8bit or none"):
        load_model(save_tiny_model("llama", tmp_path / "base"), quantization="4bit")


@needs_bitsandbytes
def test_a_quantised_file_is_not_quantised_again(save):
    folder = save()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_8bit": True}}))
    with pytest.raises(ConfigError, match="is quantised already. Leave it at none"):
        load_model(folder, quantization="4bit")


@needs_bitsandbytes
def test_an_unknown_kind_of_model_is_a_model_error(save):
    folder = save()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    with pytest.raises(ModelError, match="can't be opened as a causal language model"):
        load_model(folder, quantization="4bit")


_LOADING = """
import re, sys
from pathlib import Path
import torch
from smolora.models.loading import load_model
from smolora.runtime.memory import MemoryManager, keep_large_blocks

keep_large_blocks()
load_model(sys.argv[1], quantization=sys.argv[3])  # Imports count no more.
Path("/proc/self/clear_refs").write_text("5")
before = MemoryManager().get_memory_usage().process
bundle = load_model(sys.argv[2], quantization=sys.argv[3], dtype=torch.float32)
after = MemoryManager().get_memory_usage()
print(after.process - before, after.process_peak - before)
"""


@needs_bitsandbytes
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process starts anew on Linux alone")
@pytest.mark.parametrize("kind", KINDS)
def test_loading_holds_no_more_of_the_whole_weights_than_a_few_layers_at_once(save, tmp_path, kind):
    size = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 14}
    large = save_tiny_model("llama", tmp_path / "large", **size)
    whole = sum(p.nbytes for p in load_model(large).model.model.layers.parameters())
    command = [sys.executable, "-c", _LOADING, save(), large, kind]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    loaded, peak = map(int, run.stdout.split())
    assert loaded < whole * 0.4
    assert peak < whole * 0.75
