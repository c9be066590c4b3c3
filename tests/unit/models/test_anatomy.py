from __future__ import annotations

import pytest
from torch import nn

from smolora.config.model import GPTConfig
from smolora.errors import ModelError
from smolora.models.anatomy import build_anatomy
from smolora.models.gpt import GPTModel
from smolora.models.structure import infer_family
from tests.tiny import FAMILIES, NUM_LAYERS, tiny_model

SEPARATE = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def self_attention(roles):
    return {f"self_attn.{name}": role for name, role in roles.items()}


def mlp(roles):
    return {f"mlp.{name}": role for name, role in roles.items()}


TWO_NORMS = {"input_layernorm", "post_attention_layernorm"}
FOUR_NORMS = TWO_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
BIG = {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}

# blocks, attention, mlp, norms in a block, norms outside, embeddings
EXPECTED = {
    "llama": ("model.layers", self_attention(SEPARATE), mlp(GATED), TWO_NORMS, {"model.norm"}, ["model.embed_tokens"]),
    "gemma2": (
        "model.layers",
        self_attention(SEPARATE),
        mlp(GATED),
        FOUR_NORMS,
        {"model.norm"},
        ["model.embed_tokens"],
    ),
    "qwen3": (
        "model.layers",
        self_attention(SEPARATE),
        mlp(GATED),
        TWO_NORMS | {"self_attn.q_norm", "self_attn.k_norm"},
        {"model.norm"},
        ["model.embed_tokens"],
    ),
    "phi": (
        "model.layers",
        self_attention({"q_proj": "query", "k_proj": "key", "v_proj": "value", "dense": "output"}),
        mlp({"fc1": "up", "fc2": "down"}),
        {"input_layernorm"},
        {"model.final_layernorm"},
        ["model.embed_tokens"],
    ),
    "phi3": (
        "model.layers",
        self_attention({"qkv_proj": "query_key_value", "o_proj": "output"}),
        mlp({"gate_up_proj": "gate_up", "down_proj": "down"}),
        TWO_NORMS,
        {"model.norm"},
        ["model.embed_tokens"],
    ),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": "query_key_value", "attn.c_proj": "output"},
        mlp({"c_fc": "up", "c_proj": "down"}),
        {"ln_1", "ln_2"},
        {"transformer.ln_f"},
        ["transformer.wte", "transformer.wpe"],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention.query_key_value": "query_key_value", "attention.dense": "output"},
        mlp(BIG),
        TWO_NORMS,
        {"gpt_neox.final_layer_norm"},
        ["gpt_neox.embed_in"],
    ),
    "bloom": (
        "transformer.h",
        {"self_attention.query_key_value": "query_key_value", "self_attention.dense": "output"},
        mlp(BIG),
        TWO_NORMS,
        {"transformer.word_embeddings_layernorm", "transformer.ln_f"},
        ["transformer.word_embeddings"],
    ),
    "opt": (
        "model.decoder.layers",
        self_attention({"k_proj": "key", "v_proj": "value", "q_proj": "query", "out_proj": "output"}),
        {"fc1": "up", "fc2": "down"},
        {"self_attn_layer_norm", "final_layer_norm"},
        {"model.decoder.final_layer_norm"},
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
    ),
    "smolora_gpt": (
        "blocks",
        {"attention.W_q": "query", "attention.W_k": "key", "attention.W_v": "value", "attention.W_o": "output"},
        {"feed_forward.linear1": "up", "feed_forward.linear2": "down"},
        {"ln1", "ln2"},
        {"ln_final"},
        ["token_embedding", "position_embedding"],
    ),
}
EXPECTED |= dict.fromkeys(("mistral", "qwen2", "gemma"), EXPECTED["llama"])
MODEL_TYPES = (*FAMILIES, "smolora_gpt")


