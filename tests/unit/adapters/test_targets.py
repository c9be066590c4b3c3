from __future__ import annotations

import pytest

from smolora.adapters.targets import resolve_target_modules
from smolora.config.adapter import ATTENTION_ONLY, BOTH, MLP_ONLY, LoRAConfig
from smolora.errors import ConfigError
from smolora.models.anatomy import build_anatomy
from tests.tiny import FAMILIES, NUM_LAYERS, tiny_model

QUERY_VALUE = ["self_attn.q_proj", "self_attn.v_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA = (
    "model.layers",
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    QUERY_VALUE,
    GATED,
)
BIG = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]

# blocks, attention, attention_only, mlp_only
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), LLAMA),
    "phi": (
        "model.layers",
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"],
        QUERY_VALUE,
        ["mlp.fc1", "mlp.fc2"],
    ),
    "phi3": (
        "model.layers",
        ["self_attn.qkv_proj", "self_attn.o_proj"],
        ["self_attn.qkv_proj"],
        ["mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"], ["attn.c_attn"], ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense"],
        ["attention.query_key_value"],
        BIG,
    ),
    "bloom": (
        "transformer.h",
        ["self_attention.query_key_value", "self_attention.dense"],
        ["self_attention.query_key_value"],
        BIG,
    ),
    "opt": (
        "model.decoder.layers",
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"],
        QUERY_VALUE,
        ["fc1", "fc2"],
    ),
}


def anatomy_of(family):
    return build_anatomy(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_named_targets_are_these_modules_exactly(family):
    blocks, attention, attention_only, mlp = EXPECTED[family]
    anatomy = anatomy_of(family)
    expected = {"attention_only": attention_only, "mlp_only": mlp, "both": attention_only + mlp, "all": attention + mlp}
    for named, paths in expected.items():
        full = {f"{blocks}.{layer}.{path}" for layer in range(NUM_LAYERS) for path in paths}
        resolved = resolve_target_modules(anatomy, named)
        assert set(resolved) == full
        assert len(resolved) == len(full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("names", "named"), [(ATTENTION_ONLY, "attention_only"), (MLP_ONLY, "mlp_only"), (BOTH, "both")]
)
def test_llama_s_lists_mean_the_same_parts_on_any_family(family, names, named):
    anatomy, config = anatomy_of(family), LoRAConfig(target_modules=tuple(names))
    assert resolve_target_modules(anatomy, config.target_modules) == resolve_target_modules(anatomy, named)


def test_a_name_is_the_last_part_of_a_path_and_not_a_part_of_it():
    anatomy = anatomy_of("gpt2")
    assert resolve_target_modules(anatomy, ["c_attn"]) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    with pytest.raises(ConfigError, match="no module named 'attn'"):
        resolve_target_modules(anatomy, ["attn"])


def test_gpt2_s_c_proj_is_in_attention_and_in_the_mlp():
    anatomy = anatomy_of("gpt2")
    assert len(resolve_target_modules(anatomy, ["c_proj"])) == 2 * NUM_LAYERS
    assert resolve_target_modules(anatomy, ["mlp.c_proj"]) == [
        f"transformer.h.{i}.mlp.c_proj" for i in range(NUM_LAYERS)
    ]


def test_a_full_path_is_one_module():
    path = "model.layers.1.mlp.up_proj"
    assert resolve_target_modules(anatomy_of("llama"), [path]) == [path]


def test_names_come_back_in_the_order_of_the_model_and_once():
    resolved = resolve_target_modules(anatomy_of("llama"), ["v_proj", "q_proj", "self_attn.v_proj"])
    assert resolved == [
        f"model.layers.{i}.self_attn.{name}" for i in range(NUM_LAYERS) for name in ("q_proj", "v_proj")
    ]


def test_a_misspelt_name_is_refused_with_the_nearest_and_all():
    with pytest.raises(ConfigError) as caught:
        resolve_target_modules(anatomy_of("llama"), ["q_projj"])
    assert str(caught.value) == (
        "adapter.target_modules: no module named 'q_projj' in 'llama'. Did you mean 'q_proj'? "
        "Linear modules: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "lm_head"), ("llama", "embed_tokens"), ("llama", "input_layernorm"), ("mixtral", "experts")],
)
def test_what_is_no_linear_layer_of_a_block_is_no_target(family, name):
    with pytest.raises(ConfigError, match=f"'{name}' is in '{family}', but is no linear layer of its blocks"):
        resolve_target_modules(anatomy_of(family), [name])


def test_layers_whose_weight_mamba_reads_itself_are_no_targets():
    anatomy = anatomy_of("mamba")
    names = {path.rpartition(".")[2] for path in resolve_target_modules(anatomy, "all")}
    assert names == {"in_proj", "x_proj"}
    with pytest.raises(ConfigError, match=r"'out_proj' can't be adapted in 'mamba'.*Linear modules: in_proj, x_proj\."):
        resolve_target_modules(anatomy, ["in_proj", "out_proj"])


def test_a_named_group_that_a_model_does_not_have_is_refused():
    from torch import nn

    model = nn.Module()
    model.stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    with pytest.raises(ConfigError, match="'attention_only' is nothing in 'Module'. Linear modules: 0"):
        resolve_target_modules(build_anatomy(model), "attention_only")
