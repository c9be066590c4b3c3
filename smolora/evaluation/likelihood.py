"""How likely a model holds given answers to be: the loss of references, and the likeliest of a few labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from smolora.data.benchmark_rows import Prompt
from smolora.data.chat import check_messages
from smolora.data.collate import collate_padded
from smolora.data.encoding import encode_pairs
from smolora.data.prompts import PromptFormat, encode_row
from smolora.data.token_dataset import Example
from smolora.generation.decoding import in_eval_mode
from smolora.models.bundle import ModelBundle
from smolora.models.end_token import choose_end_token
from smolora.training.loss import sum_cross_entropy, target_logits_of


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one answer: the sum of -log p over its tokens, in nats, and how many there are."""

    loss_sum: float
    num_tokens: int


class LikelihoodScorer:
    """Measures answers under a model, many at a time, in the form it was trained in."""

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 16) -> None:
        self.bundle = bundle
        self.batch_size = batch_size

    def measure(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Likelihood]:
        """Return the likelihood of each pair's answer, its end token included.

        What is past the model's context isn't measured; an answer that begins there has no tokens.

        Raises:
            DataError: A pair can't be encoded.
        """
        return self.measure_examples(self._encode(pairs))

    def measure_examples(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Do for encoded rows what `measure` does for pairs: the likelihood of each row's targets."""
        context = self.bundle.context
        examples = [Example(example.input_ids[:context], example.is_target[:context]) for example in examples]
        found = [Likelihood(0.0, 0)] * len(examples)
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        with_targets = [index for index in order if examples[index].num_target_tokens]
        for start in range(0, len(with_targets), self.batch_size):
            batch = with_targets[start : start + self.batch_size]
            for index, likelihood in zip(batch, self._measure([examples[i] for i in batch]), strict=True):
                found[index] = likelihood
        return found

    def _measure(self, examples: Sequence[Example]) -> Iterator[Likelihood]:
        # Rows of about one length cost little padding; packed, attention would cost the square of all rows together.
        batch = collate_padded(examples).to(self.bundle.device)
        with in_eval_mode(self.bundle.model):
            logits = target_logits_of(self.bundle.model)(self.bundle.model, batch)
            counts = [example.num_target_tokens for example in examples]
            parts = zip(torch.split(logits, counts), torch.split(batch.targets, counts), counts, strict=True)
            yield from [Likelihood(sum_cross_entropy(row, ids).item(), count) for row, ids, count in parts]

    @cached_property
    def _own_end_token(self) -> str | None:
        """What ends the answers of a model that was never tuned: the same token that tuning it would choose."""
        return choose_end_token(self.bundle)

    def _encode(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Example]:
        fmt, tokenizer = self.bundle.prompt_format, self.bundle.tokenizer
        if (fmt is None or fmt.kind in ("text", "prompt_completion")) and all(isinstance(p, str) for p, _ in pairs):
            texts = [(str(prompt), answer) for prompt, answer in pairs]
            return encode_pairs(texts, tokenizer, end_token=fmt.end_token if fmt else self._own_end_token)
        return [encode_row(*_render(prompt, answer, fmt), tokenizer) for prompt, answer in pairs]


def _render(prompt: Prompt, answer: str, fmt: PromptFormat | None) -> tuple[dict[str, object], PromptFormat]:
    """Return a pair as a row of the model's own form, and that form; messages for a model without one are plain."""
    if fmt is not None and fmt.kind != "messages":
        text = prompt if isinstance(prompt, str) else check_messages(prompt)[-1]["content"]
        asked, answered = ("instruction", "output") if fmt.kind == "instruction" else ("prompt", "completion")
        return {asked: text, answered: answer}, _with_columns(fmt, (asked, answered))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
    form = fmt or PromptFormat(kind="messages", columns={"messages": "messages"})
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}, _with_columns(form, ("messages",))


def _with_columns(fmt: PromptFormat, roles: Sequence[str]) -> PromptFormat:
    return fmt.model_copy(update={"columns": {role: role for role in roles}})
