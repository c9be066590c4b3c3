"""Rows end with a token that the model can tell from the others, or the run says that answers won't stop."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smolora.models.end_token import choose_end_token, count_twins
from smolora.models.loading import load_model
from tests.tiny import FAMILIES, tiny_bundle

MODEL = Path(os.environ.get("SMOLORA_SHARED", Path(__file__).parents[3].parent / "shared")) / "models" / "stories260K"


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle("llama", tmp_path / "base")


def merge_rows(bundle, token_ids):
    """Give the tokens one row of the head, as a pretraining that never showed them does."""
    with torch.no_grad():
        weight = bundle.model.get_output_embeddings().weight
        weight[token_ids] = weight[token_ids[0]] * (1 + 0.01 * torch.randn(len(token_ids), 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_end_of_text_token_is_kept(family, tmp_path):
    assert choose_end_token(tiny_bundle(family, tmp_path / "base")) is None


def test_an_end_token_of_the_generation_config_stands_in_for_one_that_was_never_trained(bundle, caplog):
    caplog.set_level("INFO", logger="smolora")
    eos = bundle.tokenizer.eos_token_id
    merge_rows(bundle, [eos, 20, 30])
    bundle.model.generation_config.eos_token_id = [eos, 40]
    assert choose_end_token(bundle) == bundle.tokenizer.convert_ids_to_tokens(40)
    assert "can't tell '<|endoftext|>' from 2 other tokens" in caplog.text


def test_without_one_the_run_says_that_answers_will_not_stop(bundle, caplog):
    merge_rows(bundle, [bundle.tokenizer.eos_token_id, 20])
    assert choose_end_token(bundle) is None
    assert "hardly ever stop by themselves" in caplog.text


def test_a_head_without_twins_has_none(bundle):
    assert count_twins(bundle.model.get_output_embeddings().weight, 5) == 0


def test_a_model_without_a_head_keeps_the_tokenizers_token(bundle):
    assert choose_end_token(replace(bundle, anatomy=replace(bundle.anatomy, parts=()))) is None


@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no model at {MODEL} (set SMOLORA_SHARED)")
def test_the_real_story_model_ends_with_the_token_it_has_learned():
    assert choose_end_token(load_model(MODEL)) == "<s>"
