"""The loss is the textbook's sum, whatever the model computes in and however its rows are laid out."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed, collate_padded, collate_windows
from smolora.data.token_dataset import build_example
from smolora.models.row_attention import row_attention
from smolora.training.loss import find_first_nonfinite, sum_cross_entropy, target_logits_of
from smolora.training.plan import plan_steps
from tests.tiny import tiny_model

NAN = float("nan")


def naive_cross_entropy(logits, targets):
    """-log softmax, one target at a time, in Python's own float64."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        top = max(row)
        total += top + math.log(math.fsum(math.exp(value - top) for value in row)) - row[target]
    return total


def random_logits(num_targets, vocab, *, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_targets, vocab, generator=generator) * scale
    return logits, torch.randint(0, vocab, (num_targets,), generator=generator)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e3])
def test_the_sum_equals_a_naive_one(scale):
    logits, targets = random_logits(23, 11, scale=scale)
    # float32 rounding of a sum of 23 numbers.
    assert sum_cross_entropy(logits, targets).item() == pytest.approx(naive_cross_entropy(logits, targets), rel=1e-5)


def test_it_is_a_sum_over_targets_and_no_mean():
    logits, targets = random_logits(6, 11)
    halves = sum_cross_entropy(logits[:2], targets[:2]) + sum_cross_entropy(logits[2:], targets[2:])
    assert_close(sum_cross_entropy(logits, targets), halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_weighs_the_sum_and_its_gradient(dtype):
    logits, targets = random_logits(23, 11)
    logits = logits.to(dtype).requires_grad_()
    loss = sum_cross_entropy(logits, targets, weight=1 / 8)
    assert_close(loss, sum_cross_entropy(logits, targets) / 8)
    (found,) = torch.autograd.grad(loss, logits)
    (twice,) = torch.autograd.grad(2 * sum_cross_entropy(logits, targets, weight=1 / 8), logits)
    wide = logits.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, targets, reduction="sum") / 8, wide)
    # Of an exponential, a sum, a quotient and a difference.
    rounding = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    assert_close(found.float(), expected, rtol=0, atol=rounding)
    assert_close(twice.float(), 2 * expected, rtol=0, atol=2 * rounding)


def test_logits_in_bfloat16_are_summed_in_float32():
    logits, targets = random_logits(400, 50)
    rounded = logits.bfloat16()
    found = sum_cross_entropy(rounded, targets)
    assert found.dtype == torch.float32
    # A sum in bfloat16, of 8 bits, would be off by some tenths of a percent.
    assert found.item() == pytest.approx(naive_cross_entropy(rounded, targets), rel=1e-5)


def test_the_gradient_is_the_softmax_less_one_at_the_target():
    logits, targets = random_logits(5, 7)
    logits.requires_grad_()
    sum_cross_entropy(logits, targets).backward()
    expected = logits.detach().softmax(-1)
    expected[torch.arange(5), targets] -= 1
    assert_close(logits.grad, expected)


def test_after_the_backward_pass_the_loss_keeps_no_gradient_of_the_logits():
    """It lives until the next pass has its loss: a batch of logits more at the peak."""
    logits, targets = random_logits(5, 7)
    logits, seen = logits.requires_grad_() * 1, []
    logits.register_hook(lambda gradient: seen.append(weakref.ref(gradient)))
    loss = sum_cross_entropy(logits, targets)
    loss.backward()
    assert seen[0]() is None


def test_a_second_backward_pass_is_refused():
    logits, targets = random_logits(5, 7)
    loss = sum_cross_entropy(logits.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_over_several_chunks_sum_and_gradient_are_torchs_own():
    logits, targets = random_logits(5, 2**18)  # Two rows of it are one chunk.
    expected, found = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reference, loss = F.cross_entropy(expected, targets, reduction="sum"), sum_cross_entropy(found, targets)
    assert_close(loss, reference, rtol=1e-5, atol=0)  # Sums of 262,144 numbers.
    reference.backward()
    loss.backward()
    assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-9)


