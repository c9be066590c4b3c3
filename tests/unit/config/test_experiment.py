"""A configuration is resolved from its layers: defaults, file, flags, assignments; a later one wins."""

from __future__ import annotations

import pytest
import yaml

from smolora.config import (
    ExperimentConfig,
    PrepareConfig,
    PretrainConfig,
    dump_config,
    flatten_settings,
    resolve_config,
)
from smolora.errors import ConfigError

MODEL = "model.name_or_path=x"


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {name_or_path: from-file}\ntraining: {learning_rate: 1e-3, seed: 5}\n")
    return file


def test_a_file_wins_over_defaults_and_reads_1e_3_as_a_number(config_file):
    config = resolve_config(ExperimentConfig, file=config_file)
    assert config.training.learning_rate == 1e-3
    assert config.training.logging_steps == 10


def test_a_flag_wins_over_the_file(config_file):
    config = resolve_config(ExperimentConfig, file=config_file, flags={"training.seed": 6, "training.max_steps": None})
    assert (config.training.seed, config.training.max_steps) == (6, None)


def test_an_assignment_wins_over_a_flag(config_file):
    config = resolve_config(
        ExperimentConfig, file=config_file, flags={"training.seed": 6}, assignments=["training.seed=7"]
    )
    assert config.training.seed == 7


def test_an_assignment_is_read_as_yaml():
    config = resolve_config(ExperimentConfig, assignments=[MODEL, "adapter.target_modules=[q_proj, v_proj]"])
    assert config.adapter.target_modules == ("q_proj", "v_proj")


def test_a_mapping_for_a_section_adds_to_what_was_given_for_it_before():
    flags = {"training.learning_rate": 5e-3, "training.seed": 9}
    words = [MODEL, "training={max_steps: 2, seed: 8}", "adapter.rank_pattern={q_proj: 2}", "adapter={r: 4}"]
    config = resolve_config(ExperimentConfig, flags=flags, assignments=words)
    assert (config.training.learning_rate, config.training.seed, config.training.max_steps) == (5e-3, 8, 2)
    assert (config.adapter.rank_pattern, config.adapter.r) == ({"q_proj": 2}, 4)


def test_a_bare_value_for_a_section_that_was_given_settings_is_refused():
    with pytest.raises(ConfigError, match=r"adapter: 'dora' would replace .* too \(r\)\. .* as adapter\.NAME=VALUE"):
        resolve_config(ExperimentConfig, flags={"adapter.r": 4}, assignments=[MODEL, "adapter=dora"])


def test_an_unknown_path_is_refused_by_name():
    with pytest.raises(ConfigError, match="trainin: no such setting. Did you mean 'training'"):
        resolve_config(ExperimentConfig, assignments=[MODEL, "trainin.seed=1"])


def test_a_word_that_is_no_assignment_is_refused():
    with pytest.raises(ConfigError, match="isn't key.path=value"):
        resolve_config(ExperimentConfig, assignments=["fast"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.max_length=8", r"data.max_length: .* windows of gpt.context tokens \(--context\). Leave it out"),
        ("max_length=8", "data.max_length: pretrain doesn't read it, since the text is cut into windows"),
        ("data.overlong=drop", "data.overlong: pretrain doesn't read it"),
        ("data.prompt_field=q", r"data.prompt_field: .* of the column that data.text_field \(--text-field\) names"),
        ("evaluation.verdict_share=0.5", "evaluation.verdict_share: pretrain doesn't read it, since a run is judged"),
    ],
)
def test_pretraining_refuses_what_it_does_not_read(word, said):
    with pytest.raises(ConfigError, match=said):
        resolve_config(PretrainConfig, assignments=[word])


