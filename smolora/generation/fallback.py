"""Rows to answers by transformers' own `generate`: for models that can't be decoded in slots.

It calls back, in a thread of its own, for each token; the choice is the same function's as in slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from smolora.generation.choosing import Row, choose_tokens
from smolora.generation.decoding import Switch, in_use, keep_as_it_is

_PAD_ID = 0  # Any id will do: padding is masked by attention.

# What the model's generation_config.json would decide where `generate` is told nothing: None is nothing only as an
# argument, not in a GenerationConfig.
_NEUTRAL: Mapping[str, object] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), False),
    **dict.fromkeys(("max_time", "stop_strings", "token_healing")),
    # Other ways to search.
    **dict.fromkeys(("assistant_early_exit", "constraints", "diversity_penalty", "dola_layers", "force_words_ids")),
    **dict.fromkeys(("num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "use_mtp")),
}


def generate_rows(
    model: nn.Module, rows: Sequence[Row], *, batch_size: int, switch: Switch = keep_as_it_is
) -> Iterator[None]:
    """Answer `rows` in batches; yield after each step, when rows have grown by a token.

    A batch keeps the model until its last token: `generate` isn't left in between.
    """
    alike = sorted(rows, key=lambda row: (row.room, row.num_asked))
    for start in range(0, len(alike), batch_size):
        yield from _generate_batch(model, alike[start : start + batch_size], switch)


def _generate_batch(model: nn.Module, rows: Sequence[Row], switch: Switch) -> Iterator[None]:
    """Yield while a thread computes: `generate` calls back, and a generator can't be called back."""
    steps: SimpleQueue[bool] = SimpleQueue()
    is_stopped = Event()
    num_threads = torch.get_num_threads()

    def compute() -> None:
        torch.set_num_threads(num_threads)  # A new thread starts with the system's number, not with ours.
        with in_use(model, switch):
            _generate(model, rows, steps, is_stopped)

    with ThreadPoolExecutor(1, thread_name_prefix="smolora-generate") as pool:
        done = pool.submit(compute)
        done.add_done_callback(lambda _: steps.put(False))
        try:
            while steps.get():
                yield
        finally:
            is_stopped.set()
        done.result()


def _generate(model: nn.Module, rows: Sequence[Row], steps: SimpleQueue[bool], is_stopped: Event) -> None:
    def are_done(input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        return torch.tensor([row.is_done or is_stopped.is_set() for row in rows], device=input_ids.device)

    with quiet_positions():
        model.generate(  # type: ignore[operator]
            **pad_prompts(rows, next(model.parameters()).device),
            **build_settings(max_new_tokens=max(row.room for row in rows)),
            logits_processor=LogitsProcessorList([_RowChooser(rows, steps)]),
            stopping_criteria=StoppingCriteriaList([are_done]),
        )


@contextmanager
def quiet_positions() -> Iterator[None]:
    """Silence peft's word, for virtual tokens, that it counts positions itself: rows are never padded with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield


def pad_prompts(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """Return the prompts, padded on their left to one length, as the arguments of `generate`: [B, T] each.

    What an encoder reads is padded on the right, as in training: some count positions from the first token.
    """
    if rows[0].source_ids:
        return {
            "input_ids": _pad_right([row.source_ids for row in rows], _PAD_ID, device),
            "attention_mask": _pad_right([[1] * len(row.source_ids) for row in rows], 0, device),
            "decoder_input_ids": torch.tensor([row.prompt_ids for row in rows], device=device),
        }
    width = max(len(row.prompt_ids) for row in rows)
    padding = [width - len(row.prompt_ids) for row in rows]
    input_ids = [[_PAD_ID] * pad + row.prompt_ids for pad, row in zip(padding, rows, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _pad_right(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


def build_settings(*, max_new_tokens: int, num_beams: int = 1) -> dict[str, object]:
    """Return the settings by which `generate` draws and penalises nothing, and answers with one tensor of tokens."""
    return {**_NEUTRAL, "max_new_tokens": max_new_tokens, "num_beams": num_beams, "pad_token_id": _PAD_ID}


class _RowChooser(LogitsProcessor):  # type: ignore[misc]
    """Lets each row take its token, and leaves `generate` no other choice."""

    def __init__(self, rows: Sequence[Row], steps: SimpleQueue[bool]) -> None:
        self._rows = rows
        self._steps = steps

    def __deepcopy__(self, _memo: object) -> _RowChooser:
        """Return this one, which answers its own rows: peft copies what `generate` of an encoder-decoder is given."""
        return self

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores with one finite number a row."""
        live = [number for number, row in enumerate(self._rows) if not row.is_done]
        tokens = torch.full((len(self._rows),), _PAD_ID, device=scores.device)
        for number, token in zip(live, choose_tokens(scores[live], [self._rows[n] for n in live]), strict=True):
            self._rows[number].take(token)
            tokens[number] = token
        self._steps.put(True)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
