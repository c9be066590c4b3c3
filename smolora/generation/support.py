"""Whether a model can be decoded in slots: measured on the model itself, since no config says so."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from smolora.generation.decoding import in_eval_mode
from smolora.generation.fused_blocks import FEWEST_ROWS, FusedBlocks
from smolora.generation.slots import SlotCache, Step, forward, slot_attention
from smolora.models.rounding import allow_rounding, shifted_embeddings

_ROWS = ((1, 0, 1, 1, 0, 1), (0, 1, 1, 0))
_NUM_ANSWERED = 2

# Settings of generation_config.json that change which tokens may come, and that transformers alone knows how to apply.
_CONSTRAINTS = frozenset(
    "bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size encoder_repetition_penalty "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale min_length min_new_tokens "
    "no_repeat_ngram_size sequence_bias suppress_tokens watermarking_config".split()
)


def find_obstacle(model: nn.Module) -> str | None:
    """Return why `model` can't be decoded in slots, or None where it can.

    Two rows of different lengths go through a cache with slots, and must get the logits that they get alone and
    without a cache, up to rounding. Seven forward passes over a dozen tokens.
    """
    settings = model.generation_config
    assert isinstance(settings, GenerationConfig)
    if constraints := sorted(_CONSTRAINTS & settings.to_diff_dict().keys()):
        return f"its generation_config.json sets {', '.join(constraints)}"
    if any(_hides_more_than_the_future(mask) for mask in model.buffers()):
        return "its layers hide tokens by masks of their own, which count from the end of the longest row"
    try:
        with in_eval_mode(model):
            expected, found = _logits_alone(model), _logits_in_slots(model)
            with shifted_embeddings(model):
                shifted = _logits_alone(model)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return f"its forward pass refuses a cache with slots ({type(error).__name__}: {error})"
    difference = (found - expected).abs().max().item()
    tolerance = allow_rounding(expected, shifted, next(model.parameters()).dtype)
    if not difference <= tolerance:
        return f"with a cache of slots its logits differ by {difference:.1e} (rounding explains {tolerance:.1e})"
    return None


def _hides_more_than_the_future(buffer: Tensor) -> bool:
    """Whether a buffer is a mask [..., T, T] of a window, which the few tokens of a probe never reach the end of."""
    is_mask = buffer.dtype == torch.bool and buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2]
    return is_mask and not bool(buffer[..., -1, :].all())


def _logits_alone(model: nn.Module) -> Tensor:
    """Return the logits [answered tokens, rows, V] that each row has by itself and without a cache."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits for row in _ROWS]
    return torch.stack([logits[0, -_NUM_ANSWERED:].float() for logits in rows], dim=1)


def _logits_in_slots(model: nn.Module) -> Tensor:
    """Return the logits [answered tokens, rows, V] of prompts that fill slots and go on one token at a time."""
    device = next(model.parameters()).device
    cache = SlotCache(len(_ROWS), max(map(len, _ROWS)))
    filled = [len(row) - _NUM_ANSWERED for row in _ROWS]
    padded = [row[:count] + (0,) * (max(filled) - count) for row, count in zip(_ROWS, filled, strict=True)]
    logits = []
    # Of as many rows as decoding makes all of its copies for.
    with slot_attention(model), FusedBlocks(model, num_rows=FEWEST_ROWS).installed():
        forward(model, cache, Step.of_prompts(0, len(_ROWS), max(filled), device), torch.tensor(padded, device=device))
        for number in range(_NUM_ANSWERED):
            positions = [count + number for count in filled]
            tokens = [[row[position]] for row, position in zip(_ROWS, positions, strict=True)]
            step = Step.of_next_tokens(positions, device)
            logits.append(forward(model, cache, step, torch.tensor(tokens, device=device)).float())
    return torch.stack(logits)
