"""Skipping frozen layers changes no number: not the losses, not the evaluation, not a resumed run's bits."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.config import DynamicLoRAConfig, LoRAConfig, SpeedConfig, TrainingConfig
from smolora.config.phases import PhaseConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.checkpoint import RunIdentity
from smolora.training.phases import DynamicLoRACallback
from smolora.training.prefix_cache import PrefixCacheCallback
from smolora.training.trainer import Trainer
from tests.full_disk import files_of_at_most
from tests.tiny import tiny_bundle

STEPS = 9  # Three epochs of three steps.


def make_rows():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (12,), generator=draw).tolist()
    return TokenDataset(
        [build_example(torch.randint(1, 288, (n,), generator=draw).tolist(), [(3, n)]) for n in lengths]
    )


class Losses(Callback):
    def __init__(self):
        self.found = []

    def on_step_end(self, trainer, record):
        self.found.append(record.loss)


def train(folder, *callbacks, family="llama", dropout=0.0, run=None, resume=False, layers=(1,), fast=True, **settings):
    bundle = attach_adapter(tiny_bundle(family, folder, **settings), LoRAConfig(lora_dropout=dropout), seed=0)
    for name, parameter in bundle.model.named_parameters():
        if bundle.anatomy.part_of(name).layer not in layers:
            parameter.requires_grad_(False)
    config = TrainingConfig(max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=4, save_steps=1)
    losses = Losses()
    speed = SpeedConfig() if fast else SpeedConfig(row_attention=False, fused_lora=False, fused_blocks=False)
    with fast_path(bundle, speed, is_packed=True):
        Trainer(
            bundle,
            make_rows(),
            config,
            collate=collate_packed,
            eval_dataset=make_rows(),
            run_dir=run,
            identity=RunIdentity(base="b", tokenizer="t", data="d"),
            callbacks=[*callbacks, losses],
        ).train(resume=resume)
    return losses.found, {name: p.detach().clone() for name, p in bundle.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fast", [True, False])
def test_losses_are_those_of_the_whole_model_and_two_of_three_epochs_skip(tmp_path, family, fast):
    cache = PrefixCacheCallback(tmp_path / "cache", 2**20)
    expected, _ = train(tmp_path / "plain", family=family, fast=fast)
    found, _ = train(tmp_path / "cached", cache, family=family, fast=fast)
    assert_close(found, expected, rtol=0, atol=1e-5)  # A row's sums round otherwise in another batch.
    assert cache.num_skipped == 6


def test_a_row_changes_nothing_but_its_own_activations(tmp_path):
    """Without the row's own activations, losses would be off by far more than rounding."""
    cache = PrefixCacheCallback(tmp_path / "cache", 2**20)
    cache._read = lambda width, like: torch.ones(1, sum(cache._lengths), width).cumsum(-1)
    expected, _ = train(tmp_path / "plain")
    found, _ = train(tmp_path / "cached", cache)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 1e-2


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop):
    class Stopped(Exception):
        pass

    class Crash(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == stop:
                raise Stopped

    runs = [RunDir(tmp_path / name) for name in ("whole", "cut")]
    for run in runs:
        run.path.mkdir()
    _, expected = train(tmp_path / "a", PrefixCacheCallback(runs[0].prefix_cache, 2**20), run=runs[0])
    with pytest.raises(Stopped):
        train(tmp_path / "b", PrefixCacheCallback(runs[1].prefix_cache, 2**20), Crash(), run=runs[1])
    _, found = train(tmp_path / "c", PrefixCacheCallback(runs[1].prefix_cache, 2**20), run=runs[1], resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_is_left_on_the_model_and_the_limit_holds(tmp_path):
    cache = PrefixCacheCallback(tmp_path / "cache", 3000)
    train(tmp_path / "base", cache)
    assert (tmp_path / "cache" / "data.bin").stat().st_size <= 3000
    assert cache.num_skipped == 0  # Too small for all rows of any step.


def test_the_end_says_how_many_passes_skipped_what_and_the_bytes_that_are_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path / "base", PrefixCacheCallback(tmp_path / "cache", 2**20))
    kept = (tmp_path / "cache" / "data.bin").stat().st_size / 2**20
    assert f"6 passes skipped the layers below layer 1; {kept:.1f} MiB of activations are kept" in caplog.text


def test_a_limit_that_is_reached_is_said_once_with_the_setting_that_raises_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path / "base", PrefixCacheCallback(tmp_path / "cache", 3000))
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "Raise speed.prefix_cache_gib" in warning
    assert "0 passes skipped the layers below layer 1" in caplog.text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dropout": 0.1}, "set adapter.lora_dropout=0"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"layers": (0, 1)}, "the lowest layer is trained"),
    ],
)
def test_it_is_refused_with_the_reason_where_activations_change(tmp_path, caplog, settings, reason):
    caplog.set_level(logging.INFO)
    cache = PrefixCacheCallback(tmp_path / "cache", 2**20)
    train(tmp_path / "base", cache, **settings)
    assert reason in caplog.text
    assert cache.num_skipped == 0
    assert not (tmp_path / "cache").exists()


def test_a_new_phase_starts_with_an_empty_cache(tmp_path):
    phases = DynamicLoRAConfig(strategy="early,late")
    cache = PrefixCacheCallback(tmp_path / "cache", 2**20)
    expected, _ = train(tmp_path / "plain", DynamicLoRACallback(phases), layers=(0, 1))
    found, _ = train(tmp_path / "cached", DynamicLoRACallback(phases), cache, layers=(0, 1))
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert cache.num_skipped > 0


def test_every_phase_says_that_its_cache_is_full(tmp_path, caplog):
    late, early = PhaseConfig(layers="late"), PhaseConfig(layers="early")
    phases = DynamicLoRAConfig(table=(late, early, late))
    cache = PrefixCacheCallback(tmp_path / "cache", 1000)
    train(tmp_path / "base", DynamicLoRACallback(phases), cache, layers=(0, 1))
    assert caplog.text.count("Raise speed.prefix_cache_gib") == 2


def test_a_run_goes_on_where_its_cache_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").touch()
    expected, _ = train(tmp_path / "plain")
    found, _ = train(tmp_path / "cached", PrefixCacheCallback(tmp_path / "file" / "cache", 2**20))
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert "the cache of frozen layers is given up" in caplog.text


def test_a_run_goes_on_where_the_disk_of_its_cache_is_full(tmp_path, caplog):
    expected, _ = train(tmp_path / "plain")
    cache = PrefixCacheCallback(tmp_path / "cache", 2**20)
    with ExitStack() as full:

        class DiskFills(Callback):
            def on_train_begin(self, trainer):
                full.enter_context(files_of_at_most(3_000))

        found, _ = train(tmp_path / "cached", cache, DiskFills())
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert "the cache of frozen layers is given up, so that no pass skips them: can't write" in caplog.text
