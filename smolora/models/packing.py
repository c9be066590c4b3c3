"""Whether a model can read rows laid end to end: measured on the model itself, since no config says so.

With `position_ids` that restart at every row, no attention mask and no cache, most families attend block-diagonally.
Some (bloom, opt) let the rows leak into each other without a word; they train on padded batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smolora.data.collate import Layout
from smolora.models.bundle import ModelBundle, read_config
from smolora.models.gpt import GPTModel
from smolora.models.rounding import allow_rounding, shifted_embeddings
from smolora.models.structure import PreTrainedModel, without_dropout
from smolora.models.tasks import find_heads, task_of
from smolora.runtime.available_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_FIRST, _OTHER_FIRST, _SECOND = (1, 3, 5, 2, 4), (6, 2, 1, 7, 3), (2, 5, 3, 6, 1, 4, 7)
_NEIGHBOURS = range(1, 8)
"""Tokens of the rows beside the second one: a row of one token again and again crowds a few experts, and each row
others. With four such rows 3 of 200 mixtrals showed no rounding, with seven none."""

_ROUNDING_MARGIN = 8
"""The row in front changed the second one by up to 1.5 times what neighbours did, 1e-6 in float32; where it leaked in,
by .7 to 4."""

_KNOWN_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv"}
"""Kinds of layers where a token's place alone says what it sees."""


def choose_layout(base: ModelBundle) -> Layout:
    """Return how batches are laid out: packed where the model keeps rows apart."""
    if base.num_virtual_tokens:
        is_packable, reason = False, f"{base.num_virtual_tokens} virtual tokens stand before every row"
    else:
        is_packable, reason = can_pack_rows(base.model)
    if not is_packable:
        logger.info("batches are padded: %s", reason)
    return "packed" if is_packable else "padded"


def can_pack_rows(model: nn.Module) -> tuple[bool, str]:
    """Probe `model` with two tiny packed rows and return (answer, reason as a sentence).

    The second row's logits must not change by a bit when the first row does, and must equal those of the row alone up
    to rounding. Products of experts round by how many tokens an expert gets: there the change may be as large as what
    other rows beside the second one make of it, in a batch of two, where nothing leaks.

    Four forward passes over a dozen tokens, and seven more where a few bits changed; weights, gradients, the random
    generator and train or eval mode stay as they were.
    """
    reason = _why_not_probed(model) or _why_not_packable(model)
    return (False, reason) if reason else (True, "a probe of two packed rows gave each row the logits it has alone")


def _why_not_probed(model: nn.Module) -> str | None:
    """Return why `model` can't pack, whatever two short rows would show."""
    if task_of(model) == "seq2seq":
        return "an encoder-decoder reads each row with the answer to it, and knows no restarting positions"
    if task_of(model) == "qa":
        return "where an answer begins and ends is chosen among the tokens of one row"
    if length := _find_length_of_mask(model):
        return f"its attention has a mask of its own, of {length} tokens, and rows laid end to end may be longer"
    if kinds := _find_unknown_kinds(model):
        return f"two short rows don't show which tokens its layers of kind {' and '.join(kinds)} see"
    return None


def _why_not_packable(model: nn.Module) -> str | None:
    """Return what two short rows show against packing."""
    try:
        with torch.no_grad(), without_dropout(model):
            packed = _second_row_logits(model, _FIRST)
            repacked = _second_row_logits(model, _OTHER_FIRST)
            alone = _second_row_logits(model, ())
            with shifted_embeddings(model):
                shifted = _second_row_logits(model, ())
            tolerance = allow_rounding(alone, shifted, next(model.parameters()).dtype)
            leak = _spread([packed, repacked])
            explained = _ROUNDING_MARGIN * _measure_neighbours(model) if 0 < leak <= tolerance else 0.0
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"its forward pass refuses restarting positions ({type(error).__name__}: {error})"
    if not leak <= explained:
        return (
            "this model's attention can't keep rows apart that are laid end to end (another row in front changed what "
            f"the next one gives by {leak:.1e})"
        )
    difference = _spread([packed, alone])
    if not difference <= tolerance:
        return f"a packed row differs from the row alone by {difference:.1e} (rounding explains {tolerance:.1e})"
    return None


def _find_length_of_mask(model: nn.Module) -> int | None:
    """Return N of a buffer `[1, 1, N, N]`, which GPT-Neo's attention cuts its mask out of."""
    shapes = (buffer.shape for buffer in model.buffers())
    return next((shape[3] for shape in shapes if len(shape) == 4 and shape[2] == shape[3]), None)


def _find_unknown_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of layers that choose what a token sees: MiniMax M3's choose blocks, which may hold two rows."""
    if not isinstance(model, PreTrainedModel):
        return []
    return sorted(set(read_config(model).to_dict().get("layer_types") or ()) - _KNOWN_KINDS)


def _second_row_logits(model: nn.Module, first: tuple[int, ...]) -> Tensor:
    """Return float32 logits [T, V] of the second row, packed behind `first`."""
    input_ids, position_ids = [*first, *_SECOND], [*range(len(first)), *range(len(_SECOND))]
    return _first_logits(model, [input_ids], position_ids)[len(first) :]


def _measure_neighbours(model: nn.Module) -> float:
    """Return how far the second row's logits are apart as the row beside it in the batch changes."""
    beside = [[[*_SECOND], [token] * len(_SECOND)] for token in _NEIGHBOURS]
    return _spread([_first_logits(model, rows, [*range(len(_SECOND))]) for rows in beside])


def _spread(logits: Sequence[Tensor]) -> float:
    """Return how far the same numbers are apart at most, computed several times."""
    together = torch.stack([*logits])
    return (together.amax(0) - together.amin(0)).max().item()


def _first_logits(model: nn.Module, rows: list[list[int]], positions: list[int]) -> Tensor:
    """Return float32 logits [T, V] of the first of `rows`."""
    device = next(model.parameters()).device
    input_ids = torch.tensor(rows, device=device)
    position_ids = torch.tensor([positions] * len(rows), device=device)
    if isinstance(model, GPTModel):
        logits: Tensor = model(input_ids, position_ids)
    else:
        logits = _read_forward(model, input_ids, position_ids)
    return logits[0].float()


def _read_forward(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return what a model computes at every position: logits, or what the head of another task would read."""
    if isinstance(model, PreTrainedModel) and find_heads(model):
        hidden: Tensor = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        return hidden
    logits: Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits
