"""`smolora init`: a file for the data at hand, which `train` takes as it is."""

from __future__ import annotations

import pytest
import yaml

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import save_adapter
from smolora.config import DataConfig, ExperimentConfig, LoRAConfig, ModelConfig, TrainingConfig, resolve_config
from smolora.config.adapter import IA3Config, PromptTuningConfig
from smolora.errors import ConfigError, DataError
from smolora.models.loading import load_model
from smolora.recipes.finetune import finetune
from smolora.recipes.init import init
from smolora.recipes.prepare import prepare
from tests.tiny import CONTEXT, save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("init") / "base")


def _write_rows(folder, count, *, long=()):
    lines = [f"name {number},the cat sat {number}{' the dog sat' * (40 * (number in long))}" for number in range(count)]
    file = folder / "rows.csv"
    file.write_text("\n".join(["mr,ref", *lines]) + "\n")
    return file


def _config(base, file, *, training=None, **data):
    columns = {"prompt_field": "mr", "completion_field": "ref"}
    return ExperimentConfig(
        model=ModelConfig(name_or_path=str(base)),
        data=DataConfig(sources=(str(file),), **columns, **data),
        training=training or TrainingConfig(),
    )


def test_the_file_is_what_was_chosen_and_trains(base, tmp_path):
    out = tmp_path / "run.yaml"
    chosen = init(_config(base, _write_rows(tmp_path, 60), training=TrainingConfig(max_steps=2)), out)
    assert resolve_config(ExperimentConfig, file=out) == chosen
    assert chosen.data.validation_fraction == 0.2
    assert (chosen.training.max_steps, chosen.training.per_device_train_batch_size) == (2, 4)
    run = finetune(resolve_config(ExperimentConfig, file=out), tmp_path / "run")
    assert run.adapter.is_dir()


def test_the_file_says_what_was_found_and_why(base, tmp_path):
    out = tmp_path / "run.yaml"
    init(_config(base, _write_rows(tmp_path, 60)), out)
    text = out.read_text()
    assert "# Found: rows as prompt_completion: prompt from column 'mr', completion from column 'ref'" in text
    assert "# rows read                 60  from 1 file\n# kept                      60\n" in text
    assert f"the model reads {CONTEXT}." in text
    assert "  # Here: 12 of 60 rows.\n  validation_fraction: 0.2\n" in text
    assert "  # Here: 48 rows to learn from; fewer rows are passed over more often.\n  num_train_epochs: 5.0\n" in text
    assert "  # Here: 60 updates in the run.\n  per_device_train_batch_size: 4\n" in text
    assert "  r: 8\n" in text
    assert "\n  #seed: 0\n" in text


def test_the_split_of_a_prepared_folder_is_left_as_it_is(base, tmp_path):
    folder, out = tmp_path / "rows", tmp_path / "run.yaml"
    config = _config(base, folder)
    prepare(_write_rows(tmp_path, 120), folder, config.data)
    columns = {"prompt_field": "prompt", "completion_field": "completion"}
    chosen = init(config.replace(data=config.data.replace(**columns)), out)
    assert chosen.data.validation_fraction == DataConfig().validation_fraction
    assert "Here: 114 rows to learn from" in out.read_text()


def test_rows_past_the_context_are_dropped_by_the_file_and_counted(base, tmp_path):
    out = tmp_path / "run.yaml"
    chosen = init(_config(base, _write_rows(tmp_path, 60, long=(3, 7))), out)
    assert (chosen.data.overlong, chosen.data.max_length) == ("drop", None)
    assert f"Here: 2 rows have more than {CONTEXT} tokens; an answer that is cut" in " ".join(out.read_text().split())


def test_texts_past_the_context_are_cut(base, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "the cat sat {"on the mat " * (40 * (n == 3))}{n}"}}\n' for n in range(60)))
    config = ExperimentConfig(model=ModelConfig(name_or_path=str(base)), data=DataConfig(sources=(str(file),)))
    assert init(config, tmp_path / "run.yaml").data.overlong == "truncate"


def test_the_file_of_a_classifier_trains_too(base, tmp_path):
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\n" + "".join(f"the cat {n},{('good', 'bad')[n % 2]}\n" for n in range(60)))
    model = ModelConfig(name_or_path=str(base), task_type="classification")
    config = ExperimentConfig(model=model, data=DataConfig(sources=(str(file),)), training=TrainingConfig(max_steps=2))
    init(config, tmp_path / "run.yaml")
    resolved = resolve_config(ExperimentConfig, file=tmp_path / "run.yaml")
    assert resolved.model.task_type == "classification"
    assert finetune(resolved, tmp_path / "run").adapter.is_dir()


