"""Layers as one function: dropout as plain torch would have it, and nothing kept that backward can do without."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.adapters.lora_product import LoRAProduct
from smolora.config import LoRAConfig, SpeedConfig
from smolora.config.adapter import IA3Config
from smolora.models.frozen_linear import FrozenLinear
from smolora.models.fused_ops import Dropped
from smolora.models.loading import load_model
from smolora.models.rows import Rows
from smolora.models.saving import save_model
from tests.packed_runs import LENGTHS, adapted, assert_same, run, run_fast
from tests.tiny import NUM_LAYERS, random_input_ids, save_tiny_model, tiny_bundle


def test_dropout_drops_its_share_and_keeps_the_mean(tmp_path):
    bundle = adapted("llama", tmp_path, config=LoRAConfig(lora_dropout=0.25))
    layer = bundle.model.get_base_model().model.layers[0].self_attn.q_proj.train()
    product = LoRAProduct([layer], packed=False)
    x = torch.ones(4000, 32, requires_grad=True)
    torch.manual_seed(0)
    output = product(x)
    low = layer.eval()(torch.ones(1, 32)).detach() - layer.base_layer(torch.ones(1, 32)).detach()
    base = layer.base_layer(torch.ones(1, 32)).detach()
    # The mean over 4,000 draws is within 5 standard errors of the undropped branch.
    error = (output - base).detach().std(dim=0) / 4000**0.5
    assert (((output - base).detach().mean(dim=0) - low[0]).abs() < 5 * error).all()
    # Its gradient is the one of the mask that was drawn: the branch of every kept input, exactly.
    output.sum().backward()
    branch = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).sum(0).detach() * layer.scaling[
        "default"
    ]
    dropped = x.grad - layer.base_layer.weight.sum(0).detach()
    kept = dropped.abs() > 1e-4 * branch.abs()
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert_close(dropped[kept], (branch / 0.75).expand_as(dropped)[kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"k_proj": 2, "up_proj": 3}, "alpha_pattern": {"v_proj": 3, "gate_proj": 5, "o_proj": 1}},
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 12},
    ],
    ids=["their own", "1", "one"],
)
def test_layers_side_by_side_keep_their_ranks_and_scales(settings, tmp_path):
    bundle = adapted("llama", tmp_path, config=LoRAConfig(lora_dropout=0.0, **settings))
    assert_same(run_fast(bundle), run(bundle, by_rows=False))


LIKE_135M = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""A third of a llama of 135M parameters: rows are shorter than a head is wide, as E2E's are."""


class GivenMask(torch.nn.Module):
    """Dropout whose mask is given, for plain peft."""

    def __init__(self, keep, probability):
        super().__init__()
        self.keep, self.probability = keep, probability

    def forward(self, x):
        return x * self.keep / (1 - self.probability)


def give_masks(bundle, probability):
    """Draw masks in the order of the fast path's products, and let plain peft apply them."""
    for block in bundle.model.get_base_model().model.layers:
        attention, mlp = block.self_attn, block.mlp
        for layers in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ):
            adapters = [layer for layer in layers if "lora_dropout" in dict(layer.named_children())]
            if adapters:
                ones = torch.ones(sum(LENGTHS), adapters[0].in_features)
                keep = Dropped.draw(ones, probability).zero_(ones)
                for layer in adapters:
                    layer.lora_dropout["default"] = GivenMask(keep, probability)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("targets", ["all", "mlp_only", ("down_proj",)])
def test_with_dropout_logits_and_gradients_are_those_of_plain_peft_under_the_same_masks(family, targets, tmp_path):
    bundle = adapted(family, tmp_path, config=LoRAConfig(lora_dropout=0.3, target_modules=targets))
    bundle.model.train()
    torch.manual_seed(4)
    *found, parts = run_fast(bundle)
    assert parts.used == ["row attention", "fused blocks", "fused LoRA"]
    torch.manual_seed(4)
    give_masks(bundle, 0.3)
    assert_same(found, run(bundle, by_rows=False))


