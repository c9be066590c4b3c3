"""Runs of tasks beside causal language models, from rows to an adapter that is opened again."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from smolora.adapters.store import load_bundle
from smolora.config import (
    DataConfig,
    DynamicLoRAConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoRAConfig,
    ModelConfig,
    SpeedConfig,
    TrainingConfig,
)
from smolora.data.collate import get_data_collator
from smolora.data.token_dataset import TokenDataset
from smolora.errors import ConfigError, DataError
from smolora.recipes.finetune import encode_data, finetune, load_base, open_tuning, read_rows, show_examples
from smolora.records.metrics_log import MetricsLog
from smolora.records.staging import hash_folder
from smolora.training.loss import target_logits_of
from tests.tiny import ENCODERS, save_tiny_encoder, save_tiny_model, sweep

WORDS = ("good", "fine", "bad", "poor")


def write_rows(folder: Path, count: int = 60) -> Path:
    rows = [{"text": f"the {WORDS[i % 4]} dog {i}", "label": "yes" if i % 4 < 2 else "no"} for i in range(count)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save_base(family: str, folder: Path) -> Path:
    return save_tiny_encoder(family, folder) if family in ENCODERS else save_tiny_model(family, folder)


def settings(tmp_path: Path, family: str = "bert", **training) -> ExperimentConfig:
    base = tmp_path / f"base-{family}"
    return ExperimentConfig(
        model=ModelConfig(
            name_or_path=str(base if base.exists() else save_base(family, base)), task_type="classification"
        ),
        data=DataConfig(sources=(str(write_rows(tmp_path)),)),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(**{"max_steps": 6, "learning_rate": 1e-2, "save_steps": 3, **training}),
        evaluation=EvaluationConfig(verdict_share=0.01),
    )


def read_logits(bundle, config) -> torch.Tensor:
    data = encode_data(config, read_rows(config), load_base(config, ("no", "yes"))[0])
    batch = get_data_collator("padded", bundle.task)([data.train[index] for index in range(5)])
    with torch.no_grad():
        return target_logits_of(bundle.model, bundle.task)(bundle.model.eval(), batch)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "electra", "distilbert", "gpt2", "opt")),
    ],
)
def test_a_classifier_is_trained_and_opened_again_with_its_head_and_labels(family, tmp_path):
    config = settings(tmp_path, family)
    run = finetune(config, tmp_path / "run")
    bundle = load_bundle(tmp_path / "run")
    assert bundle.task == "classification" and bundle.labels == ("no", "yes")
    saved = load_adapter_tensors(run.adapter)
    heads = {name for name in saved if ".lora_" not in name}
    assert heads == {
        f"base_model.model.{name}"
        for name, _ in load_base(config, ("no", "yes"))[0].model.named_parameters()
        if name.startswith(tuple(f"{head}." for head in bundle.anatomy.heads))
    }
    fresh = dict(load_base(config, ("no", "yes"))[0].model.named_parameters())
    assert all(not torch.equal(saved[name], fresh[name.removeprefix("base_model.model.")]) for name in heads)


def test_the_model_of_another_run_gets_the_head_of_the_task(tmp_path):
    save_tiny_model("gpt2", tmp_path / "pretrained" / "model")
    (tmp_path / "pretrained" / "resolved_config.yaml").write_text("gpt: {}\n")
    config = settings(tmp_path)
    model = config.model.replace(name_or_path=str(tmp_path / "pretrained"))
    assert load_base(config.replace(model=model), ("no", "yes"))[0].labels == ("no", "yes")


def load_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_s_classifier_is_trained_on_packed_rows_that_have_the_logits_of_padded_ones(family, tmp_path):
    config = settings(tmp_path, family)
    tuning = open_tuning(config.replace(model=config.model.replace(dtype="float32")))
    model, rows = tuning.bundle.model.eval(), [tuning.data.train[index] for index in range(7)]
    logits = target_logits_of(model, "classification")
    with torch.no_grad():
        packed, padded = (
            logits(model, get_data_collator(layout, "classification")(rows))[:7] for layout in ("packed", "padded")
        )
    assert tuning.layout == "packed"
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_trained_in_every_phase_keeps_no_late_one_from_skipping_the_layers_below(tmp_path, caplog):
    caplog.set_level("INFO")
    phases = DynamicLoRAConfig(enabled=True, strategy="early,late")
    config = settings(tmp_path, "llama", max_steps=28)
    model = config.model.replace(dtype="float32")
    config = config.replace(model=model, adapter=LoRAConfig(r=2, lora_dropout=0), phases=phases)
    whole = finetune(config, tmp_path / "whole")
    cached = finetune(config.replace(speed=SpeedConfig(prefix_cache_gib=0.01)), tmp_path / "cached")
    assert "4 passes skipped the layers below layer 1" in caplog.text
    found, expected = ([line.get("loss") for line in MetricsLog(run.metrics).read()] for run in (cached, whole))
    assert found == pytest.approx(expected, abs=1e-5)


def test_plain_peft_opens_a_classifier_with_the_same_logits(tmp_path):
    config = settings(tmp_path)
    run = finetune(config, tmp_path / "run")
    bundle = load_bundle(tmp_path / "run")
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name_or_path, num_labels=2)
    plain = peft.PeftModel.from_pretrained(base, run.adapter).eval()
    ours = read_logits(bundle, config)
    data = encode_data(config, read_rows(config), load_base(config, ("no", "yes"))[0])
    batch = get_data_collator("padded", "classification")([data.train[index] for index in range(5)])
    with torch.no_grad():
        theirs = plain(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
        ).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_resumed_classifier_is_bit_equal_to_one_that_never_stopped(family, tmp_path):
    config = settings(tmp_path, family)
    whole = finetune(config, tmp_path / "whole")
    half = tmp_path / "half"
    finetune(config, half)
    for folder in (half / "step-000006", half / "adapter_checkpoint"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = finetune(config, half, resume=True)
    assert hash_folder(resumed.adapter) == hash_folder(whole.adapter)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "electra", "distilbert", "gpt2")),
    ],
)
def test_no_head_is_a_target(family, tmp_path):
    bundle = open_tuning(settings(tmp_path, family)).bundle
    assert bundle.anatomy.heads
    adapted = {name for name, _ in bundle.model.named_parameters() if ".lora_" in name}
    assert adapted and not any(f".{head}." in name for name in adapted for head in bundle.anatomy.heads)


def test_a_head_that_is_named_as_a_target_is_refused_with_the_reason(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(ConfigError, match="classifier.*trained whole"):
        open_tuning(config.replace(adapter=LoRAConfig(target_modules="query,classifier")))


@pytest.mark.parametrize("family", sweep("bert", "llama", slow=("roberta", "gpt2")))
def test_what_fills_up_a_row_changes_no_logit(family, tmp_path):
    config = settings(tmp_path, family)
    bundle = open_tuning(config).bundle
    data = encode_data(config, read_rows(config), load_base(config, ("no", "yes"))[0])
    rows = [data.train[index] for index in range(12)]
    logits = target_logits_of(bundle.model.eval(), bundle.task)
    collate = get_data_collator("padded", bundle.task)
    with torch.no_grad():
        together = logits(bundle.model, collate(rows))
        alone = torch.cat([logits(bundle.model, collate([row])) for row in rows])
        batch = collate(rows)
        batch.input_ids[batch.attention_mask == 0] = rows[0].input_ids[-1].item()
        refilled = logits(bundle.model, batch)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(together, refilled)


def test_labels_of_held_out_rows_that_are_not_learned_are_refused_with_their_counts(tmp_path):
    other = tmp_path / "held_out.jsonl"
    other.write_text('{"text": "a", "label": "yess"}\n{"text": "b", "label": "no"}\n{"text": "c", "label": "yess"}\n')
    config = settings(tmp_path)
    config = config.replace(data=config.data.replace(eval_source=str(other)))
    with pytest.raises(DataError, match=r"'yess' \(2 rows\).*Did you mean 'yes'"):
        open_tuning(config)


def test_of_many_labels_a_refusal_names_some(tmp_path):
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(f'{{"text": "a {number}", "label": "name {number}"}}\n' for number in range(40)))
    config = settings(tmp_path)
    config = config.replace(data=config.data.replace(eval_source=str(config.data.sources[0]), sources=(str(rows),)))
    with pytest.raises(DataError, match=r"Learned are: name 0, .*, name 26 and 20 more\. Correct"):
        open_tuning(config)


def test_a_head_is_called_fresh_where_it_is_trained_and_not_where_an_adapter_brings_it(tmp_path, caplog):
    caplog.set_level("INFO")
    run = finetune(settings(tmp_path, max_steps=2), tmp_path / "run")
    assert caplog.text.count("a fresh head for classification of 2 labels (no, yes): ") == 1
    caplog.clear()
    assert not load_bundle(run.path).has_drawn_head
    assert "fresh head" not in caplog.text


def test_examples_are_shown_with_their_label(tmp_path):
    shown = show_examples(settings(tmp_path))
    assert "".join(text for text, _ in shown[0]).startswith("[CLS]the good dog 0[SEP]")
    assert [text for text, is_learned in shown[0] if is_learned] == ["yes"]


def test_a_row_has_one_target_and_it_is_its_label(tmp_path):
    config = settings(tmp_path)
    tuning = open_tuning(config)
    assert isinstance(tuning.data.train, TokenDataset)
    assert tuning.data.train.num_target_tokens == len(tuning.data.train)
    fmt, rows = tuning.data.rows.fmt, tuning.data.rows.train
    assert [fmt.labels[example.labels[0]] for example in tuning.data.train] == [row.values["label"] for row in rows]
