"""Which token ends an answer: one that the model can tell from the others.

Tokens that pretraining never showed end up with one and the same row in the head: every step pushes them all down
together. If end-of-text is among them, a model with a frozen head can't give it more than its share of that crowd,
however long it is tuned, and its answers never stop. The loss hardly shows it: it is one token a row.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from smolora.models.bundle import ModelBundle

logger = logging.getLogger(__name__)

_TWIN = 0.1
"""Rows nearer than this share of their length are twins. Trained tokens keep a distance near their own length."""


def choose_end_token(bundle: ModelBundle) -> str | None:
    """Return the token that rows end with, or None for the tokenizer's own end-of-text token.

    It is the first of the tokenizer's and the generation config's end tokens that has no twin in the head. Where none
    is, the tokenizer's stays, with a warning.

    Raises:
        ModelError: The model has no embedding for the tokenizer's.
    """
    head = _find_head(bundle)
    own = bundle.tokenizer.eos_token_id
    if head is None or own is None:
        return None
    bundle.require_embedding(own)
    if not (twins := count_twins(head, own)):
        return None
    crowd = f"the base can't tell {bundle.tokenizer.eos_token!r} from {twins} other tokens that it never saw"
    for token_id in bundle.eos_token_ids:
        if not count_twins(head, token_id):
            token = str(bundle.tokenizer.convert_ids_to_tokens(token_id))
            logger.info("rows end with %r: %s", token, crowd)
            return token
    logger.warning("%s: answers of the tuned model will hardly ever stop by themselves", crowd)
    return None


@torch.no_grad()
def count_twins(head: torch.Tensor, token_id: int) -> int:
    """Return how many other rows of the head [V, D] are the same as that of `token_id`, but for noise."""
    rows = head.detach().float()
    distances = torch.linalg.vector_norm(rows - rows[token_id], dim=1)
    return int((distances < _TWIN * torch.linalg.vector_norm(rows[token_id])).sum()) - 1


def _find_head(bundle: ModelBundle) -> torch.Tensor | None:
    path = next((part.name for part in bundle.anatomy.parts if part.group == "head"), None)
    head = bundle.model.get_submodule(path) if path else None
    return head.weight if isinstance(head, nn.Linear) else None