def kept_bytes(bundle, *, by_rows):
    """Bytes of the storages that the forward pass below the head keeps for backward, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in bundle.model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = {"rows": Rows(LENGTHS, torch.device("cpu"))} if by_rows else {}
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    body = bundle.model.get_base_model().base_model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = body(input_ids=random_input_ids(sum(LENGTHS)), position_ids=positions, use_cache=False, **rows)[0]
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


@pytest.mark.parametrize(
    ("family", "shape", "dtype"),
    [
        ("llama", LIKE_135M, torch.float32),
        ("llama", LIKE_135M, torch.bfloat16),
        ("gpt2", {"n_embd": 192, "n_head": 3}, torch.bfloat16),
    ],
)
def test_it_keeps_fewer_bytes_for_backward_than_plain_code(family, shape, dtype, tmp_path):
    bundle = adapted(family, tmp_path, dtype=dtype, config=LoRAConfig(), **shape)
    bundle.model.train()
    plain = kept_bytes(bundle, by_rows=False)
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        fast = kept_bytes(bundle, by_rows=True)
    assert fast < 0.75 * plain


def test_layers_beside_one_that_is_no_lora_are_not_called_so(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), IA3Config(target_modules=("k_proj",)), seed=0)
    with fast_path(bundle, SpeedConfig(), is_packed=True) as parts:
        assert parts.left == [f"ia3 isn't LoRA ({NUM_LAYERS} layers)"]


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_for_backward_it_keeps_what_backward_needs_and_nothing_else(probability, tmp_path):
    bundle = adapted("llama", tmp_path, config=LoRAConfig(lora_dropout=probability), **LIKE_135M)
    bundle.model.train()
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        found = kept_bytes(bundle, by_rows=True)
    tokens, width, inner, rank = sum(LENGTHS), 192, 512, 8
    heads, shared, head_width = 3, 1, 64
    norms = 2 * tokens * (width + 1)  # The input, and a number per token.
    inputs = tokens * (3 * width + 2 * inner)  # Of q, k and v, of the output, of gate and up; g and u side by side.
    adapters = tokens * 7 * rank + rank * (6 * width + inner)  # x A^T and A, of seven layers.
    outputs = heads * head_width + 2 * shared * head_width
    adapters += 3 * rank * outputs + rank * width + 2 * rank * 2 * inner + rank * width  # B, on the diagonal.
    blocks = sum(
        group.num_rows * group.length * ((heads + 2 * shared) * head_width + heads * group.length)
        for group in Rows(LENGTHS, torch.device("cpu")).groups
    )  # q, k, v and the attention weights of padded rows.
    places = 1.1 * probability * tokens * (3 * width + inner)  # Of what dropout drops, some more by chance.
    assert found <= NUM_LAYERS * (4 * (norms + inputs + adapters + blocks) + 8 * places)


def frozen_products():
    return [thing for thing in gc.get_objects() if type(thing) is FrozenLinear]


def test_the_products_of_a_base_that_is_not_packed_hold_no_weights_beside_its_own(tmp_path):
    bundle = adapted("llama", tmp_path / "model", config=LoRAConfig())
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    others = frozen_products()
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        owned = {parameter.untyped_storage().data_ptr() for parameter in bundle.model.parameters()}
        held = [product._forward_weight for product in frozen_products() if product not in others]
        assert held and all(weight.untyped_storage().data_ptr() in owned for weight in held)
    after = bundle.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_base_whose_weights_became_parts_of_joint_ones_is_saved_whole(tmp_path):
    bundle = adapted("llama", tmp_path / "model", config=LoRAConfig())
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        pass
    base = replace(bundle, model=bundle.model.unload())
    save_model(base, tmp_path / "saved")
    found = load_model(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.model.state_dict().items())


HELD = """
import sys, torch
from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.config import LoRAConfig, SpeedConfig
from smolora.models.loading import load_model
from smolora.runtime.memory import MemoryManager, keep_large_blocks

keep_large_blocks()
bundle = attach_adapter(load_model(sys.argv[1], dtype=torch.float32), LoRAConfig(), seed=0)
before = MemoryManager().get_memory_usage().process
with fast_path(bundle, SpeedConfig(), is_packed=True):
    print(MemoryManager().get_memory_usage().process - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's allocator is not glibc's")
def test_the_memory_of_weights_that_became_parts_of_joint_ones_goes_back(tmp_path):
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}
    base = save_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16, **wide)
    done = subprocess.run([sys.executable, "-c", HELD, str(base)], capture_output=True, text=True, check=True)
    gates = 4 * wide["num_hidden_layers"] * 2 * wide["intermediate_size"] * wide["hidden_size"]
    assert int(done.stdout) < gates  # 17 to 46 MiB, where kept blocks make it 92 and the gates are 72.
