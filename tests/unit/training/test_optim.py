"""What is decayed, what comes back from a checkpoint, and which tensors have to move."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smolora.adapters.attach import setup_model_with_lora
from smolora.config.adapter import DoRAConfig, IA3Config, LoRAConfig
from smolora.errors import BrokenRunError, ModelError
from smolora.training.optim import (
    build_optimizer,
    optimizer_tensors,
    require_gradients,
    require_movement,
    restore_optimizer,
    tensor_checksums,
    trainable_parameters,
)
from tests.tiny import tiny_model


@pytest.fixture
def parameters():
    """A matrix, a table of three dimensions, a norm and a scalar, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 2), "table": (2, 2, 2), "norm.weight": (4,), "scale": ()}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def copy_of(parameters):
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for name, copy in copies.items():
        copy.grad = parameters[name].grad.clone()
    return copies


def optimizer_of(parameters, *, learning_rate=0.1, weight_decay=0.5):
    return build_optimizer(parameters, learning_rate=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))


def test_only_tensors_that_require_gradients_are_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(trainable_parameters(model)) == ["1.weight", "1.bias"]


def test_tensors_of_two_dimensions_or_more_are_decayed_and_no_others(parameters):
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = {
        group["name"]: ([names[id(parameter)] for parameter in group["params"]], group["weight_decay"])
        for group in optimizer_of(parameters).param_groups
    }
    assert groups == {"decayed": (["matrix", "table"], 0.5), "not_decayed": (["norm.weight", "scale"], 0.0)}


@pytest.mark.parametrize(
    ("config", "decayed"),
    [(LoRAConfig(r=1), {"lora_A", "lora_B"}), (IA3Config(), set()), (DoRAConfig(r=1), {"lora_A", "lora_B"})],
)
def test_factors_of_rank_1_are_decayed_and_ia3_s_vectors_are_not(config, decayed):
    parameters = trainable_parameters(setup_model_with_lora(tiny_model("llama"), config))
    names = {id(parameter): name.split(".")[-3] for name, parameter in parameters.items()}
    groups = {group["name"]: group["params"] for group in optimizer_of(parameters).param_groups}
    assert {names[id(parameter)] for parameter in groups.get("decayed", [])} == decayed
    assert sum(map(len, groups.values())) == len(parameters)


@pytest.mark.parametrize(("kept", "groups"), [("matrix", ["decayed"]), ("scale", ["not_decayed"])])
def test_a_group_without_tensors_is_left_out(parameters, kept, groups):
    optimizer = optimizer_of({kept: parameters[kept]})
    assert [group["name"] for group in optimizer.param_groups] == groups


def test_an_update_is_adamws(parameters):
    expected = {}
    for name, parameter in parameters.items():
        decay = 1 - 0.1 * (0.5 if parameter.dim() >= 2 else 0.0)
        # Bias correction makes the first update the gradient's sign.
        expected[name] = parameter.detach() * decay - 0.1 * parameter.grad / (parameter.grad.abs() + 1e-8)
    optimizer_of(parameters).step()
    assert_close({name: parameter.detach() for name, parameter in parameters.items()}, expected)


def test_an_optimizer_that_was_restored_takes_the_same_step(parameters):
    first = optimizer_of(parameters)
    for _ in range(3):
        first.step()
    copies = copy_of(parameters)
    second = optimizer_of(copies)
    restore_optimizer(second, copies, optimizer_tensors(first, parameters))
    first.step()
    second.step()
    assert_close(dict(copies), dict(parameters), rtol=0, atol=0)


def test_a_restored_state_is_a_copy(parameters):
    first = optimizer_of(parameters)
    first.step()
    tensors = optimizer_tensors(first, parameters)
    copies = copy_of(parameters)
    second = optimizer_of(copies)
    restore_optimizer(second, copies, tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    second.step()
    assert_close(tensors, before, rtol=0, atol=0)


def test_the_state_is_named_after_parameter_and_moment(parameters):
    optimizer = optimizer_of(parameters)
    assert optimizer_tensors(optimizer, parameters) == {}
    optimizer.step()
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(optimizer_tensors(optimizer, parameters)) == sorted(f"{n}.{m}" for n in parameters for m in moments)


def test_the_state_of_a_tensor_that_is_not_trained_is_refused(parameters):
    with pytest.raises(ModelError, match=r"knows norm\.bias, which this run doesn't train"):
        restore_optimizer(optimizer_of(parameters), parameters, {"norm.bias.exp_avg": torch.zeros(4)})


def test_tensors_that_all_moved_pass(parameters):
    before = tensor_checksums(parameters)
    optimizer_of(parameters).step()
    require_movement(parameters, before, 1)


def test_a_tensor_that_stood_still_is_named(parameters):
    before = tensor_checksums(parameters)
    parameters["table"].grad = None
    optimizer_of(parameters).step()
    with pytest.raises(BrokenRunError, match="1 of 4 trainable tensors did not move in 5 updates, first table"):
        require_movement(parameters, before, 5)


def test_a_change_of_one_bit_is_movement():
    parameters = {"w": torch.ones(100)}
    before = tensor_checksums(parameters)
    parameters["w"][57] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    require_movement(parameters, before, 1)


def test_tensors_of_a_type_that_numpy_does_not_know_move_too():
    parameters = {"w": torch.ones(2, 3, dtype=torch.bfloat16)}
    before = tensor_checksums(parameters)
    parameters["w"][1, 2] = 2.0
    require_movement(parameters, before, 1)


def lora(*, moved_a, moved_b):
    """Return the two tensors of an adapter, and their checksums before they moved."""
    tensors = {"x.lora_A.default.weight": torch.ones(2, 2), "x.lora_B.default.weight": torch.zeros(2, 2)}
    before = tensor_checksums(tensors)
    for name, moved in zip(tensors, (moved_a, moved_b), strict=True):
        tensors[name] = tensors[name] + moved
    return tensors, before


def test_a_tensor_that_waits_for_another_may_stand_still_in_a_single_update():
    require_movement(*lora(moved_a=False, moved_b=True), 1, waiting=["x.lora_A.default.weight"])
    with pytest.raises(BrokenRunError, match="first x.lora_A.default.weight"):
        require_movement(*lora(moved_a=False, moved_b=True), 1)


def test_no_tensor_may_stand_still_in_two_updates():
    with pytest.raises(BrokenRunError, match="first x.lora_A.default.weight"):
        require_movement(*lora(moved_a=False, moved_b=True), 2, waiting=["x.lora_A.default.weight"])


def test_a_lora_b_may_not_stand_still_in_a_single_update():
    with pytest.raises(BrokenRunError, match="first x.lora_B.default.weight"):
        require_movement(*lora(moved_a=True, moved_b=False), 1)


def test_a_tensor_without_a_gradient_is_named(parameters):
    parameters["norm.weight"].grad = None
    with pytest.raises(BrokenRunError, match=r"1 of 4 trainable tensors received no gradient, first norm\.weight"):
        require_gradients(parameters)


def test_a_gradient_of_zero_is_a_gradient(parameters):
    for parameter in parameters.values():
        parameter.grad.zero_()
    require_gradients(parameters)