@pytest.mark.parametrize("word", ["max_length=8", "overlong=drop"])
def test_preparing_refuses_what_counts_tokens(word):
    with pytest.raises(
        ConfigError, match="prepare doesn't read it, since tokens are counted where a model is, by train"
    ):
        resolve_config(PrepareConfig, assignments=[f"data.{word}"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"- a\n- b\n", "it holds a list"),
        (b"", "it is empty"),
        (b"just words", "it holds text"),
        (b"5", "it holds 5"),
        (b"a: b: c", r"it isn't YAML at line 1, column 5 \(mapping values are not allowed here\)"),
        (b'{"a": 1}\n{"a": 2}\n', "it isn't YAML at line 2, column 1"),
        (b"caf\xe9", "it isn't UTF-8 text"),
        (b"\0", "it isn't YAML"),
    ],
)
@pytest.mark.parametrize(
    ("name", "advice"), [("a.yaml", "has sections such as"), ("a.csv", "give it as --data .*a.csv")]
)
def test_a_file_without_settings_is_refused_as_what_it_is(tmp_path, text, problem, name, advice):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=rf"{name} is no configuration file: {problem}\. .*{advice}"):
        resolve_config(ExperimentConfig, file=tmp_path / name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "training: {seed: 1}\nmodel: x\ntraining:\n",
            "'training' stands at line 1, column 1 and again at line 3, col",
        ),
        ("training:\n  seed: 1\n  lr: 1e-3\n  seed: 2\n", "'seed' stands at line 2, column 3 and again at line 4, col"),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused_with_both_places(tmp_path, text, problem):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"twice\.yaml: the key {problem}"):
        resolve_config(ExperimentConfig, file=tmp_path / "twice.yaml")


def test_a_key_that_stands_twice_in_a_word_is_refused():
    with pytest.raises(ConfigError, match=r"'training={seed: 1, seed: 2}': the key 'seed' stands at line 1, column 2"):
        resolve_config(ExperimentConfig, assignments=["training={seed: 1, seed: 2}"])


def test_a_key_may_stand_beside_a_mapping_that_is_merged_in(tmp_path):
    text = "model: x\nphases: {table: [&first {groups: mlp, matrices: A}, {<<: *first, groups: attention}]}\n"
    (tmp_path / "merged.yaml").write_text(text)
    _, second = resolve_config(ExperimentConfig, file=tmp_path / "merged.yaml").phases.table
    assert (second.groups, second.matrices) == (("attention",), "A")


