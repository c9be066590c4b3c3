"""Rows to answers, many at a time: each enters when a slot is free and leaves when it is done.

Every logit comes from a step of few tokens a row, its last one and drafts behind it: a prompt's last token is its row's
first step, so what fills a slot is the prompt without it, and needs no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from smolora.generation.choosing import Highest, Row, choose_tokens
from smolora.generation.drafts import Drafts
from smolora.generation.fused_blocks import FusedBlocks
from smolora.generation.slots import SlotCache, forward, slot_attention
from smolora.generation.step import Step
from smolora.models.exclusive import lock_of
from smolora.models.structure import find_configs, without_dropout

_MOST_PACKED, _MOST_PADDED = 2048, 1024
"""Tokens of a forward pass that fills slots, padding included where there is any."""

_LONGEST_PACKED = 512
"""Prompts up to here lie end to end and attend by products. Of longer ones torch's kernel takes less time: of one of
1,500 tokens, 6 heads of 48, 18 ms where products take 41."""

Switch = Callable[[], None]
"""Switches on what a model shall answer with, such as one of its adapters; costs next to nothing where it is on."""


def keep_as_it_is() -> None:
    """Switch nothing."""


def decode(model: nn.Module, rows: Sequence[Row], *, num_slots: int, switch: Switch = keep_as_it_is) -> Iterator[None]:
    """Answer `rows`, `num_slots` of them at a time; yield after each step, when rows have grown.

    Between two steps the model is free for others.
    """
    decoder: Decoder | None = None
    while decoder is None or not decoder.is_idle:
        with in_use(model, switch):
            decoder = decoder or Decoder(model, rows, num_slots=num_slots)
            decoder.step()
        yield


@contextmanager
def in_use(model: nn.Module, switch: Switch) -> Iterator[None]:
    """Keep the model from other threads inside the block, in eval mode and with what `switch` switches on."""
    with lock_of(model):
        switch()
        with in_eval_mode(model):
            yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for the block."""
    # A model in eval mode is taken at its word: looking at every module would be 3 % of a token's step.
    with torch.inference_mode(), without_dropout(model) if model.training else nullcontext():
        yield


