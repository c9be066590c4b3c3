from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import save_adapter
from smolora.config.adapter import LoRAConfig
from smolora.errors import ConfigError, FolderInUseError, ModelError
from smolora.models.loading import load_model
from smolora.recipes.merge import merge
from smolora.records.run_dir import RunDir
from tests.read_only import run_read_only
from tests.signalled import INTERRUPTED, run_signalled
from tests.tiny import random_input_ids, save_tiny_model


@pytest.fixture
def run(tmp_path):
    """A run with a tiny adapter of random numbers in it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved_config.yaml").write_text("")
    bundle = attach_adapter(load_model(save_tiny_model("llama", tmp_path / "base")), LoRAConfig(), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    save_adapter(bundle, folder / "adapter_checkpoint")
    return folder


def test_a_run_is_merged_into_its_own_folder(run, tmp_path):
    report = merge(run)
    assert report.out == str(run / "final_merged")
    ids = random_input_ids(6)
    merged, base = load_model(run / "final_merged"), load_model(tmp_path / "base")
    assert not torch.allclose(merged.model(ids).logits, base.model(ids).logits)


def test_the_adapter_folder_of_a_run_is_merged_into_the_run(run):
    merge(run / "adapter_checkpoint")
    assert (run / "final_merged/merge_report.json").is_file()


@pytest.mark.parametrize(("here", "source"), [(".", "."), ("model", "..")])
def test_the_adapter_folder_that_one_is_in_is_merged_into_the_run(run, monkeypatch, here, source):
    (run / "adapter_checkpoint" / here).mkdir(exist_ok=True)
    monkeypatch.chdir(run / "adapter_checkpoint" / here)
    merge(Path(source))
    assert (run / "final_merged/merge_report.json").is_file()


def test_a_run_that_is_being_written_is_not_merged_from_within(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run / "adapter_checkpoint")
    with RunDir(run).locked(), pytest.raises(FolderInUseError):
        merge(Path(), tmp_path / "elsewhere")


def test_another_folder_can_be_named(run, tmp_path):
    merge(run, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/model.safetensors").is_file()
    assert not (run / "final_merged").exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_that_may_only_be_read_is_merged_elsewhere(run, tmp_path):
    assert run_read_only(run, merge, run, tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere/model.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_that_asks_to_stop_leaves_nothing(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert run_signalled(signal.SIGTERM, merge, run, tmp_path / "out") == INTERRUPTED
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_that_a_kill_left_in_part_is_no_model(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert run_signalled(signal.SIGKILL, merge, run, out, moving=out / "config.json") == -signal.SIGKILL
    assert (out / "model.safetensors").is_file()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(out)


def test_an_adapter_in_no_run_needs_a_folder(run, tmp_path):
    adapter = (run / "adapter_checkpoint").rename(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="Name one with -o"):
        merge(adapter)


def test_a_base_in_place_of_an_adapter_is_refused_as_one(tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        merge(save_tiny_model("llama", tmp_path / "base"))


def test_a_second_merge_is_refused(run):
    merge(run)
    with pytest.raises(ConfigError, match="final_merged holds config.json already"):
        merge(run)


@pytest.mark.parametrize(("made", "advice"), [("model", "needs no merge"), ("plots", "--resume")])
def test_a_run_without_an_adapter_says_what_to_do(tmp_path, made, advice):
    (tmp_path / "resolved_config.yaml").write_text("")
    (tmp_path / made).mkdir()
    with pytest.raises(ModelError, match=advice):
        merge(tmp_path)
