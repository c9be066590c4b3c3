"""Runs that find answers in contexts, from rows to an adapter that plain peft opens, and answers read back."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

from smolora.adapters.store import load_bundle
from smolora.config import DataConfig, EvaluationConfig, ExperimentConfig, LoRAConfig, ModelConfig, TrainingConfig
from smolora.data.collate import get_data_collator
from smolora.errors import DataError
from smolora.models.loading import load_model
from smolora.recipes.finetune import finetune, load_base, open_tuning, read_rows, show_examples
from smolora.records.staging import hash_folder
from smolora.training.loss import sum_cross_entropy, target_logits_of
from tests.tiny import ENCODERS, save_tiny_encoder, save_tiny_model, sweep

PLACES = ("river", "mill", "log", "mat")


def write_rows(folder: Path, count: int = 40, sentences: int = 1) -> Path:
    questions = []
    for number in range(count):
        place, name = PLACES[number % 4], f"dog {number}"
        context = f"the {name} sat on the {place}. " + "it went away. " * (sentences - 1)
        found = [{"text": place, "answer_start": context.index(place)}] if number % 5 else []
        question = {"id": str(number), "question": "where?", "answers": found}
        questions.append({"context": context, "qas": [question]})
    file = folder / "squad.json"
    file.write_text(json.dumps({"version": "2.0", "data": [{"title": "dogs", "paragraphs": questions}]}))
    return file


def settings(tmp_path: Path, family: str = "bert", *, sentences: int = 1, **model) -> ExperimentConfig:
    base = tmp_path / f"base-{family}"
    if not base.exists():
        (save_tiny_encoder if family in ENCODERS else save_tiny_model)(family, base)
    return ExperimentConfig(
        model=ModelConfig(name_or_path=str(base), task_type="qa", **model),
        data=DataConfig(sources=(str(write_rows(tmp_path, sentences=sentences)),)),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(max_steps=4, learning_rate=1e-2, save_steps=2),
        evaluation=EvaluationConfig(verdict_share=0.01),
    )


def heads_of(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    base = load_base(config)[0]
    heads = tuple(f"{head}." for head in base.anatomy.heads)
    return {name: value for name, value in base.model.named_parameters() if name.startswith(heads)}


@pytest.mark.parametrize("family", sweep("bert", slow=("roberta", "distilbert", "gpt2")))
def test_a_run_trains_its_head_whole_and_is_opened_again(family, tmp_path, caplog):
    config = settings(tmp_path, family)
    with caplog.at_level(logging.WARNING):
        run = finetune(config, tmp_path / "run")
    assert not caplog.records
    bundle = load_bundle(tmp_path / "run")
    assert bundle.task == "qa" and bundle.labels == ()
    assert bundle.prompt_format.may_lack_answer  # Every fifth question has none.
    saved, fresh = load_file(run.adapter / "adapter_model.safetensors"), heads_of(config)
    assert {name for name in saved if ".lora_" not in name} == {f"base_model.model.{name}" for name in fresh}
    assert all(not torch.equal(saved[f"base_model.model.{name}"], start) for name, start in fresh.items())


def test_plain_peft_opens_it_with_the_same_logits(tmp_path):
    config = settings(tmp_path)
    run = finetune(config, tmp_path / "run")
    base = AutoModelForQuestionAnswering.from_pretrained(config.model.name_or_path)
    plain = peft.PeftModelForQuestionAnswering.from_pretrained(base, run.adapter).eval()
    tuning, bundle = open_tuning(config), load_bundle(tmp_path / "run")
    batch = get_data_collator("padded", "qa")([tuning.data.train[index] for index in range(5)])
    with torch.no_grad():
        ours = target_logits_of(bundle.model.eval(), "qa")(bundle.model, batch)
        theirs = plain.get_base_model()(  # peft's own forward drops the segments.
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
        )
    for side, logits in enumerate((theirs.start_logits, theirs.end_logits)):
        assert torch.equal(ours[side::2][batch.candidates], logits[batch.candidates])
        assert ours[side::2][~batch.candidates].eq(float("-inf")).all()


def test_segments_reach_the_model_through_the_adapter(tmp_path):
    tuning = open_tuning(settings(tmp_path))
    model, batch = tuning.bundle.model.eval(), get_data_collator("padded", "qa")([tuning.data.train[0]])
    assert batch.token_type_ids is not None and batch.token_type_ids.any()
    blind = replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))
    with torch.no_grad():
        seen, unseen = (target_logits_of(model, "qa")(model, one) for one in (batch, blind))
    assert not torch.equal(seen, unseen)


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path):
    config = settings(tmp_path, sentences=9)
    whole = finetune(config, tmp_path / "whole")
    finetune(config, tmp_path / "half")
    for folder in (tmp_path / "half" / "step-000004", tmp_path / "half" / "adapter_checkpoint"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = finetune(config, tmp_path / "half", resume=True)
    assert hash_folder(resumed.adapter) == hash_folder(whole.adapter)


def test_the_loss_is_that_of_the_allowed_positions_alone(tmp_path):
    tuning = open_tuning(settings(tmp_path))
    model, rows = tuning.bundle.model.eval(), [tuning.data.train[index] for index in range(6)]
    total = torch.zeros(())
    with torch.no_grad():
        for row in rows:
            batch = get_data_collator("padded", "qa")([row])
            found = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
            )
            for logits, label in zip((found.start_logits, found.end_logits), row.labels, strict=True):
                allowed = torch.tensor(row.is_target)
                total -= logits[0, allowed].log_softmax(0)[allowed[: int(label)].sum()]
        batch = get_data_collator("padded", "qa")(rows)
        ours = sum_cross_entropy(target_logits_of(model, "qa")(model, batch), batch.targets)
    torch.testing.assert_close(ours, total)


def test_a_base_in_half_precision_has_a_head_in_float32_that_moves(tmp_path):
    config = settings(tmp_path, dtype="bfloat16")
    saved, fresh = load_file(finetune(config, tmp_path / "run").adapter / "adapter_model.safetensors"), heads_of(config)
    assert {value.dtype for value in fresh.values()} == {torch.float32}
    assert all(not torch.equal(saved[f"base_model.model.{name}"], start) for name, start in fresh.items())


def test_a_base_that_had_three_labels_has_two_outputs_for_answers(tmp_path):
    save_tiny_encoder("bert", tmp_path / "base", num_labels=3)
    assert load_model(tmp_path / "base", task="qa").model.qa_outputs.out_features == 2


def test_an_answer_elsewhere_is_rejected_with_its_number_and_the_reason(tmp_path):
    config = settings(tmp_path)
    file = Path(config.data.sources[0])
    file.write_text(file.read_text().replace('"answer_start": 21', '"answer_start": 20', 1))
    with pytest.raises(DataError, match=r"squad.json:2: .*'mill' isn't at character 20"):
        read_rows(config)


def test_examples_are_shown_with_their_answer_as_what_is_learned(tmp_path):
    shown = show_examples(settings(tmp_path), count=2)
    assert [[text for text, is_learned in one if is_learned] for one in shown] == [["[CLS]"], ["mill"]]
    assert "".join(text for text, _ in shown[1]) == "[CLS]where?[SEP]the dog 1 sat on the mill. [SEP]"
