"""How likely a model holds given answers to be: the loss of references, and the likeliest of a few labels."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from smolora.data.benchmark_rows import Prompt
from smolora.data.collate import get_data_collator
from smolora.data.encoding import encode_pairs
from smolora.data.prompts import PromptFormat, check_prompt, encode_row, render_prompt
from smolora.data.seq2seq import cut_sides, encode_answered
from smolora.data.token_dataset import Example
from smolora.generation.decoding import in_eval_mode
from smolora.generation.support import find_shared_reach
from smolora.models.bundle import ModelBundle
from smolora.models.end_token import choose_end_token
from smolora.models.gpt import GPTModel
from smolora.training.loss import sum_cross_entropy, target_logits_of

_MOST_LOGITS = 2**25
"""Of one forward pass: 128 MiB in float32, and some hundred tokens of a large vocabulary still."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one answer: the sum of -log p over its tokens, in nats, and how many there are."""

    loss_sum: float
    num_tokens: int
    is_whole: bool = True
    """Whether all of the answer fits into the model's context."""


class LikelihoodScorer:
    """Measures answers under a model, many at a time, in the form it was trained in."""

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 16) -> None:
        self.bundle = bundle
        self.batch_size = batch_size

    def measure(self, pairs: Sequence[tuple[Prompt, str]], *, unended: Container[int] = ()) -> list[Likelihood]:
        """Return the likelihood of each pair's answer, its end token included.

        What is past the model's context isn't measured; an answer that begins there has no tokens.

        Args:
            pairs: Prompts and answers.
            unended: Numbers of the pairs whose answers go on, so that no end token is theirs.

        Raises:
            DataError: A pair can't be encoded.
        """
        examples = [
            Example(example.input_ids[:-1], example.is_target[:-1]) if number in unended else example
            for number, example in enumerate(self._encode(pairs))
        ]
        return self.measure_examples(examples)

    def measure_examples(self, examples: Sequence[Example]) -> list[Likelihood]:
        """Do for encoded rows what `measure` does for pairs: the likelihood of each row's targets."""
        cut = [self._cut(example) for example in examples]
        losses = [0.0] * len(cut)
        order = sorted(range(len(cut)), key=lambda index: len(cut[index]))
        for batch in self._group([index for index in order if cut[index].num_target_tokens], cut):
            for index, loss in zip(batch, self._measure([cut[i] for i in batch]), strict=True):
                losses[index] = loss
        return [
            Likelihood(loss, kept.num_target_tokens, kept.num_target_tokens == example.num_target_tokens)
            for loss, kept, example in zip(losses, cut, examples, strict=True)
        ]

    def _cut(self, example: Example) -> Example:
        context = self.bundle.context
        if self.bundle.task == "seq2seq":
            return example if context is None else cut_sides(example, context)
        if self.bundle.task != "causal_lm":
            return example
        return Example(example.input_ids[:context], example.is_target[:context])

    def _group(self, order: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
        """Yield what is measured at a time, of about one length: few enough rows, and few enough logits."""
        group: list[int] = []
        for index in order:
            counts = [examples[one].num_target_tokens for one in [*group, index]]
            # An encoder-decoder's answers are padded to one length.
            num_targets = len(counts) * max(counts) if self.bundle.task == "seq2seq" else sum(counts)
            num_logits = num_targets * len(self.bundle.tokenizer)
            is_full = len(group) == self.batch_size or num_logits > _MOST_LOGITS
            if group and (is_full or len(examples[group[0]]) <= self._shared_reach < len(examples[index])):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _measure(self, examples: Sequence[Example]) -> list[float]:
        # Rows of about one length cost little padding; packed, attention would cost the square of all rows together.
        batch = get_data_collator("padded", self.bundle.task)(examples).to(self.bundle.device)
        counts = [example.num_target_tokens for example in examples]
        model = self.bundle.model
        with in_eval_mode(model):
            logits = target_logits_of(model, self.bundle.task)(model, batch)
            parts = zip(torch.split(logits, counts), torch.split(batch.targets, counts), strict=True)
            return [sum_cross_entropy(row, ids).item() for row, ids in parts]

    @cached_property
    def _shared_reach(self) -> float:
        """Up to how many tokens rows are measured beside any others; a longer one may change how they are read."""
        model = self.bundle.model
        return math.inf if isinstance(model, GPTModel) else find_shared_reach(model) or math.inf

    @cached_property
    def _own_end_token(self) -> str | None:
        """What ends the answers of a model that was never tuned: the same token that tuning it would choose."""
        return choose_end_token(self.bundle)

    def _encode(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Example]:
        fmt, tokenizer = self.bundle.prompt_format, self.bundle.tokenizer
        if self.bundle.task == "seq2seq":
            return encode_answered([(render_prompt(prompt, fmt), answer) for prompt, answer in pairs], tokenizer)
        if (fmt is None or fmt.kind in ("text", "prompt_completion")) and all(isinstance(p, str) for p, _ in pairs):
            texts = [(str(prompt), answer) for prompt, answer in pairs]
            return encode_pairs(texts, tokenizer, end_token=fmt.end_token if fmt else self._own_end_token)
        return [encode_row(*_render(prompt, answer, fmt), tokenizer) for prompt, answer in pairs]


def _render(prompt: Prompt, answer: str, fmt: PromptFormat | None) -> tuple[dict[str, object], PromptFormat]:
    """Return a pair as a row of the model's own form, and that form; messages for a model without one are plain."""
    if fmt is not None and fmt.kind != "messages":
        text = prompt if isinstance(prompt, str) else check_prompt(prompt)[-1]["content"]
        asked, answered = ("instruction", "output") if fmt.kind == "instruction" else ("prompt", "completion")
        return {asked: text, answered: answer}, _with_columns(fmt, (asked, answered))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_prompt(prompt)
    form = fmt or PromptFormat(kind="messages", columns={"messages": "messages"})
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}, _with_columns(form, ("messages",))


def _with_columns(fmt: PromptFormat, roles: Sequence[str]) -> PromptFormat:
    return fmt.model_copy(update={"columns": {role: role for role in roles}})
