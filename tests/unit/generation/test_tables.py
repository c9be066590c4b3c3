"""Products by lookups against plain ones, of keys and values that are parts of a larger memory."""

from __future__ import annotations

import pytest
import torch

from smolora.generation.slots import Step
from smolora.generation.tables import Lookups

B, G, Q, L, K = 3, 2, 4, 5, 8


def _parts(dtype=torch.float32):
    """Keys and values [B, G, L, K] of which a cache has more rows, and more tokens of each."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, B + 2, G, L + 3, K, generator=generator)
    return keys[1 : B + 1, :, :L], values.to(dtype)[1 : B + 1, :, :L]


def _lookups(keys, values):
    lookups = Lookups.of(keys, values, Q)
    assert lookups is not None
    return lookups


def test_scores_are_those_of_a_product_also_when_they_are_asked_for_again():
    keys, values = _parts()
    lookups, queries = _lookups(keys, values), torch.randn(B, G, Q, K)
    lookups.score(torch.full_like(queries, 9.0), keys, 1.0)
    torch.testing.assert_close(lookups.score(queries, keys, 0.3), 0.3 * queries @ keys.transpose(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mix_is_that_of_a_product_within_the_rounding_of_its_type(dtype):
    keys, values = _parts(dtype)
    weights = torch.rand(B, G, Q, L).to(dtype)
    mixed = _lookups(keys, values).mix(weights, values)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, (weights.double() @ values.double()).to(dtype))


def test_keys_that_are_no_rows_of_a_table_have_no_lookups():
    keys, values = _parts()
    assert Lookups.of(keys.transpose(2, 3).contiguous().transpose(2, 3), values, Q) is None
    assert Lookups.of(keys, values.contiguous(), Q) is None  # Its rows lie elsewhere than those of the keys.


def test_a_step_makes_lookups_once_for_keys_that_lie_alike_and_anew_for_others():
    step = Step.of_next_tokens([[L - 1]] * B, torch.device("cpu"))
    keys, values = _parts()
    packed = keys.contiguous(), values.contiguous()
    assert step.lookups(keys, values, Q) is step.lookups(*_parts(), Q)
    assert step.lookups(keys, values[..., :3], Q) is None
    for own_keys, own_values in ((keys, values), packed):
        queries, weights = torch.randn(B, G, Q, K), torch.rand(B, G, Q, L)
        lookups = step.lookups(own_keys, own_values, Q)
        torch.testing.assert_close(lookups.score(queries, own_keys, 1.0), queries @ keys.transpose(2, 3))
        torch.testing.assert_close(lookups.mix(weights, own_values), weights @ values)
