"""What a launcher says of a run, by the environment."""

from __future__ import annotations

import pytest

from smolora.errors import ConfigError
from smolora.runtime.launch import asks_to_shard, find_meeting_place, is_main_launched, launched_processes


def test_without_a_launcher_there_is_one_process_and_it_is_the_main_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert launched_processes() == 1
    assert is_main_launched()


@pytest.mark.parametrize(("rank", "is_main"), [("0", True), ("1", False)])
def test_the_first_process_is_the_main_one(monkeypatch, rank, is_main):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert launched_processes() == 2
    assert is_main_launched() == is_main


@pytest.mark.parametrize("text", ["two", "0", "-1", ""])
def test_what_is_no_number_of_processes_is_refused(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number of processes"):
        launched_processes()


def test_a_number_of_processes_without_a_place_to_meet_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"asks for 2 processes, and MASTER_ADDR is not set.* for one process unset"):
        find_meeting_place()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert find_meeting_place() == "10.0.0.1:29500"


def test_accelerate_that_starts_one_process_of_several_is_caught(monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` sets; without several processes there is no MASTER_PORT."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launched_processes() == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="asked for several processes and started only one"):
        launched_processes()


@pytest.fixture
def asked_for_fsdp(monkeypatch):
    for name in ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    return monkeypatch


def test_the_second_version_of_fsdp_shards(asked_for_fsdp):
    asked_for_fsdp.setenv("FSDP_VERSION", "2")
    assert asks_to_shard()
    asked_for_fsdp.setenv("ACCELERATE_USE_FSDP", "false")
    assert not asks_to_shard()


@pytest.mark.parametrize("version", [None, "1"])
def test_another_version_of_fsdp_is_refused_with_what_to_write(asked_for_fsdp, version):
    if version:
        asked_for_fsdp.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match="Write fsdp_version: 2 under fsdp_config"):
        asks_to_shard()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "training.gradient_checkpointing=true"),
    ],
)
def test_a_part_of_fsdp_that_would_not_happen_is_refused(asked_for_fsdp, name, advice):
    asked_for_fsdp.setenv("FSDP_VERSION", "2")
    asked_for_fsdp.setenv(name, "true")
    with pytest.raises(ConfigError, match=advice):
        asks_to_shard()
