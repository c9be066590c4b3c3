"""The table of known model families: where each keeps its blocks, attention, MLP, embeddings and head.

A family is found by `config.model_type`, never by a part of the model's name ("opt" is in "adopt", "phi" in "dolphin").
smollm is llama, or smollm3 for its third version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from smolora.errors import ConfigError, did_you_mean

Role = Literal["query", "key", "value", "output", "query_key_value", "gate", "up", "gate_up", "down"]


@dataclass(frozen=True)
class Fused:
    """What tells a family of rotary models with gated MLPs from llama, for the operations that stand for its blocks."""

    norm_offset: float = 0.0
    """1 where norms store weight - 1."""
    attention: bool = True
    """Whether attention is rotary over whole heads, with neither cap nor gate."""


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps what. Paths of linear layers are relative to a block."""

    blocks: tuple[str, ...]
    """Paths of the lists of numbered blocks: one, or an encoder's and then a decoder's."""
    attention: Mapping[str, Role]
    mlp: Mapping[str, Role]
    embeddings: tuple[str, ...]
    """Paths in the whole model, the tokens' first."""
    head: str
    """Path of the language-model head in the whole model."""
    fused: Fused | None = None
    """Profile of its blocks, where fused operations can stand for them."""
    advice: Mapping[str, str | bool] = field(default_factory=dict)
    """What a person may want to set for this family. Nothing applies it by itself."""


_SEPARATE_ATTENTION: dict[str, Role] = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
}
_GATED_MLP: dict[str, Role] = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_BIGSCIENCE_MLP: dict[str, Role] = {"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"}

_LLAMA = Family(("model.layers",), _SEPARATE_ATTENTION, _GATED_MLP, ("model.embed_tokens",), "lm_head", fused=Fused())
_SMOLLM3 = replace(_LLAMA, fused=Fused(attention=False))  # Some of its layers have no positions.
_GEMMA = replace(_LLAMA, fused=Fused(norm_offset=1.0))
_GEMMA2 = replace(
    _LLAMA,
    fused=Fused(norm_offset=1.0, attention=False),
    advice={"attn_implementation": "eager"},  # sdpa leaves out the soft cap on attention scores.
)
_PHI = Family(
    ("model.layers",),
    {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.dense": "output",
    },
    {"mlp.fc1": "up", "mlp.fc2": "down"},
    ("model.embed_tokens",),
    "lm_head",
)
_PHI3 = Family(
    ("model.layers",),
    {"self_attn.qkv_proj": "query_key_value", "self_attn.o_proj": "output"},
    {"mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
    ("model.embed_tokens",),
    "lm_head",
)
_GPT2 = Family(
    ("transformer.h",),
    {"attn.c_attn": "query_key_value", "attn.c_proj": "output"},
    {"mlp.c_fc": "up", "mlp.c_proj": "down"},
    ("transformer.wte", "transformer.wpe"),
    "lm_head",
    advice={"fan_in_fan_out": True},  # Its matrices are stored [in, out].
)
_GPT_NEOX = Family(
    ("gpt_neox.layers",),
    {"attention.query_key_value": "query_key_value", "attention.dense": "output"},
    _BIGSCIENCE_MLP,
    ("gpt_neox.embed_in",),
    "lm_head",
)
_BLOOM = Family(
    ("transformer.h",),
    {"self_attention.query_key_value": "query_key_value", "self_attention.dense": "output"},
    _BIGSCIENCE_MLP,
    ("transformer.word_embeddings",),
    "lm_head",
    advice={"layout": "padded"},  # Its ALiBi positions come from the attention mask and can't restart in a row.
)
_OPT = Family(
    ("model.decoder.layers",),
    {
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.q_proj": "query",
        "self_attn.out_proj": "output",
    },
    {"fc1": "up", "fc2": "down"},
    ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    "lm_head",
    advice={"layout": "padded"},
)
_BERT_ATTENTION: dict[str, Role] = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
}
_BERT_MLP: dict[str, Role] = {"intermediate.dense": "up", "output.dense": "down"}


