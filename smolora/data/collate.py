"""From examples to a batch of tensors, in three layouts with the same loss.

packed: rows end to end in one long row, positions restarting. padded: one row each, filled up on the right.
windows: equal lengths, mostly every position a target. B batch, T time, U time of the answers, N targets of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smolora.config.model import TaskType
from smolora.data.token_dataset import Example, TokenArray
from smolora.errors import DataError

Layout = Literal["packed", "padded", "windows"]


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass."""

    input_ids: Tensor
    """[B, T] int64; packed: B = 1."""

    position_ids: Tensor | None
    """[B, T] int64, restarting at 0 with every row; packed only."""

    attention_mask: Tensor | None
    """[B, T] int64, 0 on padding; padded only. Padding is known by place, never by the pad token's id."""

    target_positions: Tensor | None
    """[N] flat indices into B * T (seq2seq: B * U) of the positions whose logits predict; None: every one, in order."""

    targets: Tensor
    """[N] the ids to predict: tokens, labels, or (qa) positions in the row."""

    num_input_tokens: int
    """Real tokens, without padding."""

    row_lengths: tuple[int, ...]
    """Real tokens of each row."""

    token_type_ids: Tensor | None = None
    """[B, T] int64: the segment of each token, where the tokenizer tells segments apart."""

    candidates: Tensor | None = None
    """[B, T] bool, qa only: the positions where an answer may begin and end."""

    answer_ids: Tensor | None = None
    """[B, U] int64, seq2seq only: the tokens of each answer, filled up on the right."""

    @property
    def num_target_tokens(self) -> int:
        """Tokens that the loss counts."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=_move(self.position_ids, device),
            attention_mask=_move(self.attention_mask, device),
            target_positions=_move(self.target_positions, device),
            targets=self.targets.to(device, non_blocking=True),
            num_input_tokens=self.num_input_tokens,
            row_lengths=self.row_lengths,
            token_type_ids=_move(self.token_type_ids, device),
            candidates=_move(self.candidates, device),
            answer_ids=_move(self.answer_ids, device),
        )


def collate_packed(examples: Sequence[Example]) -> Batch:
    """Lay rows end to end with positions restarting; attention has to stop where they restart.

    Raises:
        DataError: No token of the batch is a target.
    """
    positions, targets = _find_targets(examples, row_starts=_starts([len(example) for example in examples]))
    input_ids = np.concatenate([example.input_ids for example in examples])
    return Batch(
        input_ids=_int64(input_ids)[None],
        position_ids=_int64(np.concatenate([np.arange(len(example)) for example in examples]))[None],
        attention_mask=None,
        target_positions=_int64(positions),
        targets=_int64(targets),
        num_input_tokens=len(input_ids),
        row_lengths=tuple(map(len, examples)),
    )


def collate_padded(examples: Sequence[Example], *, pad_token_id: int = 0) -> Batch:
    """Fill rows up on the right to the longest; the mask, not the pad token's id, says what is padding.

    Raises:
        DataError: No token of the batch is a target.
    """
    lengths = [len(example) for example in examples]
    width = max(lengths)
    positions, targets = _find_targets(examples, row_starts=np.arange(len(examples)) * width)
    segments = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    return Batch(
        input_ids=_stack([example.input_ids for example in examples], filler=pad_token_id),
        token_type_ids=_stack(segments) if segments else None,
        position_ids=None,
        attention_mask=_int64(np.arange(width) < np.array(lengths)[:, None]),
        target_positions=_int64(positions),
        targets=_int64(targets),
        num_input_tokens=sum(lengths),
        row_lengths=tuple(lengths),
    )


def collate_windows(examples: Sequence[Example]) -> Batch:
    """Stack windows of one length: all but the last token go in, and of all but the first the targets are predicted.

    Raises:
        DataError: The windows differ in length, or no token is a target.
    """
    lengths = {len(example) for example in examples}
    if len(lengths) != 1:
        raise DataError(f"windows of one batch have one length, found {sorted(lengths)}. Use the packed layout.")
    windows = _int64(np.stack([example.input_ids for example in examples]))  # [B, context + 1]
    inputs = windows[:, :-1].contiguous()
    positions, targets = _find_targets(examples, row_starts=np.arange(len(inputs)) * inputs.shape[1])
    return Batch(
        input_ids=inputs,
        position_ids=None,
        attention_mask=None,
        target_positions=None if len(targets) == inputs.numel() else _int64(positions),
        targets=_int64(targets),
        num_input_tokens=inputs.numel(),
        row_lengths=(inputs.shape[1],) * len(inputs),
    )


def collate_spans(examples: Sequence[Example]) -> Batch:
    """Pad rows of qa, whose two targets are the first and the last position of the answer among the marked ones."""
    marks = _stack([example.is_target.astype(np.int32) for example in examples])
    batch = collate_padded([replace(example, is_target=np.zeros_like(example.is_target)) for example in examples])
    return replace(batch, target_positions=None, candidates=marks.bool())


def collate_answers(examples: Sequence[Example]) -> Batch:
    """Pad rows of seq2seq, whose targets are all tokens of an answer of their own."""
    answers = [_labels_of(example) for example in examples]
    answer_ids = _stack(answers)
    starts = np.arange(len(answers)) * answer_ids.shape[1]
    positions = [start + np.arange(len(answer)) for start, answer in zip(starts, answers, strict=True)]
    return replace(collate_padded(examples), target_positions=_int64(np.concatenate(positions)), answer_ids=answer_ids)


def get_data_collator(layout: Layout, task: TaskType = "causal_lm") -> Callable[[Sequence[Example]], Batch]:
    """Return the function that collates examples of `task` in `layout`."""
    if layout == "padded" and task in _PADDED:
        return _PADDED[task]
    collators: dict[str, Callable[[Sequence[Example]], Batch]] = {
        "packed": collate_packed,
        "padded": collate_padded,
        "windows": collate_windows,
    }
    if layout not in collators:
        raise ValueError(f"no layout {layout!r}. Layouts: {', '.join(collators)}")
    return collators[layout]


_PADDED: dict[TaskType, Callable[[Sequence[Example]], Batch]] = {"qa": collate_spans, "seq2seq": collate_answers}


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


def _find_targets(examples: Sequence[Example], *, row_starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each target, the flat position whose logits predict it, and its id.

    A token is predicted at the token before it; a label of its own at the position that is marked.
    """
    positions = [
        start + np.flatnonzero(example.is_target) - (example.labels is None)
        for start, example in zip(row_starts, examples, strict=True)
    ]
    targets = [
        example.input_ids[example.is_target] if example.labels is None else example.labels for example in examples
    ]
    if not sum(len(part) for part in targets):
        raise DataError(
            f"none of the {len(examples)} rows of a batch has a target token, so its loss would be undefined. "
            "Check the prompt and completion columns with `smolora train --show`."
        )
    return np.concatenate(positions), np.concatenate(targets)


def _move(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _labels_of(example: Example) -> TokenArray:
    assert example.labels is not None, "examples of this task have labels"
    return example.labels


def _stack(rows: Sequence[TokenArray], *, filler: int = 0) -> Tensor:
    """Return [B, T] int64 of rows filled up on the right."""
    stacked = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(stacked)


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
