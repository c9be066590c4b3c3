"""Attention by rows equals one row at a time through torch's own, forward and backward, at any lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from smolora.models.fused_ops import Rotary
from smolora.models.row_attention import (
    AttentionSettings,
    attend_by_kernel,
    attend_rows,
    kernel_arguments,
    row_attention,
)
from smolora.models.rows import Rows
from tests.tiny import tiny_model

HEADS, SHARED, WIDTH = 6, 2, 8


class Angles(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


def swap_halves(x):
    return torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), dim=-1)


def naive(heads, lengths, *, scale, window, rotary, num_heads=HEADS):
    outputs, shared = [], (heads.shape[1] - num_heads) // 2
    for number, row in enumerate(heads.split(lengths)):
        query, key, value = (part.transpose(0, 1) for part in row.split([num_heads, shared, shared], dim=1))
        if rotary:
            cos, sin = rotary.cos.split(lengths)[number], rotary.sin.split(lengths)[number]
            query, key = (x * cos + swap_halves(x) * sin for x in (query, key))
        length = len(row)
        sees = torch.ones(length, length, dtype=torch.bool).tril()
        if window:
            sees &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
        key, value = (x.repeat_interleave(num_heads // shared, dim=0) for x in (key, value))
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=sees, scale=scale)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def random_inputs(lengths, *, count=HEADS + 2 * SHARED):
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = torch.randn(sum(lengths), count, WIDTH, generator=generator, requires_grad=True)
    angles = torch.rand(sum(lengths), WIDTH // 2, generator=generator).mul(6).repeat(1, 2)
    return heads, Angles(angles.cos(), angles.sin())


def assert_equal_to_naive(lengths, *, window=None, with_rotary=True, num_heads=HEADS, shared=SHARED):
    heads, rotary = random_inputs(lengths, count=num_heads + 2 * shared)
    rotary = rotary if with_rotary else None
    found = attend_rows(
        heads,
        num_heads=num_heads,
        rows=Rows(lengths, torch.device("cpu")),
        settings=AttentionSettings(0.3, window=window),
        rotary=Rotary.of_angles(*rotary) if rotary else None,
    )
    expected = naive(heads, lengths, scale=0.3, window=window, rotary=rotary, num_heads=num_heads)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    # float32 rounding over sums of at most 300 terms.
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert_close(
        torch.autograd.grad(found, heads, grad)[0], torch.autograd.grad(expected, heads, grad)[0], rtol=0, atol=5e-5
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=6), st.sampled_from([None, 1, 7]), st.booleans())
def test_it_equals_one_row_at_a_time(lengths, window, with_rotary):
    assert_equal_to_naive(lengths, window=window, with_rotary=with_rotary)


@pytest.mark.parametrize("lengths", [[40, 40, 3], [300]])
@pytest.mark.parametrize(("num_heads", "shared"), [(4, 4), (4, 1), (1, 1)])
def test_any_number_of_heads_may_share_a_key(lengths, num_heads, shared):
    assert_equal_to_naive(lengths, num_heads=num_heads, shared=shared)


def test_memory_that_nobody_wrote_reaches_no_token_and_no_gradient():
    class Poisoned(torch.utils._python_dispatch.TorchDispatchMode):
        """Memory that nobody wrote holds NaN, as it may."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._schema.name in {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}:
                result = result.fill_(torch.nan) if result.is_floating_point() else result
            return result

    with Poisoned():
        for lengths in ([40, 33, 1], [300, 20]):
            heads, rotary = random_inputs([sum(lengths) + 9])  # 9 tokens of filler.
            output = attend_rows(
                heads,
                num_heads=HEADS,
                rows=Rows(lengths, torch.device("cpu")),
                settings=AttentionSettings(0.3),
                rotary=Rotary.of_angles(*rotary),
            )
            assert output.isfinite().all()
            assert torch.autograd.grad(output.sum(), heads)[0].isfinite().all()


@pytest.mark.parametrize("lengths", [[300], [129, 128, 257, 1], [256, 200]])
def test_long_rows_in_blocks_of_queries_equal_it_too(lengths):
    assert_equal_to_naive(lengths)


def test_a_change_in_one_row_leaves_the_others_bit_equal():
    lengths = [20, 21, 40]
    heads, rotary = random_inputs(lengths)
    rows, how = Rows(lengths, torch.device("cpu")), AttentionSettings(0.3)
    before = attend_rows(heads, num_heads=HEADS, rows=rows, settings=how, rotary=Rotary.of_angles(*rotary))
    changed = heads.detach().clone()
    changed[:20] += 1
    after = attend_rows(changed, num_heads=HEADS, rows=rows, settings=how, rotary=Rotary.of_angles(*rotary))
    assert torch.equal(before[20:], after[20:])
    assert not torch.equal(before[:20], after[:20])


