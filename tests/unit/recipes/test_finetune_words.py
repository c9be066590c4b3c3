"""Runs that label words, from rows to an adapter that plain peft opens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from smolora.adapters.store import load_bundle
from smolora.config import DataConfig, EvaluationConfig, ExperimentConfig, LoRAConfig, ModelConfig, TrainingConfig
from smolora.data.collate import get_data_collator
from smolora.errors import DataError
from smolora.recipes.finetune import finetune, load_base, open_tuning, read_rows, show_examples
from smolora.records.staging import hash_folder
from smolora.training.loss import sum_cross_entropy, target_logits_of
from tests.tiny import ENCODERS, save_tiny_encoder, save_tiny_model

NAMES = ("Eagle", "Zoe", "Rome", "Mill")


def write_rows(folder: Path, count: int = 40) -> Path:
    rows = [{"tokens": ["the", NAMES[i % 4], "dog", str(i)], "ner_tags": [0, 1 + i % 2, 0, 0]} for i in range(count)]
    file = folder / "words.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(tmp_path: Path, family: str = "bert", **model) -> ExperimentConfig:
    base = tmp_path / f"base-{family}"
    if not base.exists():
        (save_tiny_encoder if family in ENCODERS else save_tiny_model)(family, base)
    return ExperimentConfig(
        model=ModelConfig(name_or_path=str(base), task_type="token_classification", **{"dtype": "float32", **model}),
        data=DataConfig(sources=(str(write_rows(tmp_path)),)),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(max_steps=4, learning_rate=1e-2, save_steps=2),
        evaluation=EvaluationConfig(verdict_share=0.01),
    )


def heads_of(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    base = load_base(config, ("0", "1", "2"))[0]
    heads = tuple(f"{head}." for head in base.anatomy.heads)
    return {name: value for name, value in base.model.named_parameters() if name.startswith(heads)}


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert", "gpt2", "bloom")),
    ],
)
def test_a_run_trains_its_head_whole_and_is_opened_again(family, tmp_path, caplog):
    config = settings(tmp_path, family)
    with caplog.at_level(logging.WARNING):
        run = finetune(config, tmp_path / "run")
    assert not caplog.records
    bundle = load_bundle(tmp_path / "run")
    assert bundle.task == "token_classification" and bundle.labels == ("0", "1", "2")
    saved, fresh = load_file(run.adapter / "adapter_model.safetensors"), heads_of(config)
    assert {name for name in saved if ".lora_" not in name} == {f"base_model.model.{name}" for name in fresh}
    assert all(not torch.equal(saved[f"base_model.model.{name}"], start) for name, start in fresh.items())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_plain_peft_opens_it_with_the_same_logits(family, tmp_path):
    config = settings(tmp_path, family)
    run = finetune(config, tmp_path / "run")
    base = AutoModelForTokenClassification.from_pretrained(config.model.name_or_path, num_labels=3)
    plain = peft.PeftModelForTokenClassification.from_pretrained(base, run.adapter).eval()
    tuning, bundle = open_tuning(config), load_bundle(tmp_path / "run")
    batch = get_data_collator("padded", bundle.task)([tuning.data.train[index] for index in range(5)])
    with torch.no_grad():
        ours = target_logits_of(bundle.model.eval(), bundle.task)(bundle.model, batch)
        theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(ours, theirs.flatten(0, 1)[batch.target_positions])


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path):
    config = settings(tmp_path)
    whole = finetune(config, tmp_path / "whole")
    finetune(config, tmp_path / "half")
    for folder in (tmp_path / "half" / "step-000004", tmp_path / "half" / "adapter_checkpoint"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = finetune(config, tmp_path / "half", resume=True)
    assert hash_folder(resumed.adapter) == hash_folder(whole.adapter)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_words_have_the_logits_of_padded_ones(family, tmp_path):
    tuning = open_tuning(settings(tmp_path, family))
    model, rows = tuning.bundle.model.eval(), [tuning.data.train[index] for index in range(7)]
    logits = target_logits_of(model, "token_classification")
    with torch.no_grad():
        packed, padded = (
            logits(model, get_data_collator(layout, "token_classification")(rows)) for layout in ("packed", "padded")
        )
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_transformers(tmp_path):
    tuning = open_tuning(settings(tmp_path))
    model, rows = tuning.bundle.model.eval(), [tuning.data.train[index] for index in range(3)]
    batch = get_data_collator("padded", "token_classification")(rows)
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.target_positions] = batch.targets
    with torch.no_grad():
        theirs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            labels=labels.view_as(batch.input_ids),
        ).loss
        ours = sum_cross_entropy(target_logits_of(model, "token_classification")(model, batch), batch.targets)
    torch.testing.assert_close(ours / batch.num_target_tokens, theirs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_base_in_half_precision_has_a_head_in_float32_that_moves(family, tmp_path):
    config = settings(tmp_path, family, dtype="bfloat16")
    saved = load_file(finetune(config, tmp_path / "run").adapter / "adapter_model.safetensors")
    fresh = heads_of(config)
    assert {value.dtype for value in fresh.values()} == {torch.float32}
    assert all(not torch.equal(saved[f"base_model.model.{name}"], start) for name, start in fresh.items())


def test_words_that_are_cut_off_are_counted_in_the_report(tmp_path):
    config = settings(tmp_path)
    config = config.replace(data=config.data.replace(max_length=8, overlong="truncate"))
    tuning = open_tuning(config)
    counts = tuning.data.rows.report.encoding("train")
    assert counts.cut_target_tokens > 0
    assert counts.cut_target_tokens + counts.target_tokens == 4 * counts.rows


def test_a_row_with_more_words_than_labels_is_rejected_with_its_line(tmp_path):
    config = settings(tmp_path)
    with Path(config.data.sources[0]).open("a") as file:
        file.write('{"tokens": ["a", "b"], "ner_tags": [1]}\n')
    with pytest.raises(DataError, match="words.jsonl:41: .*2 words, but 1 label"):
        read_rows(config)


def test_examples_are_shown_with_the_label_before_each_word(tmp_path):
    shown = show_examples(settings(tmp_path))[0]
    assert [text for text, is_learned in shown if is_learned] == [" 0:", " 1:", " 0:", " 0:"]
    assert "".join(text for text, is_learned in shown if not is_learned) == "[CLS]the Eagle dog 0[SEP]"
