"""The verbs about configurations: init, config."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from smolora.config import ExperimentConfig, PretrainConfig


def test_init_writes_a_file_that_config_resolves(smolora, base, rows, tmp_path):
    out = tmp_path / "run.yaml"
    flags = ["--prompt-field", "mr", "--completion-field", "ref", "--lr", "1e-3"]
    code, stdout, err = smolora("init", "--model", base, "--data", rows, *flags, "-o", out)
    assert (code, stdout) == (0, "")
    assert f"next: smolora train {out} -o RUN" in err
    code, stdout, _ = smolora("config", out)
    resolved = ExperimentConfig(**yaml.safe_load(stdout))
    assert (resolved.training.learning_rate, resolved.training.num_train_epochs) == (1e-3, 5)
    assert resolved.data.sources == (str(rows),)
    assert smolora("init", "--model", base, "--data", rows, *flags, "-o", out)[0] == 2


def test_init_ends_with_the_exit_code_of_train_where_the_data_is_wrong(smolora, base, tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    code, _, err = smolora("init", "--model", base, "--data", tmp_path / "bad.csv", "-o", tmp_path / "run.yaml")
    assert code == 3
    assert "the columns 'a', 'b' fit no form" in err


def test_config_prints_every_setting_of_a_file_a_preset_and_words(smolora, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base_model: m\nlora_r: 2\n")
    code, out, err = smolora("config", file, "--preset", "e2e_mlp", "training.seed=3")
    config = ExperimentConfig(**yaml.safe_load(out))
    assert code == 0
    assert (config.model.name_or_path, config.adapter.r, config.training.seed) == ("m", 2, 3)
    assert config.training.max_steps == 1000
    assert "lora_r is adapter.r" in err


def test_config_of_another_verb_has_its_settings(smolora):
    code, out, _ = smolora("config", "--for", "pretrain", "gpt.width=64")
    assert code == 0
    assert PretrainConfig(**yaml.safe_load(out)).gpt.width == 64
    assert smolora("config", "--for", "pretrain", "--preset", "e2e_mlp")[0] == 2


@pytest.mark.parametrize("kind", ["train", "pretrain", "prepare"])
def test_the_schema_is_one_json_object_on_stdout(smolora, kind):
    code, out, err = smolora("config", "--schema", "--for", kind)
    assert (code, err) == (0, "")
    assert "data" in json.loads(out)["properties"]


def test_a_file_of_another_tool_is_printed_as_ours_and_the_rest_is_listed(smolora, tmp_path):
    file = tmp_path / "other.yml"
    file.write_text("base_model: m\nadapter: lora\nlora_r: 4\nsequence_len: 128\nfancy: 1\noutput_dir: x\n")
    code, out, err = smolora("config", "--import", file)
    (tmp_path / "ours.yaml").write_text(out)
    assert code == 0
    assert f"2 keys of {file} aren't in it:\n  fancy: no counterpart\n" in err
    assert "  # Here: axolotl's default.\n  lr_scheduler_type: cosine\n" in out
    code, out, _ = smolora("config", tmp_path / "ours.yaml")
    assert (code, yaml.safe_load(out)["adapter"]["r"]) == (0, 4)
    assert smolora("config", "--import", file, "training.seed=1")[0] == 2


def test_a_mistake_in_a_file_is_said_with_exit_2(smolora, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\ntraining: {learning_rat: 1}\n")
    code, out, err = smolora("config", file)
    assert (code, out) == (2, "")
    assert "training.learning_rat: no such setting. Did you mean 'learning_rate'?" in err


def test_the_schema_loads_nothing_heavy():
    script = (
        "import sys; from smolora.cli.app import run; run(['config', '--schema']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'peft', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
