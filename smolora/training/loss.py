"""The loss: the sum of cross-entropies over target tokens, computed only where there is a target.

A label is a target like a token: every task is N targets, their logits [N, C] and their ids.

Shapes: `B` batch, `T` time, `V` vocabulary, `C` choices (vocabulary, labels or positions), `N` targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from smolora.config.model import TaskType
from smolora.data.collate import Batch
from smolora.errors import BrokenRunError
from smolora.models.bundle import shift_right
from smolora.models.frozen_linear import goes_by_onednn
from smolora.models.gpt import GPTModel
from smolora.models.row_attention import attends_by_rows
from smolora.models.rows import Rows, round_up
from smolora.models.structure import PreTrainedModel

TargetLogits = Callable[[nn.Module, Batch], Tensor]


def target_logits_of(model: nn.Module, task: TaskType = "causal_lm") -> TargetLogits:
    """Return the function that computes `[N, C]` logits for `model`: a GPTModel, or any transformers or peft model.

    C is the vocabulary, the labels, or (qa) the positions of the padded row. Where the model attends by rows, more rows
    of logits may follow that belong to no target.
    """
    if isinstance(model, GPTModel):
        return _gpt_logits
    if task == "qa":
        return _span_logits
    if task == "seq2seq":
        return partial(_answer_logits, model)
    if task == "token_classification":
        return partial(_word_logits, model)
    return partial(_transformers_logits, model) if task == "causal_lm" else partial(_label_logits, model)


def _gpt_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch.input_ids, position_ids=batch.position_ids, target_positions=batch.target_positions)
    return logits.flatten(0, -2)


def _transformers_logits(plain: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """`plain` is `model` without what may be wrapped around it, such as DistributedDataParallel."""
    if batch.position_ids is not None:
        kept = _fill_up_targets(plain, batch.target_positions)
        logits: Tensor = model(**_packed_inputs(plain, batch), logits_to_keep=kept).logits
        return logits.flatten(0, 1)  # A view, whose gradient is one: [0] would copy it into zeros.
    with _head_at_targets(plain, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    if batch.target_positions is not None and logits.shape[:2] == (1, len(batch.target_positions)):
        return logits.flatten(0, 1)  # Never a whole row: its first token is no target.
    logits = _flatten_rows(logits, batch)
    return logits if batch.target_positions is None else logits[batch.target_positions]


def _head_at_targets(plain: nn.Module, batch: Batch) -> AbstractContextManager[object]:
    """Have the head of a padded batch read the targets' hidden states alone, [1, N, D], where it is a module.

    Logits of all positions took most of the time and memory of a step with 50,257 words and 7 % of targets.
    """
    model = next((module for module in plain.modules() if isinstance(module, PreTrainedModel)), None)
    head = model.get_output_embeddings() if model else None
    if head is None or batch.target_positions is None:
        return nullcontext()

    def choose(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        return (_flatten_rows(hidden, batch)[batch.target_positions][None], *others) if hidden.ndim == 3 else inputs

    handle: AbstractContextManager[object] = head.register_forward_pre_hook(choose)
    return handle


def _flatten_rows(values: Tensor, batch: Batch) -> Tensor:
    """Return what stands at each token of a padded batch, [B*T, ...]; virtual tokens, if any, stand before a row."""
    return values[:, values.shape[1] - batch.input_ids.shape[1] :].flatten(0, 1)


def _label_logits(plain: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of labels, one answer a row: [B, C]."""
    if batch.position_ids is not None:
        return _transformers_logits(plain, model, batch)
    logits: Tensor = model(**_padded_inputs(batch)).logits
    return logits


def _word_logits(plain: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of labels at the first token of every word."""
    assert batch.target_positions is not None, "batches of words have them"
    inputs = _padded_inputs(batch) if batch.position_ids is None else _packed_inputs(plain, batch)
    logits: Tensor = model(**inputs).logits  # A head over words answers at every token.
    return logits.flatten(0, 1)[batch.target_positions]


def _span_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return [2 * B, T]: for each row where its answer begins, then where it ends; -inf where it can't."""
    assert batch.candidates is not None, "batches of qa say where answers may be"
    outputs = model(**_padded_inputs(batch))
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=1)  # [B, 2, T]
    return logits.masked_fill(~batch.candidates[:, None], float("-inf")).flatten(0, 1)


