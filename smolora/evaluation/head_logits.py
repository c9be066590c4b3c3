"""What the head of a task says: the logits of every example's targets, a few examples at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolora.data.collate import get_data_collator
from smolora.data.token_dataset import Example
from smolora.generation.decoding import in_eval_mode
from smolora.models.bundle import ModelBundle
from smolora.training.loss import target_logits_of


def compute_head_logits(bundle: ModelBundle, examples: Sequence[Example], *, batch_size: int) -> list[Tensor]:
    """Return the logits of each example's targets, [N, C] in float32 on the CPU, in the order of `examples`.

    C is the labels; of qa the positions of the longest example beside it, where N is 2: where an answer begins, where
    it ends. Examples of about one length go together. One without a target isn't asked, and has [0, 0].
    """
    found = [torch.zeros(0, 0)] * len(examples)
    asked = [index for index, example in enumerate(examples) if example.num_target_tokens]
    asked.sort(key=lambda index: len(examples[index]))
    collate, logits_of = get_data_collator("padded", bundle.task), target_logits_of(bundle.model, bundle.task)
    with in_eval_mode(bundle.model):
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            batch = collate([examples[index] for index in part]).to(bundle.device)
            logits = logits_of(bundle.model, batch)[: len(batch.targets)].float().cpu()
            counts = [examples[index].num_target_tokens for index in part]
            for index, own in zip(part, torch.split(logits, counts), strict=True):
                found[index] = own
    return found