class Decoder:
    """The rows that are being answered, and those that wait."""

    def __init__(self, model: nn.Module, rows: Sequence[Row], *, num_slots: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._waiting = sorted(rows, key=lambda row: row.room)  # The longest answer starts first, from the end.
        self._live: list[Row] = []
        self._cache = SlotCache(min(num_slots, len(rows)), max(row.reach for row in rows))
        self._drafts = Drafts()
        self._configs = find_configs(model)
        self._blocks = FusedBlocks(model, num_rows=min(num_slots, len(rows)))

    @property
    def is_idle(self) -> bool:
        """Whether every row is done."""
        return not self._live and not self._waiting

    def step(self) -> None:
        """Go on by a token or more in every live row; call it with the model `in_use`."""
        with slot_attention(self._configs), self._blocks.installed():
            self._admit()
            drafts = self._drafts.draft(self._live)
            self._take(self._read(drafts), drafts)
            self._release()

    def _read(self, drafts: Sequence[list[int]]) -> Tensor | Highest:
        """Return the logits [B, T, V] after a row's last token and each of its drafts, or the highest ones [B, T]."""
        num_tokens = 1 + max(map(len, drafts))
        ids, positions = [], []
        for row, draft in zip(self._live, drafts, strict=True):
            padding = [row.last_id] * (num_tokens - 1 - len(draft))
            ids.append([row.last_id, *draft, *padding])
            # Padding stays within the row's reach, where a token of its own will lie or none will be read.
            positions.append([min(row.length - 1 + place, row.reach - 1) for place in range(num_tokens)])
        step = Step.of_next_tokens(positions, self._device)
        input_ids = torch.tensor(ids, device=self._device)
        head = self._blocks.head
        if head and head.can_screen and all(row.is_greedy for row in self._live):
            with head.keeping_hidden() as kept:
                forward(self._model, self._cache, step, input_ids)
            [hidden] = kept
            return Highest(*(part.view(input_ids.shape) for part in head.screen(hidden.flatten(0, 1))))
        logits = forward(self._model, self._cache, step, input_ids)
        if head:
            head.learn_whether_last(logits)
        return logits

    def _take(self, read: Tensor | Highest, drafts: Sequence[list[int]]) -> None:
        """Let each row take its next token, and go on as long as it was the draft that was read there."""
        going = list(range(len(self._live)))
        for place in range(1 + max(map(len, drafts))):
            chosen = self._choose(read, going, place)
            for number, token in zip(going, chosen, strict=True):
                self._drafts.follow(self._live[number], token)
                self._live[number].take(token)
            going = [
                number
                for number, token in zip(going, chosen, strict=True)
                if drafts[number][place : place + 1] == [token] and not self._live[number].is_done
            ]
            if not going:
                return

    def _choose(self, read: Tensor | Highest, going: Sequence[int], place: int) -> list[int]:
        """Return the next token of rows by their numbers, from what was read at their last or a draft's place."""
        here = slice(None) if len(going) == len(self._live) else going  # A view where it can be.
        if isinstance(read, Highest):
            return Highest(read.logits[here, place], read.tokens[here, place]).to_list()
        return choose_tokens(read[here, place], [self._live[number] for number in going])

    def _admit(self) -> None:
        """Fill free slots, an eighth of all at a time: a forward pass costs about the same for few tokens."""
        num_slots = self._cache.num_slots
        free = num_slots - len(self._live)
        if not self._waiting or free < min(len(self._waiting), -(-num_slots // 8)):
            return
        entering = [self._waiting.pop() for _ in range(min(free, len(self._waiting)))]
        for group in _group_prompts(entering, packs=self._blocks.packs_prompts):
            prompts = [row.prompt_ids[:-1] for row in group if len(row.prompt_ids) > 1]  # Of one token they come last.
            if prompts:
                fill_slots(self._model, self._cache, prompts, blocks=self._blocks, first_slot=len(self._live))
            self._live += group
        for row in entering:
            self._drafts.read(row.prompt_ids)

    def _release(self) -> None:
        """Let the last row take the slot of one that is done."""
        for slot in reversed(range(len(self._live))):
            if self._live[slot].is_done:
                last = self._live.pop()
                if slot < len(self._live):
                    self._live[slot] = last
                    self._cache.move(len(self._live), slot, last.length - 1)


def fill_slots(
    model: nn.Module, cache: SlotCache, prompts: Sequence[Sequence[int]], *, blocks: FusedBlocks, first_slot: int = 0
) -> None:
    """Fill slots with prompts of a token or more; call it with `blocks` installed."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    if blocks.packs_prompts and longest <= _LONGEST_PACKED:
        step = Step.of_packed_prompts(first_slot, [len(prompt) for prompt in prompts], device)
        ids = [list(chain.from_iterable(prompts))]
    else:
        step = Step.of_prompts(first_slot, len(prompts), longest, device)
        ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    forward(model, cache, step, torch.tensor(ids, device=device))


def _group_prompts(rows: Sequence[Row], *, packs: bool) -> Iterator[list[Row]]:
    """Yield rows that fill slots together, the longest first."""
    group: list[Row] = []
    num_tokens = 0
    for row in sorted(rows, key=lambda row: -len(row.prompt_ids)):
        length, longest = (len(one.prompt_ids) - 1 for one in (row, (group or [row])[0]))
        is_packed = packs and longest <= _LONGEST_PACKED
        num_tokens += length if is_packed else longest
        if group and num_tokens > (_MOST_PACKED if is_packed else _MOST_PADDED):
            yield group
            group, num_tokens = [], length
        group.append(row)
    if group:
        yield group
