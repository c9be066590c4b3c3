"""Several adapters on one base: each is asked as it is when it is alone on the base."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import load_bundle, save_adapter
from smolora.adapters.switching import AdapterSwitch
from smolora.config.adapter import METHODS
from smolora.data.prompts import PromptFormat, write_prompt_format
from smolora.errors import ModelError
from smolora.models.loading import load_model
from tests.tiny import random_input_ids, save_tiny_encoder, save_tiny_model
from tests.unit.adapters.conftest import attach_moved, change_json

IDS = random_input_ids(9)
FORMS = [PromptFormat(kind="text", columns={"text": name}) for name in ("base", "adapter")]


def switch(tmp_path):
    return AdapterSwitch(load_model(tmp_path / "base"), {name: tmp_path / name for name in ("one", "two")})


@pytest.fixture
def save_two(tmp_path):
    """Return a function that saves a base and two adapters on it, given how each is made."""

    def save(*attach, form=None):
        base = save_tiny_model("llama", tmp_path / "base")
        for name, make in zip(("one", "two"), attach, strict=True):
            save_adapter(
                replace(make(load_model(base)), prompt_format=form if name == "one" else None), tmp_path / name
            )

    return save


def soft_prompt(length):
    return lambda base: attach_adapter(base, METHODS["prompt_tuning"](num_virtual_tokens=length), seed=length)


@torch.no_grad()
def test_soft_prompts_of_two_lengths_have_their_own_context_and_logits(save_two, tmp_path):
    save_two(soft_prompt(3), soft_prompt(7))
    adapters = switch(tmp_path)
    for name in ("two", "one"):
        alone = load_bundle(tmp_path / name)
        with adapters.opened(name) as bundle:
            assert bundle.context == alone.context
            assert torch.equal(bundle.model(input_ids=IDS).logits, alone.model(input_ids=IDS).logits)


def test_an_adapter_without_a_form_has_the_base_s_and_not_the_first_one_s(save_two, tmp_path):
    save_two(attach_moved, attach_moved, form=FORMS[1])
    write_prompt_format(FORMS[0], tmp_path / "base")
    adapters = switch(tmp_path)
    for name, form in (("one", FORMS[1]), ("two", FORMS[0])):
        with adapters.opened(name) as bundle:
            assert bundle.prompt_format == form


def test_each_classifier_has_its_own_labels(tmp_path):
    folder = save_tiny_encoder("bert", tmp_path / "base")
    base = load_model(folder, task="classification", labels=("no", "yes"))
    for name, labels in (("one", ("no", "yes")), ("two", ("false", "true"))):
        form = PromptFormat(kind="classification", columns={"text": "text", "label": "label"}, labels=labels)
        tuned = attach_moved(load_model(folder, task="classification", labels=labels))
        save_adapter(replace(tuned, prompt_format=form), tmp_path / name)
    adapters = AdapterSwitch(base, {name: tmp_path / name for name in ("two", "one")})
    for name, labels in (("one", ("no", "yes")), ("two", ("false", "true")), ("base", ("no", "yes"))):
        with adapters.opened(name) as bundle:
            assert bundle.labels == labels


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classification", ("a", "b", "c"), "one tells 3 labels apart, and the model is open for 2"),
        ("token_classification", ("no", "yes"), "one is for token_classification, and the model is open for class"),
    ],
)
def test_an_adapter_for_another_head_is_refused(tmp_path, task, labels, message):
    folder = save_tiny_encoder("bert", tmp_path / "base")
    save_adapter(attach_moved(load_model(folder, task=task, labels=labels)), tmp_path / "one")
    base = load_model(folder, task="classification", labels=("no", "yes"))
    with pytest.raises(ModelError, match=message):
        AdapterSwitch(base, {"one": tmp_path / "one"})


@pytest.mark.parametrize("change", [{"bias": "all"}, {"layer_replication": [[0, 2], [0, 1]]}])
def test_an_adapter_that_changes_the_base_itself_is_open_alone_and_never_without(save_peft_pair, tmp_path, change):
    base, adapter = save_peft_pair(target_modules=["q_proj"], **change)
    with pytest.raises(ModelError, match=r"changes the base itself.*Open the base, or each adapter, by itself"):
        AdapterSwitch(load_model(base), {"one": adapter, "two": adapter})
    alone = AdapterSwitch(load_model(base), {"one": adapter})
    with alone.opened("one") as bundle:
        assert torch.equal(bundle.model(input_ids=IDS).logits, load_bundle(adapter).model(input_ids=IDS).logits)
    for adapters in (alone, AdapterSwitch(load_bundle(adapter))):
        with pytest.raises(ModelError, match="changes the base itself"):
            adapters.find("base")


@pytest.mark.parametrize("name", ["one", "two"])
def test_each_adapter_whose_base_was_held_otherwise_is_named(save_two, tmp_path, caplog, name):
    save_two(attach_moved, attach_moved)
    change_json(tmp_path / name / "base_identity.json", quantization="4bit")
    with caplog.at_level(logging.WARNING, logger="smolora"):
        switch(tmp_path)
    assert f"{tmp_path / name} was trained on its base with quantization 4bit" in caplog.text
