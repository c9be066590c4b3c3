from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import CanineConfig, CanineForSequenceClassification, EsmConfig, EsmForSequenceClassification

from smolora.config.model import GPTConfig
from smolora.data.prompts import PromptFormat
from smolora.errors import ModelError
from smolora.models.anatomy import build_anatomy
from smolora.models.bundle import ModelBundle, count_parameters, print_trainable_parameters
from smolora.models.gpt import GPTModel
from smolora.models.wrapper import BaseModelWrapper
from tests.tiny import CONTEXT, FAMILIES, save_tiny_model, tiny_bundle, tiny_model, tiny_tokenizer


def bundle_of(model):
    return ModelBundle(model, tiny_tokenizer(), build_anatomy(model), source="memory", fingerprint="")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_read_from_any_family(family):
    # bloom's ALiBi positions have no end.
    assert bundle_of(tiny_model(family)).context == (None if family == "bloom" else CONTEXT)


def test_the_context_of_the_gpt_to_read_is_its_config_s():
    bundle = bundle_of(GPTModel(GPTConfig(context=40, vocab_size=288)))
    assert bundle.context == 40
    assert bundle.eos_token_ids == (0,)
    assert bundle.dtype == torch.float32
    assert bundle.device == torch.device("cpu")


def test_every_end_of_text_counts_once():
    bundle = bundle_of(tiny_model("llama"))
    bundle.model.generation_config.eos_token_id = [7, 5]
    assert bundle.eos_token_ids == (7, 5, 0)
    bundle.model.generation_config.eos_token_id = 0
    assert bundle.eos_token_ids == (0,)
    bundle.model.generation_config.eos_token_id = None
    assert bundle.eos_token_ids == (0,)


@pytest.mark.parametrize(("kind", "expected"), [("messages", (0, 288)), ("text", (0,))])
def test_the_end_of_a_turn_is_one_of_a_model_that_learned_conversations(kind, expected):
    bundle = bundle_of(tiny_model("llama"))
    bundle.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    template = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    fmt = PromptFormat(kind=kind, columns={kind: kind}, chat_template=template)
    assert replace(bundle, prompt_format=fmt).eos_token_ids == expected


def test_parameters_are_counted_as_scalars_and_tied_ones_once(capsys):
    model = GPTModel(GPTConfig(num_layers=1, num_heads=1, width=4, context=8, vocab_size=10, bias=True))
    blocks = 4 * (4 * 4 + 4) + (4 * 16 + 16) + (16 * 4 + 4) + 2 * 8
    assert count_parameters(model) == (40 + 32 + blocks + 8, 40 + 32 + blocks + 8)
    model.token_embedding.requires_grad_(False)
    bundle = bundle_of(model)
    assert bundle.num_parameters - bundle.num_trainable_parameters == 40
    print_trainable_parameters(bundle)
    assert capsys.readouterr().out == f"{32 + blocks + 8:,} of {80 + blocks:,} parameters are trained (87.65 %)\n"


def test_the_dtype_is_the_base_s(tmp_path):
    assert tiny_bundle("llama", tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_wrapper_opens_the_same_bundle(tmp_path, capsys):
    wrapper = BaseModelWrapper(str(save_tiny_model("opt", tmp_path)))
    assert wrapper.model is wrapper.bundle.model
    assert wrapper.tokenizer is wrapper.bundle.tokenizer
    wrapper.print_trainable_parameters()
    assert "parameters are trained" in capsys.readouterr().out


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_model_without_embeddings_of_tokens_reads_any():
    bundle_of(CanineForSequenceClassification(CanineConfig(**SIZES))).require_embedding(0x10FFFF)


def test_the_embeddings_are_counted_in_the_model_whatever_its_config_says():
    model = EsmForSequenceClassification(EsmConfig(**SIZES, vocab_size=33, pad_token_id=1, mask_token_id=32))
    model.config.vocab_size = None
    bundle_of(model).require_embedding(32)
    with pytest.raises(ModelError, match="has embeddings of 33 tokens, 0 to 32"):
        bundle_of(model).require_embedding(33)