def test_without_a_target_the_sum_and_its_gradient_are_0():
    logits, targets = random_logits(3, 5)
    logits.requires_grad_()
    loss = sum_cross_entropy(logits, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_logits_behind_the_targets_count_nothing():
    logits, targets = random_logits(5, 7)
    filled = torch.cat((logits, torch.full((3, 7), NAN))).requires_grad_()
    loss = sum_cross_entropy(filled, targets)
    assert_close(loss, sum_cross_entropy(logits, targets))
    loss.backward()
    assert not filled.grad[5:].any()


@pytest.fixture
def examples():
    """Three rows of uneven lengths, the second half of each a target."""
    lengths = (5, 12, 8)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 200, (length,), generator=generator).tolist() for length in lengths]
    return [build_example(row, [(len(row) // 2, len(row))]) for row in rows]


@pytest.fixture(params=["gpt", "llama"])
def model(request, make_trainer):
    """Ours, and one of transformers."""
    return make_trainer().bundle.model.eval() if request.param == "gpt" else tiny_model("llama")


def one_by_one(model, examples):
    """Return the logits before each target, each row alone and no position left out."""
    rows = []
    for example in examples:
        output = model(torch.from_numpy(example.input_ids).long()[None])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        rows.append(logits[0, [at - 1 for at in range(len(example)) if example.is_target[at]]])
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_the_logits_of_targets_are_those_of_each_row_alone(model, examples, collate):
    found = target_logits_of(model)(model, collate(examples))
    # The same sums over other shapes: float32 rounding through two layers.
    assert_close(found, one_by_one(model, examples), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "bloom", "gpt2"])
def test_of_a_padded_batch_the_head_reads_targets_alone(family, examples):
    model, shapes = tiny_model(family), []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, logits: shapes.append(logits.shape[:2]))
    found = target_logits_of(model)(model, collate_padded(examples))
    handle.remove()
    assert shapes == [(1, len(found))]
    assert not model.lm_head._forward_pre_hooks
    assert_close(found, one_by_one(model, examples), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
@pytest.mark.parametrize(
    "scaling",
    [("gemma2", "final_logit_softcapping", 2.0), ("cohere", "logit_scale", 0.5), ("granite", "logits_scaling", 4.0)],
)
def test_a_familys_own_scaling_of_its_logits_is_kept(scaling, collate, examples):
    family, setting, value = scaling
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 288, "pad_token_id": 0, "initializer_range": 0.15}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **{setting: value})).eval()
    scaled = target_logits_of(model)(model, collate(examples))
    assert_close(scaled, one_by_one(model, examples), rtol=1e-4, atol=1e-5)
    setattr(model.config, setting, 1.0)
    unscaled = AutoModelForCausalLM.from_config(model.config).eval()
    unscaled.load_state_dict(model.state_dict())
    assert (target_logits_of(unscaled)(unscaled, collate(examples)) - scaled).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "shapes", "num_logits"),
    [(torch.bfloat16, {64}, {16}), (torch.float64, {5, 20, 25}, {3, 10, 13})],
    ids=["oneDNN makes a kernel for each shape", "another library"],
)
def test_where_rows_attend_alone_batches_are_filled_up_if_few_shapes_pay(examples, dtype, shapes, num_logits):
    model, found, logits_found = tiny_model("llama").to(dtype), set(), set()
    model.register_forward_pre_hook(lambda _, __, kwargs: found.add(kwargs["input_ids"].shape[1]), with_kwargs=True)
    plain = tiny_model("llama").to(dtype)
    with row_attention(model):
        for chosen in (examples[:1], examples[1:], examples, examples[::-1]):
            batch = collate_packed(chosen)
            logits = target_logits_of(model)(model, batch)
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-9
            assert_close(logits[: len(batch.targets)], one_by_one(plain, chosen), rtol=tolerance, atol=tolerance)
            logits_found.add(len(logits))
    assert (found, logits_found) == (shapes, num_logits)


@torch.no_grad()
def test_passes_of_a_token_budget_have_few_shapes_and_the_loss_of_passes_without_filler():
    """Few enough for a compiler or a graph that is made for every shape."""
    drawn = np.random.default_rng(0)
    rows = [drawn.integers(1, 200, length).tolist() for length in drawn.integers(20, 130, 150)]
    examples = [build_example(row, [(len(row) // 2, len(row))]) for row in rows]
    plan = plan_steps(
        np.array([len(row) for row in rows]),
        TrainingConfig(gradient_accumulation_steps=1),
        SpeedConfig(max_tokens_per_batch=512),
    )
    batches = [
        collate_packed([examples[row] for row in chosen])
        for step in range(plan.total_steps)
        for chosen in plan.micro_batches(step)
    ]
    model = tiny_model("llama").bfloat16()  # In which every device fills batches up.
    expected = [sum_cross_entropy(target_logits_of(model)(model, batch), batch.targets) for batch in batches]
    shapes = set()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.add((kwargs["input_ids"].shape, kwargs["logits_to_keep"].shape)), with_kwargs=True
    )
    with row_attention(model):
        for batch, loss in zip(batches, expected, strict=True):
            found = sum_cross_entropy(target_logits_of(model)(model, batch), batch.targets)
            assert_close(found, loss, rtol=1e-3, atol=0)
    assert len(batches) > 20
    assert len(shapes) <= 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_filler_needs_no_place_in_the_context_and_no_token_of_its_own(family, examples):
    model = tiny_model(family, max_position_embeddings=16, tie_word_embeddings=False).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = NAN  # Which no row holds.
    batch = collate_packed(examples)
    with row_attention(model):
        loss = sum_cross_entropy(target_logits_of(model)(model, batch), batch.targets)
    loss.backward()
    assert torch.isfinite(model.get_input_embeddings().weight.grad[1:]).all()


@torch.no_grad()
def test_windows_have_a_logit_for_every_target(make_trainer):
    model = make_trainer().bundle.model.eval()
    windows = [build_example(list(range(start, start + 9)), [(0, 9)]) for start in (10, 30)]
    batch = collate_windows(windows)
    logits = target_logits_of(model)(model, batch)
    assert logits.shape == (len(batch.targets), 257)
    assert_close(logits, one_by_one(model, windows), rtol=1e-4, atol=1e-5)


def test_where_all_is_finite_only_the_loss_is_blamed(model, examples):
    assert find_first_nonfinite(model, [collate_padded(examples)]) == "the loss alone"


def test_gradients_whose_squares_overflow_are_blamed_and_not_the_loss(model, examples):
    for scale, parameter in enumerate(model.parameters(), start=1):
        parameter.grad = torch.full_like(parameter, 1e30 / scale)
    largest = next(name for name, _ in model.named_parameters())
    assert find_first_nonfinite(model, [collate_padded(examples)]) == (
        f"the norm of all gradients: each is finite, but their squares aren't, those of {largest} first of all"
    )


def test_the_first_module_in_the_order_of_the_forward_pass_is_named(make_trainer, examples):
    model = make_trainer().bundle.model
    for module in (model.ln_final, model.blocks[1].attention):
        module.register_forward_hook(lambda _module, _inputs, output: output * NAN)
    assert find_first_nonfinite(model, [collate_packed(examples)]) == "the output of blocks.1.attention"


def test_looking_for_the_place_leaves_no_hook_and_no_gradient(make_trainer, examples):
    model = make_trainer().bundle.model
    find_first_nonfinite(model, [collate_packed(examples)])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
