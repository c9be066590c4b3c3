"""Tiny random models of every family, and a small real tokenizer, for all tests: seeded, float32, made in milliseconds.

folder = save_tiny_model("llama", tmp_path / "base")     # a Hugging Face folder: model.safetensors, config, tokenizer
bundle = tiny_bundle("gpt2", tmp_path / "base")           # the same, opened
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 288
CONTEXT = 64
NUM_LAYERS = 2
EOS_TOKEN = "<|endoftext|>"

_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2, "head_dim": 8}
_GROUPED_BY_WIDTH = {**_ROTARY, "num_key_value_heads": 2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED_BY_WIDTH,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8},
    "phi": _ROTARY,
    "phi3": _GROUPED_BY_WIDTH,
    "gpt2": {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": CONTEXT},
    "gpt_neox": _ROTARY,
    "bloom": {"hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
}
_UNUSUAL: dict[str, dict[str, Any]] = {
    "mixtral": {**_GROUPED, "num_local_experts": 2},
    "phimoe": {**_GROUPED_BY_WIDTH, "num_local_experts": 2, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2_moe": {**_GROUPED_BY_WIDTH, "mlp_only_layers": list(range(NUM_LAYERS))},
    "llama4_text": {**_GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": []},
    "afmoe": {**_GROUPED, "num_dense_layers": NUM_LAYERS},
    "stablelm": _GROUPED_BY_WIDTH,
    "nemotron": _GROUPED,
    "granitemoe_swa": {**_GROUPED_BY_WIDTH, "num_local_experts": 2},
    "minicpm3": {
        **_ROTARY,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "minimax_m3_vl_text": {
        **_GROUPED,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "state_size": 4},
    "jamba": {
        **_GROUPED_BY_WIDTH,
        "num_experts": 2,
        "mamba_d_state": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "rwkv": {
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "context_length": CONTEXT,
    },
    "recurrent_gemma": {**_GROUPED, "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 32},
    "minimax": {**_GROUPED, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": NUM_LAYERS,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 9,
    },
}
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 20,
    },
}
"""Changes that make a tiny phi3 turn all tokens by other angles where one lies past the twentieth."""

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "max_position_embeddings": CONTEXT + VOCAB_SIZE + 1, "type_vocab_size": 1},
    "electra": {**_ENCODER, "embedding_size": 32},
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": NUM_LAYERS,
        "n_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
}
_UNUSUAL_ENCODERS: dict[str, dict[str, Any]] = {
    "xlnet": {"d_model": 32, "n_layer": NUM_LAYERS, "n_head": 4, "d_inner": 48, "summary_last_dropout": 0.0},
}
_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": NUM_LAYERS, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": NUM_LAYERS,
        "decoder_layers": NUM_LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "dropout": 0.0,
        "forced_eos_token_id": 0,  # Else 2, which ends nothing here.
    },
}
FAMILIES = tuple(_SETTINGS)
ENCODERS = tuple(_ENCODERS)
ENCODER_DECODERS = tuple(_ENCODER_DECODERS)
PAD_ID, CLS_ID, SEP_ID = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2
PACKABLE_FAMILIES = tuple(family for family in FAMILIES if family not in ("bloom", "opt"))

_ROOMY = {"hidden_size": 64, "intermediate_size": 128}
WHOLE_BLOCKS: dict[str, dict[str, Any]] = {
    **{family: {**_ROOMY, "head_dim": 16} for family in ("llama", "mistral", "qwen3", "gemma", "gemma2")},
    **{family: dict(_ROOMY) for family in ("qwen2", "phi", "phi3", "gpt_neox")},
    "gpt2": {"n_embd": 64},
    "bloom": {"hidden_size": 64},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
}
"""Changes that make a tiny model wide enough for 4-bit layers, which take inputs in blocks of 64."""

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not HAS_BITSANDBYTES, reason="bitsandbytes isn't installed: pip install 'smolora[quant]'"
)


def sweep(*quick: str, slow: tuple[str, ...]) -> list[Any]:
    """Parameters of a test: some in the default suite, the others among the slow ones."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


