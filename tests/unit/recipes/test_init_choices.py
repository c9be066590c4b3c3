"""What init chooses for rows: the longest length, the held-out share, and why."""

from __future__ import annotations

import dataclasses

import pytest

from smolora.config import DataConfig, ExperimentConfig, LoRAConfig, ModelConfig
from smolora.recipes.init_choices import Findings, choose_settings

CONFIG = ExperimentConfig(model=ModelConfig(name_or_path="m"))
FOUND = Findings(
    form="text",
    survives_cut=False,
    rows=2_000,
    held_out=100,
    is_split=True,
    ledger=[],
    too_long=0,
    half=50,
    most=90,
    longest=101,
    context=512,
)


def _choose(config=CONFIG, **found):
    return choose_settings(config, dataclasses.replace(FOUND, **found))


@pytest.mark.parametrize(
    ("found", "max_length", "overlong"),
    [
        ({}, 104, "raise"),
        ({"longest": 511}, 96, "drop"),
        ({"longest": 511, "survives_cut": True}, 96, "truncate"),
        ({"longest": 240}, 240, "raise"),
        ({"longest": 509, "most": 400, "context": 510}, 510, "raise"),
        ({"longest": 101, "context": None}, 104, "raise"),
        ({"too_long": 3, "longest": 510}, None, "drop"),
        ({"too_long": 3, "survives_cut": True}, None, "truncate"),
    ],
)
def test_the_longest_length_follows_the_lengths(found, max_length, overlong):
    data = _choose(**found)[0].data
    assert (data.max_length, data.overlong) == (max_length, overlong)


@pytest.mark.parametrize(
    ("rows", "share"), [(49, None), (50, 0.2), (250, 0.2), (500, 0.1), (1_000, 0.05), (100_000, 0.05)]
)
def test_more_is_held_out_of_few_rows(rows, share):
    chosen, _ = _choose(rows=rows, held_out=min(int(rows * 0.05), 500) if rows >= 50 else 0)
    assert (chosen.data.validation_fraction if "validation_fraction" in chosen.data.model_fields_set else None) == share


def test_updates_are_counted_for_the_rows_that_are_learned_from():
    chosen, reasons = _choose(rows=500, held_out=25)
    assert chosen.training.num_train_epochs == 5
    assert reasons["training.per_device_train_batch_size"] == "565 updates in the run."  # 5 x ceil(450 / 4)


def test_the_adapter_is_written_but_for_one_to_continue():
    assert _choose()[0].adapter.model_fields_set == {"method", "r", "lora_alpha", "target_modules"}
    going_on = CONFIG.replace(adapter=LoRAConfig(path="run"))
    assert _choose(going_on)[0].adapter.model_fields_set == {"path"}


def test_no_reason_is_given_for_what_was_set():
    config = CONFIG.replace(data=DataConfig(max_length=64, overlong="drop", validation_fraction=0.3))
    chosen, reasons = _choose(config, too_long=4)
    assert chosen.data == config.data
    assert not [path for path in reasons if path.startswith("data.")]
