"""A checkpoint brings everything back, fits nothing else, and is whole or not there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.config import GPTConfig, LoRAConfig
from smolora.config.adapter import METHODS
from smolora.errors import DataError, ModelError, StorageError
from smolora.models.building import build_gpt
from smolora.models.loading import load_model
from smolora.records.staging import find_damage
from smolora.training.checkpoint import RunIdentity, TrainingSnapshot, load_checkpoint, save_checkpoint
from tests.full_disk import files_of_at_most
from tests.tiny import save_tiny_encoder, tiny_bundle

IDENTITY = RunIdentity(base="b", tokenizer="t", data="d", held_out="h", settings="s")
SNAPSHOT = TrainingSnapshot(
    optimizer={"w.step": torch.tensor(3.0), "w.exp_avg": torch.arange(6.0).reshape(2, 3)},
    state={"step": 3, "best_eval_loss": 0.1 + 0.2, "best_step": None, "checksums": {"w": 7}},
    callbacks={"EarlyStoppingCallback-0": {"best": None}},
    callback_tensors={},
)


@pytest.fixture
def build(tokenizer):
    """Return a function that builds a GPT of another seed or shape."""

    def build(seed=0, **shape):
        return build_gpt(
            GPTConfig(**{"num_layers": 1, "num_heads": 2, "width": 8, "context": 16, **shape}), tokenizer, seed=seed
        )

    return build


def parameters(bundle):
    return {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}


@pytest.mark.parametrize("method", ["lora", "ia3", "pissa", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_head_comes_back_with_the_rest_of_its_adapter(tmp_path, method):
    base = load_model(save_tiny_encoder("bert", tmp_path / "base"), task="classification", labels=("no", "yes"))
    bundle = attach_adapter(base, METHODS[method](), seed=0)
    trained = {name: p for name, p in bundle.model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    saved = {name: parameter.detach().clone() for name, parameter in trained.items()}
    save_checkpoint(tmp_path / "step", bundle, SNAPSHOT, IDENTITY)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    load_checkpoint(tmp_path / "step", bundle)
    for name, parameter in trained.items():
        assert torch.equal(parameter, saved[name]), name


def test_weights_come_back_bit_by_bit(build, tmp_path):
    saved, other = build(seed=0), build(seed=1)
    save_checkpoint(tmp_path / "step", saved, SNAPSHOT, IDENTITY)
    load_checkpoint(tmp_path / "step", other)
    assert_close(parameters(other), parameters(saved), rtol=0, atol=0)


def test_optimizer_state_and_callbacks_come_back_equal(build, tmp_path):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    found = load_checkpoint(tmp_path / "step", build())
    assert_close(found.optimizer, SNAPSHOT.optimizer, rtol=0, atol=0)
    assert (found.state, found.callbacks) == (SNAPSHOT.state, SNAPSHOT.callbacks)


def test_an_adapter_comes_back_bit_by_bit_and_leaves_the_base(tmp_path):
    first, second = (
        attach_adapter(tiny_bundle("llama", tmp_path / f"base-{seed}"), LoRAConfig(r=2), seed=seed) for seed in (1, 2)
    )
    base = {name: value for name, value in parameters(second).items() if ".lora_" not in name}
    save_checkpoint(tmp_path / "step", first, SNAPSHOT, IDENTITY)
    load_checkpoint(tmp_path / "step", second)
    assert_close(parameters(second), parameters(first), rtol=0, atol=0)
    assert_close({name: parameters(second)[name] for name in base}, base, rtol=0, atol=0)


def test_the_tensors_of_callbacks_come_back(build, tmp_path):
    tensors = {"X-0": {"w": torch.arange(3.0), "a.b": torch.ones(2, 2)}, "X-1": {"w": torch.zeros(1)}}
    save_checkpoint(tmp_path / "step", build(), dataclasses.replace(SNAPSHOT, callback_tensors=tensors), IDENTITY)
    assert_close(load_checkpoint(tmp_path / "step", build()).callback_tensors, tensors, rtol=0, atol=0)


def test_a_checkpoint_is_whole_and_has_exactly_four_files(build, tmp_path):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    names = {file.name for file in (tmp_path / "step").iterdir()}
    assert names == {"model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"}
    assert find_damage(tmp_path / "step") is None


def test_tied_weights_are_written_once(build, tmp_path):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    assert "lm_head.weight" not in load_file(tmp_path / "step" / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_layers": 2}, r"holds other tensors than this model: \['blocks\.1\."),
        ({"width": 16}, r"token_embedding\.weight is \[257, 8\], the model's \[257, 16\]"),
    ],
)
def test_the_tensors_of_another_model_are_refused_before_any_is_copied(build, tmp_path, shape, message):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    other = build(**shape)
    before = parameters(other)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path / "step", other)
    assert_close(parameters(other), before, rtol=0, atol=0)


def test_a_tensor_of_another_shape_at_the_end_leaves_the_first_ones(build, tmp_path):
    save_checkpoint(tmp_path / "step", build(seed=0), SNAPSHOT, IDENTITY)
    file = tmp_path / "step" / "model.safetensors"
    save_file({**load_file(file), "ln_final.weight": torch.zeros(9)}, file)
    other = build(seed=1)
    before = parameters(other)
    with pytest.raises(ModelError, match=r"ln_final\.weight is \[9\]"):
        load_checkpoint(tmp_path / "step", other)
    assert_close(parameters(other), before, rtol=0, atol=0)


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    first, second = (
        attach_adapter(tiny_bundle("llama", tmp_path / f"base-{r}"), LoRAConfig(r=r), seed=0) for r in (2, 4)
    )
    save_checkpoint(tmp_path / "step", first, SNAPSHOT, IDENTITY)
    with pytest.raises(ModelError, match="and this base takes"):
        load_checkpoint(tmp_path / "step", second)


def test_its_own_identity_is_taken(build, tmp_path):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    IDENTITY.require(tmp_path / "step")


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("base", ModelError),
        ("tokenizer", ModelError),
        ("data", DataError),
        ("held_out", DataError),
        ("settings", ModelError),
    ],
)
def test_another_identity_is_refused_by_name(build, tmp_path, field, error):
    save_checkpoint(tmp_path / "step", build(), SNAPSHOT, IDENTITY)
    with pytest.raises(error, match=f"written with other {field.replace('_', '-')}"):
        RunIdentity(**{**vars(IDENTITY), field: "other"}).require(tmp_path / "step")


@pytest.mark.parametrize(
    ("width", "moments", "size"),
    [(32, 1, 4_000), (2, 100_000, 100_000), (2, 1, 20)],
    ids=["weights", "optimiser", "first byte"],
)
def test_a_disk_that_is_full_is_a_storage_error_and_leaves_nothing(build, tmp_path, width, moments, size):
    bundle = build(width=width)
    snapshot = dataclasses.replace(SNAPSHOT, optimizer={"w.exp_avg": torch.zeros(moments)})
    with files_of_at_most(size), pytest.raises(StorageError) as caught:
        save_checkpoint(tmp_path / "step-000001", bundle, snapshot, IDENTITY)
    assert str(caught.value).startswith(f"can't write {tmp_path / 'step-000001'}")
    assert "File too large" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