_TEXT = (
    "the cat sat on the mat and the dog sat on the log. name: The Eagle, food: Italian, area: riverside. "
    "The Eagle is an Italian place in the riverside area. Where is the other one? "
    "It isn't there; they went away, 12 of 34! "
)


@cache
def _train_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(EOS_TOKEN, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 288 tokens: any text makes the round trip; end of text is token 0; there is no pad token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train_tokenizer()), eos_token=EOS_TOKEN, model_max_length=CONTEXT
    )


def tiny_encoder_tokenizer(*, has_segments: bool = True) -> PreTrainedTokenizerFast:
    """The same byte pairs in BERT's template, [CLS] a [SEP] b [SEP]; its pad token is the last but two."""
    backend = Tokenizer.from_str(_train_tokenizer())
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=CONTEXT,
        model_input_names=names if has_segments else [names[0], names[2]],
    )


def tiny_seq2seq_tokenizer() -> PreTrainedTokenizerFast:
    """The same byte pairs, the end of text behind every text, as T5 has it."""
    backend = Tokenizer.from_str(_train_tokenizer())
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}", pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS_TOKEN, model_max_length=CONTEXT)


def save_tiny_encoder(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny encoder without a head, or an encoder-decoder, and its tokenizer; return the folder."""
    transformers_logging.disable_progress_bar()
    is_encoder = family not in _ENCODER_DECODERS
    settings = {
        **{**_ENCODERS, **_UNUSUAL_ENCODERS, **_ENCODER_DECODERS}[family],
        "vocab_size": VOCAB_SIZE + 3,
        "pad_token_id": PAD_ID,
        "eos_token_id": None if is_encoder else 0,
        "decoder_start_token_id": None if is_encoder else PAD_ID,
        "bos_token_id": None,
        "initializer_range": 0.15,
        **changes,
    }
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (AutoModel if is_encoder else AutoModelForSeq2SeqLM).from_config(config, dtype=torch.float32)
    model.eval().save_pretrained(folder)
    tokenizer = tiny_encoder_tokenizer(has_segments=family in ("bert", "electra")) if is_encoder else None
    (tokenizer or tiny_seq2seq_tokenizer()).save_pretrained(folder)
    return folder


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model, every dropout 0."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.15,  # Not the usual 0.02, so that a small mistake moves the logits of so few layers.
        **_no_dropout(family),
        **{**_SETTINGS, **_UNUSUAL}[family],
        **changes,
    }
    return AutoConfig.for_model(family, **settings)


def _no_dropout(family: str) -> dict[str, float]:
    names = {
        "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "opt": ("dropout", "attention_dropout"),
        "bloom": ("hidden_dropout", "attention_dropout"),
        "gpt_neox": ("hidden_dropout", "attention_dropout"),
    }
    return dict.fromkeys(names.get(family, ("attention_dropout",)), 0.0)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode; every parameter differs from its usual start, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face folder and return the folder.

    The second time it is a copy of the first, in a tenth of the time.
    """
    name = hashlib.sha256(repr((family, seed, dtype, max_shard_size, changes)).encode()).hexdigest()
    kept = Path(_made().name, name)
    if not kept.exists():
        transformers_logging.disable_progress_bar()
        tiny_model(family, seed=seed, **changes).to(dtype).save_pretrained(kept, max_shard_size=max_shard_size)
        tiny_tokenizer().save_pretrained(kept)
    return Path(shutil.copytree(kept, folder, copy_function=shutil.copy, dirs_exist_ok=True))


@cache
def _made() -> TemporaryDirectory[str]:
    """The folder of this process's tiny models; it goes when the process ends."""
    return TemporaryDirectory(prefix="smolora-tiny-")


def tiny_bundle(family: str, folder: Path, **settings: Any) -> Any:
    """Save a tiny model in `folder` and open it as a ModelBundle."""
    from smolora.models.loading import load_model  # Here, since tests of lower layers import this module too.

    return load_model(str(save_tiny_model(family, folder, **settings)))


def random_input_ids(num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids [1, T] without the end of text."""
    return torch.randint(1, VOCAB_SIZE, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
