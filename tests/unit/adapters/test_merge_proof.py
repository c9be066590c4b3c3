from __future__ import annotations

import pytest
import torch

from smolora.adapters import merge_proof
from smolora.adapters.changes import Directed, Experts, LowRank, Replaced, Rescaled, Rows
from smolora.adapters.merge_proof import WeightProof
from smolora.adapters.merged_weights import Update
from smolora.errors import ModelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_and_update(outputs=96, inputs=64, *, dtype=torch.float32, is_transposed=False):
    weight = draw(outputs, inputs).to(dtype)
    update = Update(LowRank(draw(4, inputs, seed=1), draw(outputs, 4, seed=2), 0.5), is_transposed)
    return (weight.T.contiguous() if is_transposed else weight), update


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_weight_that_was_rounded_once_is_proved(dtype, is_transposed):
    weight, update = weight_and_update(dtype=dtype, is_transposed=is_transposed)
    proof = WeightProof()
    proof.check("a.weight", update, weight, update.apply(weight))
    found = proof.conclude(None)
    assert 0 < found.difference <= found.tolerance < 0.1 * found.effect


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_processor_without_products_in_bfloat16_finds_the_same(monkeypatch, is_transposed):
    weight, update = weight_and_update(dtype=torch.bfloat16, is_transposed=is_transposed)
    merged, found = update.apply(weight), []
    for is_native in (True, False):
        monkeypatch.setattr(merge_proof, "has_native_bfloat16", lambda device, answer=is_native: answer)
        proof = WeightProof()
        proof.check("a.weight", update, weight, merged)
        found.append(proof.conclude(None))
    assert found[0].effect == found[1].effect
    assert found[0].difference == pytest.approx(found[1].difference, abs=found[0].effect * 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_that_is_off_by_more_than_rounding_is_noticed(dtype):
    weight, update = weight_and_update(dtype=dtype)
    merged = update.apply(weight)
    merged[17, 5] += 32 * torch.finfo(dtype).eps * merged[17].float().norm() + 1e-3
    with pytest.raises(ModelError, match=r"a\.weight merged isn't base and adapter"):
        WeightProof().check("a.weight", update, weight, merged)


def test_two_rows_that_changed_places_are_noticed():
    weight, update = weight_and_update()
    merged = update.apply(weight)
    merged[[3, 4]] = merged[[4, 3]]
    with pytest.raises(ModelError, match="isn't base and adapter"):
        WeightProof().check("a.weight", update, weight, merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_are_too_large_for_float32_are_held_to_base_and_adapter(dtype):
    weight, update = weight_and_update(dtype=dtype)
    weight *= 1e20
    merged = update.apply(weight)
    WeightProof().check("a.weight", update, weight, merged)
    merged[[3, 4]] = merged[[4, 3]]
    with pytest.raises(ModelError, match="isn't base and adapter"):
        WeightProof().check("a.weight", update, weight, merged)


def test_a_weight_without_its_update_or_with_it_twice_is_noticed():
    weight, update = weight_and_update(dtype=torch.bfloat16)
    for merged in (weight, update.apply(update.apply(weight))):
        with pytest.raises(ModelError, match="isn't base and adapter"):
            WeightProof().check("a.weight", update, weight, merged)


def test_a_square_weight_that_got_the_transposed_update_is_noticed():
    weight, update = weight_and_update(32, 32)
    merged = Update(update.change, is_transposed=True).apply(weight)
    with pytest.raises(ModelError, match="isn't base and adapter"):
        WeightProof().check("a.weight", update, weight, merged)


@pytest.mark.parametrize(
    "change",
    [
        Rows([3, 17], draw(2, 64, seed=4)),
        Replaced(draw(96, 64, seed=4)),
        Rescaled(draw(96, 1, seed=4)),
        Directed(LowRank(draw(4, 64, seed=1), draw(96, 4, seed=2), 0.5), draw(96, seed=4)),
        None,
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_held_to_any_change(change, dtype):
    weight, update = draw(96, 64).to(dtype), Update(change)
    merged = update.apply(weight).clone()
    WeightProof().check("a.weight", update, weight, merged)
    merged[50] += weight[50]
    with pytest.raises(ModelError, match="isn't base and adapter"):
        WeightProof().check("a.weight", update, weight, merged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_matrix_of_each_expert_is_held_to_its_own_change(dtype):
    parts = [LowRank(draw(4, 64, seed=seed), draw(96, 4, seed=seed), 0.5) for seed in (1, 2)]
    weight, update = draw(2, 96, 64).to(dtype), Update(Experts(parts))
    merged = update.apply(weight).clone()
    WeightProof().check("a.experts", update, weight, merged)
    with pytest.raises(ModelError, match="isn't base and adapter"):
        WeightProof().check("a.experts", update, weight, Update(Experts(parts[::-1])).apply(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_held_to_its_change(dtype):
    bias, update = draw(96).to(dtype), Update(Replaced(draw(96, seed=4)))
    merged = update.apply(bias).clone()
    WeightProof().check("a.bias", update, bias, merged)
    merged[50] = bias[50]
    with pytest.raises(ModelError, match=r"a\.bias merged isn't base and adapter"):
        WeightProof().check("a.bias", update, bias, merged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(value):
    weight, update = weight_and_update(dtype=torch.float16)
    merged = update.apply(weight)
    merged[0, 0] = value
    with pytest.raises(ModelError, match=r"a\.weight merged holds NaN or infinity: .* torch\.float16"):
        WeightProof().check("a.weight", update, weight, merged)


def test_a_row_of_one_large_number_is_not_refused_for_its_rounding():
    weight, update = weight_and_update(dtype=torch.bfloat16)
    weight[:, 1:] = 0
    weight[:, 0] = 1 + torch.arange(96) / 128
    update = Update(LowRank(update.change.a * 1e-4, update.change.b, 1.0))
    WeightProof().check("a.weight", update, weight, update.apply(weight))