def test_filler_behind_the_rows_gives_and_takes_nothing():
    lengths, num_tokens = [20, 21], 64
    heads, rotary = random_inputs([num_tokens])
    rows, how = Rows(lengths, torch.device("cpu")), AttentionSettings(0.3)
    output = attend_rows(heads, num_heads=HEADS, rows=rows, settings=how, rotary=Rotary.of_angles(*rotary))
    angles = Angles(*(part[:41] for part in rotary))
    expected = attend_rows(heads[:41], num_heads=HEADS, rows=rows, settings=how, rotary=Rotary.of_angles(*angles))
    assert_close(output[:41], expected)
    assert not output[41:].any()
    (gradient,) = torch.autograd.grad(output.square().sum(), heads)
    assert gradient[:41].any()
    assert not gradient[41:].any()


def kernel_by_its_documentation(query, key, value, *, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa):
    """What torch documents of `varlen_attn`, sequence by sequence."""
    assert all(x.is_contiguous() for x in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[0], cu_seq_q[-1]) == (0, len(query)), "what lies outside is left as memory had it"
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    outputs = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        places = torch.arange(end - start)
        ahead = places - places[:, None]
        before, behind = (len(places) if size == -1 else size for size in window_size)
        sees = (ahead >= -before) & (ahead <= behind)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("lengths", [[5, 70, 33], [1], [40, 40]])
def test_what_the_kernel_is_asked_for_is_attention_by_rows(lengths, window):
    heads, _ = random_inputs([sum(lengths) + 20])  # 20 tokens of filler.
    rows, how = Rows(lengths, torch.device("cpu")), AttentionSettings(0.3, window=window)
    arguments = kernel_arguments(heads, num_heads=HEADS, rows=rows, settings=how)
    found = kernel_by_its_documentation(**arguments)
    expected = attend_rows(heads, num_heads=HEADS, rows=rows, settings=how)[: sum(lengths)]
    assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), heads)[0] for x in (found, expected)]
    assert_close(*gradients, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shared", [HEADS, SHARED])
def test_the_kernel_takes_what_it_is_asked_and_filler_gets_a_place(shared):
    # On torch's device for shapes: the kernel itself computes on a GPU alone.
    meta = torch.device("meta")
    heads = torch.empty(128, HEADS + 2 * shared, WIDTH, dtype=torch.bfloat16, device=meta, requires_grad=True)
    rows, how = Rows([5, 70, 33], meta), AttentionSettings(0.3, window=9)
    output = attend_by_kernel(heads, num_heads=HEADS, rows=rows, settings=how)
    assert output.shape == (128, HEADS, WIDTH)
    output.sum().backward()
    assert heads.grad.shape == heads.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 9])
