"""The class: every order of calls works or says what is missing."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from smolora import ConfigError, DataError, ModelError, SmoLoRA, TrainingConfig
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("api") / "base")


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"the cat sat {number}"}) + "\n" for number in range(30)))
    return file


@pytest.fixture
def trainer(base, data, tmp_path):
    made = SmoLoRA(str(base), str(data), output_dir=str(tmp_path / "out"))
    made.config = made.config.replace(training=TrainingConfig(max_steps=2, per_device_train_batch_size=4))
    return made


def test_the_whole_walk(trainer, capsys):
    trainer.train()
    trainer.save()
    assert (trainer.adapter_checkpoint / "adapter_model.safetensors").is_file()
    assert (trainer.merged_model_path / "model.safetensors").is_file()
    model, tokenizer = trainer.load_model(trainer.merged_model_path)
    assert not model.training
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    answer = trainer.inference("the cat", max_new_tokens=5, do_sample=False)
    assert isinstance(answer, str)
    assert not answer.startswith("the cat")
    out, err = capsys.readouterr()
    assert out == ""
    assert "step" in err


def test_the_default_is_500_steps(base, data):
    assert SmoLoRA(str(base), str(data)).config.training.max_steps == 500


def test_folders_are_where_they_are_promised(trainer, tmp_path):
    assert trainer.adapter_checkpoint == tmp_path / "out" / "adapter_checkpoint"
    assert trainer.merged_model_path == tmp_path / "out" / "final_merged"


def test_making_one_reads_and_writes_nothing(tmp_path):
    SmoLoRA("no/such-model", "no-such-file.csv", output_dir=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_is_the_source_as_rows(trainer):
    assert trainer.dataset.column_names == ["text"]
    assert trainer.dataset.num_rows == 30
    assert trainer.dataset is trainer.dataset


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_a_replaced_dataset_is_what_is_trained_on(trainer, kind):
    trainer.dataset = kind([{"prompt": f"name {number}", "completion": "the cat"} for number in range(9)])
    assert trainer.dataset.num_rows == 9
    trainer.train(callbacks=[])
    assert json.loads(RunDir(trainer.output_dir).data_report.read_text())["read"] == 9


def test_rows_of_prompts_and_completions_are_recognised_under_the_default_field(base, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("prompt,completion\n" + "".join(f"name {number},the cat\n" for number in range(9)))
    trainer = SmoLoRA(str(base), str(data), output_dir=str(tmp_path / "out"))
    assert set(trainer.dataset.column_names) == {"prompt", "completion"}
    trainer.config = trainer.config.replace(training=TrainingConfig(max_steps=1))
    trainer.train(callbacks=[])
    assert json.loads((trainer.adapter_checkpoint / "prompt_format.json").read_text())["kind"] == "prompt_completion"


def test_a_text_field_that_isnt_there_is_refused_with_the_columns(base, data, tmp_path):
    trainer = SmoLoRA(str(base), str(data), text_field="body", output_dir=str(tmp_path / "out"))
    for attempt in (trainer.train, lambda: trainer.dataset):
        with pytest.raises(DataError, match=r"no column 'body'.*'text'"):
            attempt()


def test_asking_before_training_or_loading_says_what_is_missing(trainer):
    with pytest.raises(ModelError, match=r"no model to ask: .*Call train\(\) or load_model\(path\) first"):
        trainer.inference("the cat")


def test_saving_before_training_says_what_is_missing(trainer):
    with pytest.raises(ModelError, match=r"nothing to save: .*Call train\(\) first"):
        trainer.save()


def test_training_where_a_run_is_already_says_what_to_do(trainer):
    trainer.train(callbacks=[])
    with pytest.raises(ConfigError, match=r"already holds a run. Continue it with train\(resume=True\)"):
        trainer.train(callbacks=[])


def test_a_run_can_be_resumed(trainer):
    trainer.train(callbacks=[])
    trainer.config = trainer.config.replace(training=trainer.config.training.replace(max_steps=3))
    trainer.train(resume=True, callbacks=[])
    assert MetricsLog(RunDir(trainer.output_dir).metrics).read()[-1]["step"] == 3


def test_what_was_trained_can_be_asked_without_saving_or_loading(trainer):
    trainer.train(callbacks=[])
    assert isinstance(trainer.inference("the cat", max_new_tokens=3), str)


def test_another_object_on_the_same_folder_asks_and_saves_what_is_there(trainer, base, data):
    trainer.train(callbacks=[])
    again = SmoLoRA(str(base), str(data), output_dir=str(trainer.output_dir))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert again.inference("the cat", **greedy) == trainer.inference("the cat", **greedy)
    again.save()
    assert again.merged_model_path.is_dir()


def test_any_model_can_be_loaded_and_asked_without_training(trainer, base):
    trainer.load_model(base)
    assert trainer.inference("the cat", max_new_tokens=3, temperature=0.5)


def test_a_model_that_isnt_there_is_a_model_error(trainer, tmp_path):
    with pytest.raises(ModelError, match="is no folder"):
        trainer.load_model(tmp_path / "none")