@pytest.mark.parametrize("method", ["dora", "ia3", "adalora", "layernorm", "prompt_tuning", "full"])
def test_the_file_of_another_method_reads_back(base, tmp_path, method):
    config = _config(base, _write_rows(tmp_path, 60)).replace(adapter={"method": method})
    chosen = init(config, tmp_path / "run.yaml")
    assert resolve_config(ExperimentConfig, file=tmp_path / "run.yaml") == chosen
    assert chosen.adapter.method == method


def test_what_was_set_stays(base, tmp_path):
    given = {"max_length": 40, "overlong": "truncate", "validation_fraction": 0.1}
    file = _write_rows(tmp_path, 60, long=(3,))
    config = _config(base, file, training=TrainingConfig(num_train_epochs=1, learning_rate=1e-3), **given)
    config = config.replace(adapter=LoRAConfig(r=2, lora_alpha=4))
    chosen = init(config, tmp_path / "run.yaml")
    assert {name: chosen.data.__dict__[name] for name in given} == given
    assert (chosen.training.num_train_epochs, chosen.training.learning_rate) == (1, 1e-3)
    assert (chosen.adapter.r, chosen.adapter.lora_alpha) == (2, 4)


@pytest.mark.parametrize("given", [{}, {"validation_fraction": 0.2}])
def test_rows_too_few_to_hold_some_out_are_said(base, tmp_path, given):
    out = tmp_path / "run.yaml"
    chosen = init(_config(base, _write_rows(tmp_path, 30), **given), out)
    assert chosen.data.model_fields_set & {"validation_fraction"} == given.keys()
    assert "# Here: 30 rows are too few to hold some out; without, there is no verdict.\n  #eval_source: null" in (
        out.read_text()
    )


def test_held_out_rows_of_their_own_leave_the_split_alone(base, tmp_path):
    file = _write_rows(tmp_path, 60)
    held_out = tmp_path / "held_out.csv"
    held_out.write_text("mr,ref\nname x,the dog\n")
    chosen = init(_config(base, file, eval_source=str(held_out)), tmp_path / "run.yaml")
    assert "validation_fraction" not in chosen.data.model_fields_set
    assert chosen.training.eval_steps == 15  # A fifth of five passes over 60 rows, 4 an update.


def test_a_file_that_exists_is_left_as_it_is(base, tmp_path):
    out = tmp_path / "run.yaml"
    out.write_text("mine: 1\n")
    with pytest.raises(ConfigError, match="exists, and is left as it is"):
        init(_config(base, _write_rows(tmp_path, 60)), out)
    assert yaml.safe_load(out.read_text()) == {"mine": 1}


def test_a_folder_that_isnt_there_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder .*nowhere to write run.yaml into"):
        init(_config("no-model", tmp_path / "none.csv"), tmp_path / "nowhere" / "run.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [("mr,ref\n", "no row"), ("a,b\n1,2\n", "no column 'mr'"), ("mr,ref\nx\n", "can't be used|no row is left")],
)
def test_data_that_train_would_refuse_leaves_no_file(base, tmp_path, content, message):
    file = tmp_path / "rows.csv"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        init(_config(base, file), tmp_path / "run.yaml")
    assert not (tmp_path / "run.yaml").exists()


def test_virtual_tokens_shorten_the_context_that_rows_are_measured_by(base, tmp_path):
    config = _config(base, _write_rows(tmp_path, 60)).replace(
        adapter=PromptTuningConfig(num_virtual_tokens=CONTEXT - 5), training=TrainingConfig(max_steps=2)
    )
    with pytest.raises(DataError, match="57 are longer than 5 tokens .the context"):
        init(config, tmp_path / "run.yaml")
    roomy = config.replace(adapter=PromptTuningConfig(num_virtual_tokens=4))
    init(roomy, tmp_path / "run.yaml")
    assert f"the model reads {CONTEXT - 4}." in (tmp_path / "run.yaml").read_text()


def test_the_file_of_a_continued_adapter_has_its_method_and_nothing_that_has_no_effect(base, tmp_path):
    save_adapter(attach_adapter(load_model(base), IA3Config(), seed=0), tmp_path / "adapter")
    config = _config(base, _write_rows(tmp_path, 60)).replace(adapter={"path": str(tmp_path / "adapter")})
    chosen = init(config, tmp_path / "run.yaml")
    assert chosen.adapter == IA3Config(path=str(tmp_path / "adapter"))
    assert resolve_config(ExperimentConfig, file=tmp_path / "run.yaml") == chosen
    assert "lora_dropout" not in (tmp_path / "run.yaml").read_text()