def _answer_logits(plain: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of an encoder-decoder at every token of every answer."""
    assert batch.answer_ids is not None and batch.target_positions is not None, "batches of seq2seq have both"
    decoder_input_ids = shift_right(plain, batch.answer_ids)
    logits: Tensor = model(**_padded_inputs(batch), decoder_input_ids=decoder_input_ids, use_cache=False).logits
    return logits.flatten(0, 1)[batch.target_positions]


def _padded_inputs(batch: Batch) -> dict[str, object]:
    segments = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **segments}


_TOKEN_STEP, _TARGET_STEP = 64, 16
"""Batches are filled up to multiples of these, so that few shapes occur: oneDNN makes a kernel for each, in .4 ms and
.3 MB, and a step met 43 new ones. (Filler costs the head the most.)"""


def _packed_inputs(plain: nn.Module, batch: Batch) -> dict[str, object]:
    """Return rows laid end to end, with filler behind them where few shapes pay.

    Filler is a token of the batch at position 0: a token that no row holds may have an embedding that isn't finite, and
    a position past the context has none.
    """
    assert batch.position_ids is not None, "packed batches have them"
    num_filler = _count_filler(plain, batch.input_ids.shape[1], _TOKEN_STEP)
    rows = {"rows": Rows(batch.row_lengths, batch.input_ids.device)} if attends_by_rows(plain) else {}
    return {
        "input_ids": torch.cat((batch.input_ids, batch.input_ids[:, :1].expand(-1, num_filler)), dim=1),
        "position_ids": F.pad(batch.position_ids, (0, num_filler)),
        # A cache would switch off the block-diagonal mask that transformers derives from restarting positions.
        "use_cache": False,
        **rows,
    }


def _fill_up_targets(plain: nn.Module, target_positions: Tensor | None) -> Tensor:
    """Return the positions of targets, with others behind them where few shapes pay."""
    assert target_positions is not None, "packed batches have them"
    return F.pad(target_positions, (0, _count_filler(plain, len(target_positions), _TARGET_STEP)))


def _count_filler(plain: nn.Module, count: int, step: int) -> int:
    """Return how many to add; none where rows don't attend alone, since filler would be one of them."""
    weight = next(plain.parameters())
    is_worth_it = attends_by_rows(plain) and (weight.device.type != "cpu" or goes_by_onednn(weight))
    return round_up(count, step) - count if is_worth_it else 0


def sum_cross_entropy(logits: Tensor, targets: Tensor, *, weight: float = 1.0) -> Tensor:
    """Return `weight` times the sum over targets of -log p(target), in float32 whatever the model computes in.

    The gradient is made in the same pass, a few tokens at a time, so no float32 copy of the logits ever exists.

    Args:
        logits: `[N, V]`; rows behind them count nothing.
        targets: `[N]` token ids; without any the sum is 0, and so is its gradient.
        weight: Of the sum; given here, it costs no pass of its own over the gradient.
    """
    loss: Tensor = _SumCrossEntropy.apply(logits, targets, weight)  # type: ignore[no-untyped-call]
    return loss


_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ON_A_GPU = 2**19, 2**24
"""Logits handled at once: 2 MiB in float32 stay in a processor's cache; on a GPU launches count, and 64 MiB are few."""


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weight: float) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if needs_gradient else None
        elements = _CHUNK_ELEMENTS if logits.device.type == "cpu" else _CHUNK_ELEMENTS_ON_A_GPU
        size = max(1, elements // logits.shape[1])
        losses = []
        for start in range(0, len(targets), size):
            end = min(start + size, len(targets))
            chosen = targets[start:end, None]
            log_probabilities = logits[start:end].log_softmax(dim=-1, dtype=torch.float32)  # [n, V]
            losses.append(log_probabilities.gather(1, chosen))
            if gradient is not None:
                errors = log_probabilities.exp_()
                errors.scatter_add_(1, chosen, torch.full_like(losses[-1], -1.0))
                torch.mul(errors, weight, out=gradient[start:end])
        if gradient is not None:
            gradient[len(targets) :] = 0
        ctx.gradient = gradient
        return torch.cat(losses).sum() * -weight if losses else logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Let go of: the loss, and so this, lives until the next pass has its own.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a loss is scaled in place, so there is one backward pass of it.")
        is_one = grad.device.type == "cpu" and grad.item() == 1  # Elsewhere, asking would wait for the device.
        return gradient if is_one else gradient.mul_(grad), None, None


def require_finite_loss(held_out_loss: float, step: int) -> None:
    """Raise where a held-out loss isn't finite.

    Args:
        held_out_loss: In nats a token.
        step: Updates done.

    Raises:
        BrokenRunError: So it is.
    """
    if not math.isfinite(held_out_loss):
        raise BrokenRunError(
            f"step {step}: the held-out loss is {held_out_loss}. Weights or activations overflow: "
            "use float32, lower the learning rate, or look at the held-out rows."
        )


@torch.no_grad()
def find_first_nonfinite(model: nn.Module, batches: Sequence[Batch], task: TaskType = "causal_lm") -> str:
    """Say where numbers first stop being finite: a parameter, an output, a gradient or all their norm, or the loss."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    for batch in batches:
        if module := _first_nonfinite_output(model, batch, task):
            return f"the output of {module}"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            return f"the gradient of {name}"
    if not torch.isfinite(get_total_norm(gradients.values())):
        largest = max(gradients, key=lambda name: gradients[name].abs().max().item())
        return f"the norm of all gradients: each is finite, but their squares aren't, those of {largest} first of all"
    return "the loss alone"


def _first_nonfinite_output(model: nn.Module, batch: Batch, task: TaskType) -> str | None:
    found: list[str] = []

    def listen(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and not torch.isfinite(first).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(listen(name)) for name, module in model.named_modules() if name]
    try:
        target_logits_of(model, task)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