def _bert(base: str) -> Family:
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    embeddings = tuple(f"{base}.embeddings.{name}" for name in names)
    return Family((f"{base}.encoder.layer",), _BERT_ATTENTION, _BERT_MLP, embeddings, "")


_DISTILBERT = Family(
    ("distilbert.transformer.layer",),
    {
        "attention.q_lin": "query",
        "attention.k_lin": "key",
        "attention.v_lin": "value",
        "attention.out_lin": "output",
    },
    {"ffn.lin1": "up", "ffn.lin2": "down"},
    ("distilbert.embeddings.word_embeddings", "distilbert.embeddings.position_embeddings"),
    "",
)
_T5_LETTERS: dict[str, Role] = {"q": "query", "k": "key", "v": "value", "o": "output"}
_T5_MLP: dict[str, Role] = {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
_T5 = Family(
    ("encoder.block", "decoder.block"),
    {
        f"layer.{place}.{letter}": role
        for place in ("0.SelfAttention", "1.EncDecAttention")
        for letter, role in _T5_LETTERS.items()
    },
    {f"layer.{place}.DenseReluDense.{name}": role for place in (1, 2) for name, role in _T5_MLP.items()},
    ("shared",),
    "lm_head",
)
_BART_PROJECTIONS: dict[str, Role] = {"k_proj": "key", "v_proj": "value", "q_proj": "query", "out_proj": "output"}
_BART = Family(
    ("model.encoder.layers", "model.decoder.layers"),
    {
        f"{attention}.{name}": role
        for attention in ("self_attn", "encoder_attn")
        for name, role in _BART_PROJECTIONS.items()
    },
    {"fc1": "up", "fc2": "down"},
    ("model.shared", "model.encoder.embed_positions", "model.decoder.embed_positions"),
    "lm_head",
)
_SMOLORA_GPT = Family(
    ("blocks",),
    {
        "attention.W_q": "query",
        "attention.W_k": "key",
        "attention.W_v": "value",
        "attention.W_o": "output",
    },
    {"feed_forward.linear1": "up", "feed_forward.linear2": "down"},
    ("token_embedding", "position_embedding"),
    "lm_head",
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "smollm3": _SMOLLM3,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA,
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "bloom": _BLOOM,
    "opt": _OPT,
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "electra": _bert("electra"),
    "distilbert": _DISTILBERT,
    "t5": _T5,
    "bart": _BART,
    "smolora_gpt": _SMOLORA_GPT,
}
"""By `config.model_type`; `smolora_gpt` is GPTModel in memory (on disk it is gpt2)."""


class ModelRegistry:
    """What is known about a family of models, by its `config.model_type`.

    >>> ModelRegistry.get_target_modules("gpt2")
    ['c_attn', 'c_proj', 'c_fc']
    >>> ModelRegistry.get_special_config("gpt-neox")
    {}
    """

    @staticmethod
    def get_target_modules(model_type: str) -> list[str]:
        """Return the names of the linear layers in a block, each once; a name may be in attention and in the MLP."""
        return list(dict.fromkeys(_iter_leaf_names(_get_family(model_type))))

    @staticmethod
    def get_special_config(model_type: str) -> dict[str, str | bool]:
        """Return advice for the family. Nothing applies it by itself."""
        return dict(_get_family(model_type).advice)


def _iter_leaf_names(family: Family) -> Iterator[str]:
    for path in (*family.attention, *family.mlp):
        yield path.rpartition(".")[2]


def _get_family(model_type: str) -> Family:
    family = FAMILIES.get(model_type.replace("-", "_"))
    if family is None:
        raise ConfigError(
            f"no family '{model_type}' in the registry.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}. "
            "It is the model_type of config.json; the anatomy of a loaded model answers for any other."
        )
    return family
