"""One process alone, and what a launcher may not ask for. Several are in tests/integration/test_distributed.py."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from smolora.errors import ConfigError
from smolora.training.processes import Processes, join_processes

CPU = torch.device("cpu")


def test_one_process_is_the_main_one_and_has_what_it_gives():
    alone = join_processes(CPU)
    assert (alone.index, alone.count, alone.is_main) == (0, 1, True)
    assert alone.sum(1.5, 2) == [1.5, 2]
    assert alone.gather_values("x") == ["x"]
    assert alone.from_main(lambda: 3) == 3


def test_one_process_keeps_its_gradients():
    parameter = nn.Parameter(torch.zeros(2))
    Processes().sum_gradients([parameter])
    assert parameter.grad is None


def test_an_error_of_one_process_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError), Processes().together():
        raise ZeroDivisionError


def test_a_second_run_of_a_process_is_refused_until_the_first_one_ends():
    refused = pytest.raises(ConfigError, match="another run trains in this process")
    with Processes().together(), refused, Processes().together():
        pass
    with Processes().together():
        pass


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks to use DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asks for mixed_precision: bf16"),
    ],
)
def test_what_accelerate_is_configured_for_and_would_not_happen_is_refused(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        join_processes(CPU)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("has_store", [False, True], ids=["alone", "torchrun"])
def test_a_process_that_the_others_never_join_says_where_it_waited_and_what_to_check(
    monkeypatch, caplog, rank, has_store
):
    caplog.set_level("INFO", logger="smolora")
    monkeypatch.setattr("smolora.training.processes._FIRST_PATIENCE", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if has_store else None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(store is not None))
    given = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=rf"haven't met at 127.0.0.1:{port} in .* unset WORLD_SIZE") as refusal:
        join_processes(CPU)
    assert "keys" not in str(refusal.value)
    assert f"waiting at 127.0.0.1:{port} for all 2 processes" in caplog.text


def test_one_process_that_is_asked_to_shard_keeps_the_model_whole_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not join_processes(CPU).is_sharding
    assert "it stays whole" in caplog.text
