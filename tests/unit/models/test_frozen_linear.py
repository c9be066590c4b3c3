"""Frozen products equal plain ones, packed or not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smolora.models.frozen_linear import FrozenLinear, can_pack, goes_by_onednn, multiply, multiply_by_onednn
from smolora.runtime.device import has_intel_processor


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_both_products_are_the_plain_ones(dtype, packed):
    weights = [draw(48, 32, dtype=dtype), draw(16, 32, dtype=dtype, seed=1)]
    bias = draw(48, dtype=dtype, seed=2)
    linear = FrozenLinear(weights, [bias, None], packed=packed)
    x, grad = draw(70, 32, dtype=dtype, seed=3), draw(70, 64, dtype=dtype, seed=4)
    expected = torch.cat((F.linear(x, weights[0], bias), F.linear(x, weights[1])), dim=1)
    # bfloat16 rounds once per product in either.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(linear.forward(x), expected, rtol=tolerance, atol=tolerance)
    assert_close(linear.backward(grad), grad @ torch.cat(weights), rtol=tolerance, atol=tolerance * 8)


def test_a_float32_base_is_not_held_twice_more():
    assert not FrozenLinear([draw(8, 8)], [None], packed=True)._is_packed


def test_several_weights_that_are_not_packed_become_parts_of_one():
    weights = [draw(48, 32), draw(16, 32, seed=1)]
    expected = torch.cat(weights)
    linear = FrozenLinear(weights, [None, None], packed=False)
    assert len({weight.untyped_storage().data_ptr() for weight in (*weights, linear._forward_weight)}) == 1
    assert torch.equal(torch.cat(weights), expected)


def test_bfloat16_is_packed_where_the_cpu_computes_it_and_float64_never():
    assert can_pack(draw(4, 4, dtype=torch.bfloat16)) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not can_pack(draw(4, 4, dtype=torch.float64))


def test_onednn_multiplies_views_as_the_plain_product_does():
    x, grad, weight = draw(70, 32), draw(70, 48, seed=1), draw(48, 32, seed=2)
    for first, second in ((x, weight), (grad, weight.t()), (grad.t(), x.t())):
        expected = F.linear(first.double(), second.double()).float()
        assert_close(multiply_by_onednn(first, second, None), expected, rtol=1e-5, atol=1e-5)
        assert_close(multiply(first, second), expected, rtol=1e-5, atol=1e-5)


def test_float32_goes_by_onednn_with_avx512_that_isnt_intels_bfloat16_always_and_float64_never():
    has_wide_units = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert goes_by_onednn(draw(2, 2)) == (has_wide_units and not has_intel_processor())
    assert goes_by_onednn(draw(2, 2, dtype=torch.bfloat16))
    assert not goes_by_onednn(draw(2, 2, dtype=torch.float64))
    assert not goes_by_onednn(torch.empty(2, 2, device="meta"))