def test_on_a_gpu_the_kernel_gives_what_a_row_alone_gives(window):
    lengths, num_tokens = [5, 70, 33], 128
    heads, rotary = random_inputs([num_tokens])
    heads, rotary = heads.detach().cuda().bfloat16().requires_grad_(), Angles(*(part.cuda() for part in rotary))
    rows, how = Rows(lengths, torch.device("cuda")), AttentionSettings(0.3, window=window)
    turns = Rotary(*(part.bfloat16() for part in (Rotary.of_angles(*rotary).cos, Rotary.of_angles(*rotary).sin)))
    output = attend_rows(heads, num_heads=HEADS, rows=rows, settings=how, rotary=turns)
    wide = heads.detach().float().requires_grad_()
    angles = Angles(*(part[:108] for part in rotary))
    expected = naive(wide[:108], lengths, scale=0.3, window=window, rotary=angles)
    assert_close(output[:108].float(), expected, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits.
    assert not output[108:].any()
    output.float().square().sum().backward()
    expected.square().sum().backward()
    assert_close(heads.grad.float(), wide.grad, rtol=5e-2, atol=5e-2)


def test_turning_has_the_gradient_of_what_it_computes():
    heads, rotary = random_inputs([7])
    wide = heads.detach().double().requires_grad_()
    turns = Rotary(*(part.double() for part in (Rotary.of_angles(*rotary).cos, Rotary.of_angles(*rotary).sin)))
    assert torch.autograd.gradcheck(turns.apply, (wide,))


def test_boundaries_are_where_rows_begin_and_the_last_one_ends():
    assert Rows([3, 5, 2], torch.device("cpu")).boundaries.tolist() == [0, 3, 8, 10]


@pytest.mark.parametrize("make", [Rows.head_places, Rows.query_places], ids=["all", "queries"])
def test_every_head_of_a_row_has_one_place_and_padding_holds_a_head_of_its_row(make):
    lengths = [20, 70, 33, 64, 1]
    rows = Rows(lengths, torch.device("cpu"))
    places = make(rows, HEADS, SHARED)
    num_heads = HEADS + (2 * SHARED if make is Rows.head_places else 0)
    assert places.heads[places.places].tolist() == list(range(sum(lengths) * num_heads))
    assert len(places.heads) == len(places.places) + len(places.padding)
    assert not set(places.padding.tolist()) & set(places.places.tolist())
    row_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    held = torch.stack((row_of[places.heads // num_heads], places.heads % num_heads), dim=1)
    kinds = torch.arange(num_heads).split([HEADS] if num_heads == HEADS else [HEADS, SHARED, SHARED])
    for group, blocks in zip(rows.groups, places.split(held), strict=True):
        own = row_of[group.tokens[:, 0]].repeat(SHARED)
        for block, numbers in zip(blocks, kinds, strict=True):
            assert block.shape == (SHARED * group.num_rows, len(numbers) // SHARED, group.length, 2)
            assert (block[..., 0] == own[:, None, None]).all()
            expected = numbers.view(SHARED, 1, -1).expand(-1, group.num_rows, -1).flatten(0, 1)
            assert (block[..., 1] == expected[..., None]).all()


def test_blocks_of_rows_come_in_few_lengths():
    seen = {group.length for length in range(1, 97) for group in Rows([length, length], torch.device("cpu")).groups}
    assert seen == {16, 32, 48, 64, 80, 96}


@pytest.mark.parametrize("lengths", [[40, 33], [300]])
def test_dropout_of_the_weights_has_the_gradient_of_what_it_computed(lengths):
    heads, _ = random_inputs(lengths)
    heads = heads.detach().double().requires_grad_()
    rows = Rows(lengths, torch.device("cpu"))

    def attend(x):
        torch.manual_seed(3)
        return attend_rows(x, num_heads=HEADS, rows=rows, settings=AttentionSettings(0.3, dropout=0.3)).sum(0)

    direction = torch.randn_like(heads)
    step = 1e-6
    numeric = (attend(heads + step * direction) - attend(heads - step * direction)).sum() / (2 * step)
    (gradient,) = torch.autograd.grad(attend(heads).sum(), heads)
    assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean():
    heads, _ = random_inputs([30])
    rows = Rows([30], torch.device("cpu"))
    plain = attend_rows(heads, num_heads=HEADS, rows=rows, settings=AttentionSettings(0.3))
    torch.manual_seed(0)
    draws = [
        attend_rows(heads, num_heads=HEADS, rows=rows, settings=AttentionSettings(0.3, dropout=0.2)).detach()
        for _ in range(300)
    ]
    stack = torch.stack(draws)
    error = stack.std(dim=0) / 300**0.5
    assert ((stack.mean(dim=0) - plain).abs() <= 6 * error + 1e-6).all()


@pytest.mark.parametrize("lengths", [[200, 256], [300, 40], [600]])
def test_in_bfloat16_it_is_as_near_to_float32_as_one_row_at_a_time(lengths):
    heads, _ = random_inputs(lengths)
    half = heads.detach().bfloat16().requires_grad_()
    exact = half.detach().float().requires_grad_()
    grad = torch.randn(sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, settings = Rows(lengths, torch.device("cpu")), AttentionSettings(0.3)
    naively = {"scale": 0.3, "window": None, "rotary": None}
    found = attend_rows(half, num_heads=HEADS, rows=rows, settings=settings)
    rounded, expected = naive(half, lengths, **naively), naive(exact, lengths, **naively)
    for mine, theirs, wanted in (
        (found, rounded, expected),
        (
            *(torch.autograd.grad(x, half, grad)[0] for x in (found, rounded)),
            torch.autograd.grad(expected, exact, grad.float())[0],
        ),
    ):
        error = (mine.float() - wanted).norm()
        assert 0 < error <= 2 * (theirs.float() - wanted).norm()


def test_a_mask_that_a_model_adds_to_is_refused():
    model = tiny_model("llama")
    arguments = {"config": model.config, "inputs_embeds": torch.zeros(1, 5, 32), "attention_mask": None}
    with row_attention(model):
        assert create_causal_mask(**arguments, past_key_values=None) is None
        with pytest.raises(ValueError, match="no mask of a model's own"):
            create_causal_mask(**arguments, past_key_values=None, and_mask_function=sliding_window_overlay(3))
