"""What rows may do together: share slots, share a step, be padded. Measured on the model where no config says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from smolora.generation.choosing import Row
from smolora.generation.decoding import fill_slots, in_eval_mode
from smolora.generation.fallback import build_settings, pad_prompts
from smolora.generation.fused_blocks import FusedBlocks
from smolora.generation.sampling import DEFAULT_SAMPLING
from smolora.generation.slots import FEWEST_ROWS, SlotCache, forward, slot_attention
from smolora.generation.step import Step
from smolora.models.bundle import read_config
from smolora.models.rounding import allow_rounding, shifted_embeddings
from smolora.models.structure import find_configs
from smolora.runtime.available_memory import is_out_of_memory

_ROWS = ((1, 0, 1, 1, 0, 1), (0, 1, 1, 0))
_NUM_ANSWERED = 3

# Settings of generation_config.json that change which tokens may come, and that transformers alone knows how to apply.
_CONSTRAINTS = frozenset(
    "bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size encoder_repetition_penalty "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id guidance_scale min_length min_new_tokens "
    "no_repeat_ngram_size sequence_bias suppress_tokens watermarking_config".split()
)

# Those of them that take padding for a part of the prompt.
_READ_PADDING = frozenset({"encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "min_length"})


def find_obstacle(model: nn.Module) -> str | None:
    """Return why `model` can't be decoded in slots, or None where it can.

    Two rows of different lengths, each twice, go through a cache with slots, and must get the logits they get alone
    and without a cache, up to rounding. Seven forward passes over two dozen tokens at most.
    """
    if constraints := sorted(_CONSTRAINTS & _read_own_settings(model).keys()):
        return f"its generation_config.json sets {', '.join(constraints)}"
    try:
        with in_eval_mode(model):
            expected, found = _logits_alone(model), _logits_in_slots(model)
            with shifted_embeddings(model):
                shifted = _logits_alone(model)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return f"its forward pass refuses a cache with slots ({type(error).__name__}: {error})"
    if expected.isnan().any():
        return None  # Its weights are broken, and its first token will say so.
    difference = (found - expected).abs().max().item()
    tolerance = allow_rounding(expected, shifted, next(model.parameters()).dtype)
    if not difference <= tolerance:
        return f"with a cache of slots its logits differ by {difference:.1e} (rounding explains {tolerance:.1e})"
    return None


def find_shared_reach(model: nn.Module) -> int | None:
    """Return up to how many tokens rows may share a step with any others; None where no length parts them.

    No probe is long enough to see it.
    """
    return min((*_iter_windows(model), *_iter_rope_switches(model)), default=None)


def is_moved_by_padding(model: nn.Module) -> bool:
    """Whether padding on the left of a row changes its answer in `generate`, as where no mask keeps it from a state.

    Three forward passes over at most a dozen tokens.
    """
    if any(_iter_rope_switches(model)) or _READ_PADDING & _read_own_settings(model).keys():
        return True
    with in_eval_mode(model):
        alone, padded = _logits_by_generate(model, _ROWS[1:]), _logits_by_generate(model, _ROWS[::-1])
        with shifted_embeddings(model):
            shifted = _logits_by_generate(model, _ROWS[1:])
    difference = (padded - alone).abs().max().item()
    return not difference <= allow_rounding(alone, shifted, next(model.parameters()).dtype)


def _iter_windows(model: nn.Module) -> Iterator[int]:
    """Yield what a token sees by a layer's own mask [..., T, T] (GPT-Neo): it counts from the longest row's end."""
    for mask in model.buffers():
        if mask.dtype == torch.bool and mask.ndim > 1 and mask.shape[-1] == mask.shape[-2]:
            seen = int(mask[..., -1, :].sum(-1).min())
            if seen < mask.shape[-1]:
                yield seen


def _iter_rope_switches(model: nn.Module) -> Iterator[int]:
    """Yield where LongRoPE (Ding 2024) turns every token of a step by other angles, if one of them lies past it."""
    rope = read_config(model).get_text_config().to_dict().get("rope_parameters") or {}
    for own in (rope, *rope.values()):  # For all layers, or for each type of them.
        if isinstance(own, dict) and own.get("rope_type") == "longrope":
            yield own["original_max_position_embeddings"]


def _read_own_settings(model: nn.Module) -> dict[str, object]:
    settings = model.generation_config
    assert isinstance(settings, GenerationConfig)
    return dict(settings.to_diff_dict())


def _logits_by_generate(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the logits [V] that `generate` has after the first of `prompts`."""
    inputs = pad_prompts([Row(list(ids), 1, DEFAULT_SAMPLING) for ids in prompts], next(model.parameters()).device)
    form = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**{**inputs, **build_settings(max_new_tokens=1), **form})  # type: ignore[operator]
    logits: Tensor = found.logits[0][0].float()
    return logits


def _logits_alone(model: nn.Module) -> Tensor:
    """Return the logits [answered tokens, rows, V] that each row has by itself and without a cache."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits for row in _ROWS]
    return torch.stack([logits[0, -_NUM_ANSWERED:].float() for logits in rows], dim=1)


def _logits_in_slots(model: nn.Module) -> Tensor:
    """Return the logits [answered tokens, rows, V] of prompts that fill slots, and go on by one token and by two."""
    device = next(model.parameters()).device
    rows = _ROWS * (FEWEST_ROWS // len(_ROWS))  # As many as decoding makes all of its copies for, and reads tables.
    cache, blocks = SlotCache(len(rows), max(map(len, rows))), FusedBlocks(model, num_rows=len(rows))
    filled = [len(row) - _NUM_ANSWERED for row in rows]
    logits = []
    with slot_attention(find_configs(model)), blocks.installed():
        prompts = [row[:count] for row, count in zip(rows, filled, strict=True)]
        fill_slots(model, cache, prompts, blocks=blocks)
        for places in ((0,), (1, 2)):
            positions = [[count + place for place in places] for count in filled]
            tokens = [[row[position] for position in own] for row, own in zip(rows, positions, strict=True)]
            step = Step.of_next_tokens(positions, device)
            logits.append(forward(model, cache, step, torch.tensor(tokens, device=device)).float())
    return torch.cat(logits, dim=1).transpose(0, 1)[:, : len(_ROWS)]
