"""Products by lookups against plain ones, of keys and values that are parts of a larger memory."""

from __future__ import annotations

import pytest
import torch

from smolora.generation import tables
from smolora.generation.step import Step
from smolora.generation.tables import Lookups

B, G, Q, L, K = 3, 2, 4, 5, 8


def _parts(dtype=torch.float32):
    """Keys and values [B, G, L, K] of which a cache has more rows, and more tokens of each."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, B + 2, G, L + 3, K, generator=generator)
    return keys[1 : B + 1, :, :L], values.to(dtype)[1 : B + 1, :, :L]


def _seen(*lengths):
    """What the queries of rows see that hold so many keys: the last query all of them, the one before one less."""
    last = torch.tensor(lengths)[:, None, None, None] - torch.arange(Q - 1, -1, -1)[:, None]
    return torch.arange(L) < last.clamp(min=1)


def _lookups(keys, values, seen=None):
    lookups = Lookups.of(keys, values, Q, seen)
    assert lookups is not None
    return lookups


def test_scores_are_those_of_a_product_also_when_they_are_asked_for_again():
    keys, values = _parts()
    lookups, queries = _lookups(keys, values), torch.randn(B, G, Q, K)
    lookups.score(torch.full_like(queries, 9.0), keys, 1.0)
    scores = lookups.score(queries, keys, 0.3).view(B, G, Q, L)
    torch.testing.assert_close(scores, 0.3 * queries @ keys.transpose(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mix_is_that_of_a_product_within_the_rounding_of_its_type(dtype):
    keys, values = _parts(dtype)
    weights = torch.rand(B, G, Q, L).to(dtype)
    mixed = _lookups(keys, values).mix(weights.flatten(), values)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, (weights.double() @ values.double()).to(dtype))


@pytest.mark.parametrize("lengths", [(5, 2, 3), (40, 40, 7), (40, 40, 40)])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_queries_attend_to_the_keys_they_see(lengths, default, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_SEEN", 0.8)
    keys, values = _parts()
    seen, queries = _seen(*lengths), torch.randn(B, G, Q, K)
    expected = (queries @ keys.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1) @ values
    torch.set_default_dtype(default)  # As transformers does while it loads a model, perhaps in another thread.
    try:
        lookups = _lookups(keys, values, seen)
        for _ in range(2):  # A layer's scores take the place of the last one's.
            mixed = lookups.mix(lookups.softmax(lookups.score(queries, keys, 1.0)), values)
            torch.testing.assert_close(mixed, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_where_much_is_out_of_sight_it_is_not_read():
    keys, values = _parts()
    seen, queries = _seen(5, 2, 3), torch.randn(B, G, Q, K)
    unseen = ~seen.any(2)[..., None].expand(-1, G, -1, K)
    keys[unseen], values[unseen] = torch.nan, torch.nan
    lookups = _lookups(keys, values, seen)
    scores = lookups.score(queries, keys, 1.0)
    assert len(scores) == seen.sum() * G
    assert lookups.mix(lookups.softmax(scores), values).isfinite().all()


def test_more_rows_than_their_numbers_can_tell_apart_are_not_looked_up():
    keys = torch.empty_strided((2**11, 2**10, 1, 1), (2**20, 2**10, 1, 1), device="meta")
    assert Lookups.of(keys, keys, 1) is None


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
        scores = lookups.score(queries, own_keys, 1.0).view(B, G, Q, L)
        torch.testing.assert_close(scores, queries @ keys.transpose(2, 3))
        torch.testing.assert_close(lookups.mix(weights.flatten(), own_values), weights @ values)


def test_a_step_looks_up_what_a_mask_shows_unless_a_family_made_the_mask():
    step = Step.of_next_tokens([[1, 2]] * B, torch.device("cpu"))
    keys, values = _parts()
    masks = [torch.zeros(B, 1, 2, L) for _ in range(2)]
    for mask, visible in zip(masks, (_seen(3, 3, 3)[:, :, -2:], _seen(2, 2, 2)[:, :, -2:]), strict=True):
        step.remember(mask, visible)
        places = step.lookups(keys, values, Q, mask).places
        assert torch.equal(places, visible.repeat(1, G, Q // 2, 1).flatten().nonzero()[:, 0])
    assert step.lookups(keys, values, Q, masks[0].clone()) is None