def test_a_value_that_is_no_yaml_is_refused_with_the_place():
    with pytest.raises(ConfigError, match=r"'training.seed=\[1': the value can't be read: it isn't YAML at line 1"):
        resolve_config(ExperimentConfig, assignments=["training.seed=[1"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file .*none\.yaml"):
        resolve_config(ExperimentConfig, file=tmp_path / "none.yaml")
    (tmp_path / "nine.yaml").touch()
    with pytest.raises(ConfigError, match=r"none\.yaml\. Did you mean '.*nine\.yaml'"):
        resolve_config(ExperimentConfig, file=tmp_path / "none.yaml")


def test_a_folder_in_place_of_a_file_is_refused_with_the_words_that_continue_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, not a configuration file\. .*-o .* --resume"):
        resolve_config(ExperimentConfig, file=tmp_path)


def test_pretraining_keeps_its_own_defaults_beside_what_is_set():
    training = resolve_config(PretrainConfig, assignments=["training.seed=3"]).training
    assert (training.seed, training.learning_rate, training.max_steps) == (3, 3e-3, 2000)


def _resolve_training(*words, kind=ExperimentConfig, **layers):
    return resolve_config(kind, assignments=[*([MODEL] if kind is ExperimentConfig else []), *words], **layers).training


@pytest.fixture
def file_of_steps(tmp_path):
    file = tmp_path / "steps.yaml"
    file.write_text("training: {max_steps: 7, seed: 3}\n")
    return file


@pytest.mark.parametrize("given", [{"training.num_train_epochs": 2.0}, {}])
def test_epochs_on_the_command_line_replace_the_steps_of_a_file(file_of_steps, caplog, given):
    caplog.set_level("INFO")
    words = [] if given else ["training.num_train_epochs=2.0"]
    training = _resolve_training(*words, file=file_of_steps, flags=given)
    assert (training.num_train_epochs, training.max_steps, training.seed) == (2.0, None, 3)
    assert caplog.messages == ["training.num_train_epochs = 2.0 replaces training.max_steps = 7"]


def test_epochs_of_a_file_replace_the_steps_that_pretraining_has_by_default(tmp_path):
    (tmp_path / "epochs.yaml").write_text("training: {num_train_epochs: 3}\n")
    training = _resolve_training(kind=PretrainConfig, file=tmp_path / "epochs.yaml")
    assert (training.num_train_epochs, training.max_steps, training.learning_rate) == (3.0, None, 3e-3)


def test_steps_beside_epochs_in_one_file_decide_alone(tmp_path, caplog):
    (tmp_path / "both.yaml").write_text("training: {num_train_epochs: 3, max_steps: 7}\n")
    assert _resolve_training(file=tmp_path / "both.yaml").max_steps == 7
    assert caplog.messages == []


def test_steps_beside_epochs_on_the_command_line_decide_alone_with_a_warning(caplog):
    training = _resolve_training("training.num_train_epochs=2", flags={"training.max_steps": 4})
    assert training.max_steps == 4
    assert caplog.messages == ["training.max_steps = 4 decides alone; training.num_train_epochs = 2 has no effect."]


def test_a_resumed_run_takes_epochs_in_place_of_its_steps(tmp_path):
    (tmp_path / "run.yaml").write_text(dump_config(resolve_config(PretrainConfig)))
    assert _resolve_training(kind=PretrainConfig, base=tmp_path / "run.yaml").max_steps == 2000
    resumed = _resolve_training("training.num_train_epochs=2", kind=PretrainConfig, base=tmp_path / "run.yaml")
    assert (resumed.num_train_epochs, resumed.max_steps) == (2.0, None)


def test_a_section_whose_lines_are_all_commented_out_is_none(tmp_path):
    (tmp_path / "empty.yaml").write_text("training:\n#  seed: 1\n")
    assert _resolve_training("training.seed=2", file=tmp_path / "empty.yaml").seed == 2
    assert _resolve_training(kind=PretrainConfig, file=tmp_path / "empty.yaml").max_steps == 2000


def test_a_value_where_a_section_belongs_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("training: 5\n")
    with pytest.raises(ConfigError, match="training: expected settings, found 5"):
        _resolve_training("training.seed=2", file=tmp_path / "bad.yaml")


def test_what_pretraining_does_not_read_may_stand_at_its_default_as_in_the_file_of_an_older_run():
    stored = PretrainConfig().model_dump(mode="json")
    assert {"max_length", "overlong"} <= stored["data"].keys()
    assert PretrainConfig(**stored) == PretrainConfig()


def test_what_pretraining_does_not_read_is_not_written():
    config = PretrainConfig()
    written = flatten_settings(yaml.safe_load(dump_config(config)))
    assert flatten_settings(config.model_dump()).keys() - written.keys() == config.unread.keys()
    assert PretrainConfig(**yaml.safe_load(dump_config(config))) == config


def test_a_verdict_that_is_required_needs_time():
    words = [MODEL, "evaluation.require=learned", "evaluation.verdict_share=0"]
    with pytest.raises(
        ConfigError, match=r"learned asks for a verdict, and evaluation.verdict_share=0 gives it no time"
    ):
        resolve_config(ExperimentConfig, assignments=words)


def test_a_dumped_configuration_reads_back_equal():
    config = resolve_config(ExperimentConfig, assignments=[MODEL, "training.profile_steps=[2, 3]"])
    assert ExperimentConfig(**yaml.safe_load(dump_config(config))) == config
