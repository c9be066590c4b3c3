"""The layers of a run's configuration, from the words and flags of a command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from smolora.cli.flags import PretrainFlags, TrainFlags, collect_settings
from smolora.cli.run_config import build_config, require_inputs, require_start, split_words
from smolora.config import ExperimentConfig, PretrainConfig, dump_config
from smolora.errors import ConfigError, DataError

TRAIN = TrainFlags(model="m")


def _build(*words, flags=TRAIN, kind=ExperimentConfig, batch_size=None, resumed=None):
    return build_config(kind, words, dataclasses.replace(flags, batch_size=batch_size), resumed=resumed)


def _settings(flags):
    """Return the fields that set the configuration by their path alone."""
    return {field.name for field in dataclasses.fields(flags)} - {"batch_size", "quiet"}


def test_every_train_flag_reaches_its_path():
    flags = TrainFlags(
        model="m",
        data=("a.csv", "b.csv"),
        eval_data="c.csv",
        prompt_field="mr",
        completion_field="ref",
        text_field="t",
        text_pair_field="u",
        label_field="y",
        task="classification",
        method="dora",
        adapter="run",
        epochs=2.0,
        max_steps=3,
        lr=1e-3,
        seed=4,
        r=2,
        target="both",
        max_length=9,
        overlong="drop",
        dtype="float32",
        device="cpu",
        dynamic_lora=True,
        phase_strategy="both->mlp->attn",
        phase1_end=1,
        phase2_end=2,
    )
    config = _build(flags=flags)
    assert len(collect_settings(flags)) == len(_settings(flags))
    assert (config.model.name_or_path, config.model.dtype, config.model.device) == ("m", "float32", "cpu")
    assert (config.data.sources, config.data.eval_source) == (("a.csv", "b.csv"), "c.csv")
    assert (config.data.prompt_field, config.data.completion_field, config.data.text_field) == ("mr", "ref", "t")
    assert (config.data.text_pair_field, config.data.label_field) == ("u", "y")
    assert config.model.task_type == "classification"
    assert (config.data.max_length, config.data.overlong) == (9, "drop")
    phases = config.phases
    assert (phases.enabled, phases.strategy) == (True, "both,mlp,attn")
    assert (phases.phase1_end, phases.phase2_end) == (1, 2)
    assert config.adapter.method == "dora"
    assert (config.adapter.path, config.adapter.r, config.adapter.target_modules) == ("run", 2, "both")
    assert (config.training.num_train_epochs, config.training.max_steps) == (2.0, 3)
    assert (config.training.learning_rate, config.training.seed) == (1e-3, 4)


def test_every_pretrain_flag_reaches_its_path():
    flags = PretrainFlags(
        data=("a.txt",),
        eval_data="b.txt",
        text_field="t",
        tokenizer="bpe",
        layers=3,
        heads=2,
        width=8,
        context=16,
        max_steps=5,
        lr=0.5,
        seed=6,
        dtype="bfloat16",
        device="cpu",
    )
    config = _build(flags=flags, kind=PretrainConfig)
    assert len(collect_settings(flags)) == len(_settings(flags))
    assert (config.data.sources, config.data.eval_source, config.tokenizer.kind) == (("a.txt",), "b.txt", "bpe")
    assert (config.gpt.num_layers, config.gpt.num_heads, config.gpt.width, config.gpt.context) == (3, 2, 8, 16)
    assert (config.training.max_steps, config.training.learning_rate, config.training.seed) == (5, 0.5, 6)
    assert (config.data.text_field, config.dtype, config.device) == ("t", "bfloat16", "cpu")


def test_a_flag_beats_the_file_and_a_word_beats_the_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\ntraining: {seed: 1, learning_rate: 1e-4, max_steps: 7}\n")
    config = _build(str(file), "training.seed=3", flags=TrainFlags(seed=2, lr=0.5))
    assert (config.training.seed, config.training.learning_rate, config.training.max_steps) == (3, 0.5, 7)


def test_a_word_without_a_path_is_the_configuration_file(tmp_path):
    odd = tmp_path / "lr=1.yaml"
    odd.write_text("model: {name_or_path: m}\n")
    assert split_words([str(odd), "a.b=c"]) == (Path(odd), ["a.b=c"])


def test_a_second_file_is_refused_with_a_word_on_data():
    with pytest.raises(ConfigError, match=r"unexpected 'b\.csv'.*Several data files need --data each"):
        split_words(["a.yaml", "b.csv"])


def test_the_batch_size_is_rows_per_step_however_they_are_split():
    config = _build("training.gradient_accumulation_steps=4", batch_size=8)
    assert (config.training.per_device_train_batch_size, config.training.rows_per_step) == (2, 8)


def test_a_batch_size_that_cant_be_split_is_refused():
    with pytest.raises(ConfigError, match="8 rows a step can't be split evenly into gradient_accumulation_steps=3"):
        _build("training.gradient_accumulation_steps=3", batch_size=8)


def test_two_settings_of_the_rows_of_a_step_are_refused():
    with pytest.raises(ConfigError, match="--batch-size and training.per_device_train_batch_size both"):
        _build("training.per_device_train_batch_size=4", batch_size=8)
    with pytest.raises(ConfigError, match="--batch-size and training.per_device_train_batch_size both"):
        _build("micro_batch_size=4", batch_size=8)


@pytest.fixture
def stored(tmp_path):
    """A run that was started with settings of its own."""
    config = _build("training.seed=5", "training.gradient_accumulation_steps=2", batch_size=4)
    (tmp_path / "resolved_config.yaml").write_text(dump_config(config))
    return tmp_path


def test_a_resumed_run_needs_no_word_of_its_settings(stored):
    config = _build(flags=TrainFlags(), resumed=stored)
    assert (config.model.name_or_path, config.training.seed, config.training.rows_per_step) == ("m", 5, 4)


def test_flags_and_words_lie_above_a_resumed_runs_settings(stored):
    config = _build("training.save_steps=3", flags=TrainFlags(max_steps=9), resumed=stored)
    assert (config.training.max_steps, config.training.save_steps, config.training.seed) == (9, 3, 5)


IDLE = {
    "evaluation": {"plateau_factor": 0.3, "early_stopping_threshold": 0.0},
    "data": {"chunk_tokenizer": "m"},
    "phases": {"moments": "reset"},
}


def test_what_changed_nothing_in_a_run_of_an_older_version_is_left_out_with_a_line_when_it_goes_on(stored, caplog):
    caplog.set_level("INFO", logger="smolora")
    file = stored / "resolved_config.yaml"
    before, settings = _build(flags=TrainFlags(), resumed=stored), yaml.safe_load(file.read_text())
    for section, values in IDLE.items():
        settings[section] |= values
    file.write_text(yaml.safe_dump(settings))
    assert _build(flags=TrainFlags(), resumed=stored) == before
    said = "data.chunk_tokenizer, evaluation.plateau_factor, phases.moments"
    assert caplog.messages == [f"{file}: left out, as it changes nothing: {said}"]
    with pytest.raises(ConfigError, match=r"chunk_tokenizer=m would change nothing without chunk_size"):
        _build(str(file), flags=TrainFlags())


def test_what_is_left_out_of_a_run_of_an_older_version_is_not_read_where_it_would_change_something_now(stored):
    file = stored / "resolved_config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["evaluation"]["plateau_factor"] = 0.3
    file.write_text(yaml.safe_dump(settings))
    evaluation = _build("evaluation.plateau_patience=2", flags=TrainFlags(), resumed=stored).evaluation
    assert (evaluation.plateau_patience, evaluation.plateau_factor) == (2, 0.5)


def test_a_file_lies_above_a_resumed_runs_settings_key_by_key(stored, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("training: {save_steps: 3}\n")
    config = _build(str(file), flags=TrainFlags(), resumed=stored)
    assert (config.training.save_steps, config.training.seed) == (3, 5)


@pytest.mark.parametrize(
    ("kind", "flags", "verb"),
    [(ExperimentConfig, TRAIN, "pretrain"), (PretrainConfig, PretrainFlags(), "train")],
)
def test_a_run_of_the_other_verb_is_said_to_be_one_in_a_sentence(tmp_path, kind, flags, verb):
    started = _build() if verb == "train" else PretrainConfig()
    (tmp_path / "resolved_config.yaml").write_text(dump_config(started))
    with pytest.raises(ConfigError, match=f"holds a run of {verb}, which goes on with: smolora {verb} --resume"):
        _build(flags=flags, kind=kind, resumed=tmp_path)


def test_resuming_where_no_run_is_starts_from_the_defaults(tmp_path):
    flags = TrainFlags(model="m", data=("a.csv",))
    assert _build(flags=flags, resumed=tmp_path) == _build(flags=flags)


@pytest.mark.parametrize(
    ("kind", "flags", "missing"),
    [
        (ExperimentConfig, TrainFlags(), "--model and --data"),
        (ExperimentConfig, TrainFlags(data=("a.csv",)), "--model"),
        (ExperimentConfig, TrainFlags(model="m"), "--data"),
        (PretrainConfig, PretrainFlags(), "--data"),
    ],
)
def test_resuming_where_no_run_is_says_so_and_what_a_start_lacks(tmp_path, kind, flags, missing):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no run to resume. .* give {missing} too"):
        _build(flags=flags, kind=kind, resumed=tmp_path)


def test_what_keeps_a_run_from_starting_is_named_by_a_single_process(tmp_path, monkeypatch):
    config = _build(flags=TrainFlags(model="m", data=("nowhere.csv",)))
    with pytest.raises(DataError, match=r"no such file or folder: nowhere\.csv"):
        require_start(config, tmp_path / "new", resume=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_start(config, tmp_path / "new", resume=False)


def test_a_folder_that_holds_a_run_is_refused_before_its_data_is_looked_for(tmp_path):
    config = _build(flags=TrainFlags(model="m", data=("nowhere.csv",)))
    (tmp_path / "resolved_config.yaml").write_text("")
    with pytest.raises(ConfigError, match="already holds a run"):
        require_start(config, tmp_path, resume=False)
    with pytest.raises(DataError, match="no such file"):
        require_start(config, tmp_path, resume=True)


def test_a_column_that_no_row_has_is_named_before_a_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.csv").write_text("mr,ref\na,b\n")
    flags = TrainFlags(model=str(tmp_path), data=(str(tmp_path / "a.csv"),), text_field="txt")
    with pytest.raises(DataError, match="no column 'txt'"):
        require_inputs(_build(flags=flags))


def test_rows_of_an_adapter_that_is_continued_are_judged_by_its_own_task(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.csv").write_text("tokens,tags\na,b\n")
    flags = TrainFlags(model=str(tmp_path), data=(str(tmp_path / "a.csv"),), adapter=str(tmp_path))
    require_inputs(_build(flags=flags))


def test_a_pretraining_run_of_an_older_version_resumes_without_what_pretraining_does_not_read(tmp_path):
    started = _build(flags=PretrainFlags(layers=1), kind=PretrainConfig)
    settings = yaml.safe_load(dump_config(started))
    settings["data"]["max_length"], settings["evaluation"]["verdict_share"] = 64, 0.1
    (tmp_path / "resolved_config.yaml").write_text(yaml.safe_dump(settings))
    assert _build(flags=PretrainFlags(), kind=PretrainConfig, resumed=tmp_path) == started


def test_a_pretraining_run_resumes_with_its_own_settings(tmp_path):
    started = _build("training.save_steps=3", flags=PretrainFlags(layers=1), kind=PretrainConfig)
    (tmp_path / "resolved_config.yaml").write_text(dump_config(started))
    assert _build(flags=PretrainFlags(), kind=PretrainConfig, resumed=tmp_path) == started


def test_rows_and_tokens_of_a_pass_are_not_given_together():
    with pytest.raises(ConfigError, match="--batch-size counts rows"):
        _build("speed.max_tokens_per_batch=512", batch_size=8)


def test_a_strategy_by_flag_replaces_a_table_of_the_file(tmp_path):
    file = tmp_path / "probe.yaml"
    file.write_text("phases: {enabled: false, table: [{groups: mlp}, {start: 5}]}\n")
    flags = TrainFlags(model="m", dynamic_lora=True, phase_strategy="early,late")
    phases = _build(str(file), flags=flags).phases
    assert (phases.is_on, phases.strategy, phases.table) == (True, "early,late", ())