def build_model(model_type):
    if model_type == "smolora_gpt":
        return GPTModel(GPTConfig(num_layers=NUM_LAYERS, width=32, vocab_size=288))
    return tiny_model(model_type)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_part_of_a_family_is_named_exactly(model_type):
    blocks, attention, mlp_roles, block_norms, norms, embeddings = EXPECTED[model_type]
    anatomy = build_anatomy(build_model(model_type))
    expected = {"lm_head": ("head", None, None, True)}
    expected |= dict.fromkeys(embeddings, ("embedding", None, None, False))
    expected |= dict.fromkeys(norms, ("norm", None, None, False))
    for layer in range(NUM_LAYERS):
        expected |= {f"{blocks}.{layer}.{name}": ("attention", layer, role, True) for name, role in attention.items()}
        expected |= {f"{blocks}.{layer}.{name}": ("mlp", layer, role, True) for name, role in mlp_roles.items()}
        expected |= {f"{blocks}.{layer}.{name}": ("norm", layer, None, False) for name in block_norms}
    assert {part.name: (part.group, part.layer, part.role, part.is_linear) for part in anatomy.parts} == expected
    assert (anatomy.family, anatomy.num_layers) == (model_type, NUM_LAYERS)
    per_layer = [f"{blocks}.{layer}.{name}" for layer in range(NUM_LAYERS) for name in attention | mlp_roles]
    assert sorted(anatomy.linear_modules()) == sorted(per_layer)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_unknown_model_type_gets_the_same_answer_by_structure(model_type):
    model = tiny_model(model_type)
    known = build_anatomy(model)
    model.config.model_type = "adopt"  # Holds "opt", is none.
    unknown = build_anatomy(model)
    assert unknown.family == "adopt"
    assert unknown.parts == known.parts
    assert unknown.num_layers == known.num_layers


def test_the_gpt_to_read_is_the_same_by_structure():
    model = build_model("smolora_gpt")
    assert infer_family(model).attention == EXPECTED["smolora_gpt"][1]
    assert infer_family(model).mlp == EXPECTED["smolora_gpt"][2]


def test_without_a_class_called_attention_the_first_container_is_attention():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.merge = (nn.Linear(4, 4) for _ in range(4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = Mixer()
            self.feed = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

    model = nn.Module()
    model.tokens = nn.Embedding(10, 4)
    model.stack = nn.ModuleList(Block() for _ in range(3))
    model.out = nn.Linear(4, 10)
    anatomy = build_anatomy(model)
    assert anatomy.modules_with_role("query", "output") == [
        f"stack.{i}.mix.{n}" for i in range(3) for n in ("q", "merge")
    ]
    assert anatomy.modules_with_role("up", "down") == [f"stack.{i}.feed.{n}" for i in range(3) for n in (0, 1)]
    assert anatomy.part_of("out.weight").group == "head"


def test_a_known_family_without_its_head_is_read_by_structure():
    anatomy = build_anatomy(tiny_model("llama").model)
    assert anatomy.part_of("layers.1.mlp.up_proj.weight").role == "up"
    assert {part.group for part in anatomy.parts} == {"attention", "mlp", "embedding", "norm"}


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="no numbered blocks"):
        build_anatomy(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj"),
        ("transformer.h.1.attn.c_proj.bias", "transformer.h.1.attn.c_proj"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight", "transformer.h.0.attn.c_attn"),
        ("base_model.model.transformer.h.0.attn.c_attn.base_layer.weight", "transformer.h.0.attn.c_attn"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head"),
    ],
)
def test_a_parameter_is_found_under_its_plain_name_and_under_peft_s(parameter, part):
    assert build_anatomy(tiny_model("gpt2")).part_of(parameter).name == part


def test_a_parameter_of_no_part_is_other():
    anatomy = build_anatomy(tiny_model("gpt2"))
    assert anatomy.part_of("prompt_encoder.default.embedding.weight").group == "other"


def test_every_parameter_of_a_model_has_a_part():
    model = tiny_model("llama")
    anatomy = build_anatomy(model)
    assert all(name.startswith(f"{anatomy.part_of(name).name}.") for name, _ in model.named_parameters())


def test_experts_that_are_one_tensor_are_in_the_mlp_of_their_layer():
    parts = {part.name: part for part in build_anatomy(tiny_model("mixtral")).parts}
    experts = parts["model.layers.1.mlp.experts"]
    assert (experts.group, experts.layer, experts.is_linear) == ("mlp", 1, False)


def test_a_router_that_returns_what_it_chose_is_no_linear_layer():
    names = {path.rpartition(".")[2] for path in build_anatomy(tiny_model("phimoe")).linear_modules()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
