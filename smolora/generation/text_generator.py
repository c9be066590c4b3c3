"""Prompts in, answers out.

transformers' `generate` computes. What goes in, where it ends, what is drawn and what is shown is decided here.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from smolora.data.chat import Message
from smolora.data.prompts import encode_prompt
from smolora.errors import DataError, ModelError
from smolora.generation.answer_text import decode_answer, iter_pieces
from smolora.generation.random_state import own_random_state
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.gpt import GPTModel
from smolora.models.gpt2_weights import to_gpt2

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class _Request:
    """An encoded prompt and how many tokens may answer it."""

    prompt_ids: list[int]
    room: int


class TextGenerator:
    """Answers prompts with a bundle's model, the way the bundle's prompt format says it was trained.

    A `GPTModel` is copied when the generator is made, so make a new one after training on. Settings that
    `SamplingSettings` doesn't name, such as a repetition penalty, come from the model's own generation_config.json.
    `smolora.inference.chat.run_chat` is the interactive mode.

    Example:
        generator = TextGenerator(load_bundle("RUN"))
        generator.generate(["name[Aromi]", "name[Zizzi]"], settings=SamplingSettings(temperature=0))
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self._model = to_gpt2(bundle.model) if isinstance(bundle.model, GPTModel) else bundle.model
        self._eos_token_ids = list(bundle.eos_token_ids)

    def generate(
        self, prompts: str | Sequence[Prompt], *, settings: SamplingSettings = DEFAULT_SAMPLING, batch_size: int = 16
    ) -> list[str]:
        """Return an answer, without its prompt, for each prompt.

        Greedy answers don't depend on `batch_size`; sampled ones repeat with the same seed and the same prompts.

        Raises:
            DataError: A prompt leaves no room in the model's context.
        """
        requests = self._prepare([prompts] if isinstance(prompts, str) else prompts, settings)
        answers = [""] * len(requests)
        with own_random_state(self.bundle.device, settings.seed):
            for batch in _batches(requests, batch_size):
                answer_ids = self._run([requests[index] for index in batch], settings)
                for index, ids in zip(batch, answer_ids, strict=True):
                    answers[index] = self._decode(requests[index], ids)
        return answers

    def stream(self, prompt: Prompt, *, settings: SamplingSettings = DEFAULT_SAMPLING) -> Iterator[str]:
        """Yield the answer in pieces as they are computed; joined they are what `generate` returns.

        Closing the iterator stops the computation after the token at hand.

        Raises:
            DataError: The prompt leaves no room in the model's context.
        """
        [request] = self._prepare([prompt], settings)
        pieces = iter_pieces(self.bundle.tokenizer, request.prompt_ids, self._iter_tokens(request, settings))
        return _without_seam(pieces) if self._has_seam else pieces

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of an encoded prompt."""
        return len(self._encode(prompt))

    @property
    def _has_seam(self) -> bool:
        """Whether training put a space between a prompt and its answer, which belongs to neither."""
        prompt_format = self.bundle.prompt_format
        return prompt_format is not None and prompt_format.kind != "text"

    def _prepare(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[_Request]:
        encoded = [self._encode(prompt) for prompt in prompts]
        context = self.bundle.context
        if context is None:
            return [_Request(ids, settings.max_new_tokens) for ids in encoded]
        longest = max(map(len, encoded), default=0)
        if longest >= context:
            raise DataError(
                f"a prompt of {longest} tokens leaves no room for an answer: the model's context is {context} tokens. "
                f"Shorten it to at most {context - 1}."
            )
        if longest + settings.max_new_tokens > context:
            logger.warning(
                "the context of %d tokens ends an answer after %d tokens, before max_new_tokens=%d.",
                context,
                context - longest,
                settings.max_new_tokens,
            )
        return [_Request(ids, min(settings.max_new_tokens, context - len(ids))) for ids in encoded]

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer = self.bundle.tokenizer
        if ids := encode_prompt(prompt, self.bundle.prompt_format, tokenizer):
            return ids
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ModelError(
                "the tokenizer has neither a begin- nor an end-of-text token, so the prompt can't be empty."
            )
        return [int(start)]

    def _decode(self, request: _Request, answer_ids: list[int]) -> str:
        text = decode_answer(self.bundle.tokenizer, request.prompt_ids, answer_ids)
        return text.removeprefix(" ") if self._has_seam else text

    def _iter_tokens(self, request: _Request, settings: SamplingSettings) -> Iterator[int]:
        """Yield token ids while a thread computes them: `generate` calls back, and a generator can't be called back."""
        tokens = _TokenQueue(self._eos_token_ids)
        num_threads = torch.get_num_threads()

        def compute() -> None:
            torch.set_num_threads(num_threads)  # A new thread starts with the system's number, not with ours.
            with own_random_state(self.bundle.device, settings.seed):
                self._run([request], settings, tokens)

        with ThreadPoolExecutor(1, thread_name_prefix="smolora-stream") as pool:
            done = pool.submit(compute)
            done.add_done_callback(lambda _: tokens.end())
            try:
                yield from tokens
            finally:
                tokens.is_stopped.set()
            done.result()

    def _run(
        self, batch: Sequence[_Request], settings: SamplingSettings, streamer: _TokenQueue | None = None
    ) -> list[list[int]]:
        """Return the new tokens of each request, without the token that ended it."""
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        rows = [[self._pad_token_id] * pad + request.prompt_ids for pad, request in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        device = self.bundle.device
        with _in_eval_mode(self._model):
            output: Tensor = self._model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._build_generation_config(batch[0].room, settings),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([streamer.stop] if streamer else []),
            )
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _build_generation_config(self, max_new_tokens: int, settings: SamplingSettings) -> GenerationConfig:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=1,
            eos_token_id=self._eos_token_ids or None,
            pad_token_id=self._pad_token_id,
        )
        if settings.is_greedy:  # The neutral values of transformers; left out, the model's own file would fill them in.
            config.update(do_sample=False, temperature=1.0, top_k=50, top_p=1.0)
        else:
            top_p = 1.0 if settings.top_p is None else settings.top_p
            config.update(do_sample=True, temperature=settings.temperature, top_k=settings.top_k or 0, top_p=top_p)
        return config

    @property
    def _pad_token_id(self) -> int:
        """Any id will do: padding is masked by attention."""
        return int(self.bundle.tokenizer.pad_token_id or 0)

    def _until_end(self, ids: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in self._eos_token_ids, ids))


class _TokenQueue(BaseStreamer):  # type: ignore[misc]
    """Takes tokens from `generate` in one thread and is iterated in another."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self.is_stopped = Event()
        self._eos_token_ids = eos_token_ids
        self._tokens: SimpleQueue[int | None] = SimpleQueue()
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self._has_prompt and value.item() not in self._eos_token_ids:
            self._tokens.put(int(value.item()))
        self._has_prompt = True

    def end(self) -> None:
        """Let the iterator end."""
        self._tokens.put(None)

    def stop(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        """Tell `generate` whether somebody stopped listening: a stopping criterion."""
        return torch.full((input_ids.shape[0],), self.is_stopped.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token


def _batches(requests: Sequence[_Request], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of requests that may be answered together: with equal room, and of similar length."""
    order = sorted(range(len(requests)), key=lambda index: (requests[index].room, len(requests[index].prompt_ids)))
    for _, group in itertools.groupby(order, key=lambda index: requests[index].room):
        alike = list(group)
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def _without_seam(pieces: Iterator[str]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if text := piece if number else piece.removeprefix(" "):
            yield text


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
