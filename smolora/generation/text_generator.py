"""Prompts in, answers out.

What goes in, where it ends and what is shown is decided here; `decoding` computes.
"""

from __future__ import annotations

import logging
import math
import secrets
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain

from transformers import GenerationConfig

from smolora.data.chat import Message
from smolora.data.encoding import encode_with_template
from smolora.data.prompts import encode_prompt, list_prompts, render_prompt
from smolora.errors import ConfigError, DataError, ModelError
from smolora.generation.answer_text import cut_at_stop, decode_answer, ends_at_stop, iter_pieces
from smolora.generation.beams import is_cache_reordered, search_rows
from smolora.generation.choosing import Row
from smolora.generation.decoding import Switch, decode, in_use, keep_as_it_is
from smolora.generation.fallback import generate_rows
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.support import find_obstacle, find_shared_reach, is_moved_by_padding
from smolora.models.bundle import ModelBundle, find_start_id
from smolora.models.gpt import GPTModel
from smolora.models.gpt2_weights import to_gpt2
from smolora.models.tasks import ASKED_BY, HEAD_TASKS, describe_head

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Message]


class TextGenerator:
    """Answers prompts with a bundle's model, the way the bundle's prompt format says it was trained.

    A `GPTModel` is copied when the generator is made, so make a new one after training on. Threads may share one: they
    take turns at the model. `smolora.inference.chat.run_chat` is the interactive mode.

    The model's own generation_config.json says which tokens and texts end an answer and which tokens must or mustn't
    come, and gives the penalties that `SamplingSettings` leave out, a beam search's for length among them. How answers
    are drawn or looked for is the settings' alone otherwise.

    Example:
        ```python
        generator = TextGenerator(load_bundle("restaurants"))
        generator.generate(["name[Aromi]", "name[Zizzi]"], settings=SamplingSettings(temperature=0))
        ```
    """

    def __init__(self, bundle: ModelBundle, *, switch: Switch = keep_as_it_is) -> None:
        """Take a model that writes.

        Args:
            bundle: The model, and how it is asked.
            switch: Called whenever the model goes on, to switch on what it shall answer with.

        Raises:
            ConfigError: It has a task's head, which answers in another way.
        """
        if bundle.task in HEAD_TASKS:
            raise ConfigError(
                f"{describe_head(bundle.task, bundle.labels)}: ask it with InferencePipeline.{ASKED_BY[bundle.task]}, "
                "or score it with `smolora evaluate`."
            )
        self.bundle = bundle
        self._model = to_gpt2(bundle.model) if isinstance(bundle.model, GPTModel) else bundle.model
        self._switch = switch
        self._end_ids = frozenset(bundle.eos_token_ids)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        settings: SamplingSettings | Sequence[SamplingSettings] = DEFAULT_SAMPLING,
        batch_size: int = 16,
    ) -> list[str]:
        """Return an answer, without its prompt, for each prompt.

        Greedy answers don't depend on the prompts beside them, but for rounding in 16 bits. Nor do sampled ones with a
        seed: only a prompt that is asked again in the same call, with the same seed, gets another answer.

        Args:
            prompts: Texts or conversations; one text is one prompt.
            settings: For all prompts, or a sequence with one for each.
            batch_size: Rows that are answered at a time; one that is done makes room for the next. A row counts
                as often as it has beams.

        Raises:
            ConfigError: No rows are answered at a time.
            DataError: A prompt leaves no room in the model's context.
            BrokenRunError: The model's logits aren't finite.
        """
        return self.generate_until(_never, prompts, settings=settings, batch_size=batch_size)[0]

    def generate_until(
        self,
        is_over: Callable[[], bool],
        prompts: str | Sequence[Prompt],
        *,
        settings: SamplingSettings | Sequence[SamplingSettings] = DEFAULT_SAMPLING,
        batch_size: int = 16,
    ) -> tuple[list[str], list[bool]]:
        """Do what `generate` does, until `is_over` says so; return the answers, and of each whether it is whole.

        It is asked after each step. An answer is what it has come to by then: nothing, of a prompt that waits for its
        batch and of beams that are still being looked for.

        Raises:
            ConfigError: As `generate`.
            DataError: As `generate`.
            BrokenRunError: As `generate`.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}.")
        rows = self._prepare(list_prompts(prompts), settings)
        with closing(self._answer(rows, batch_size)) as steps:
            for _ in steps:
                if is_over():
                    break
        return [self._decode(row) for row in rows], [row.is_done for row in rows]

    def stream(self, prompt: Prompt, *, settings: SamplingSettings = DEFAULT_SAMPLING) -> Iterator[str]:
        """Yield the answer in pieces as they are computed; joined they are what `generate` returns.

        Closing the iterator stops the computation after the step at hand. An answer of beams comes in one piece:
        which of them wins isn't known before.

        Raises:
            DataError: The prompt leaves no room in the model's context.
            BrokenRunError: The model's logits aren't finite.
        """
        [row] = self._prepare([prompt], settings)
        pieces = iter_pieces(self.bundle.tokenizer, row.prompt_ids, self._iter_tokens(row))
        pieces = cut_at_stop(pieces, row.settings.stop)
        return _without_seam(pieces) if self._has_seam else pieces

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of an encoded prompt."""
        return len(self._encode(prompt))

    @property
    def longest_prompt(self) -> float:
        """How many tokens a prompt may have; the answer shares the context with it, unless an encoder reads it."""
        context = math.inf if self.bundle.context is None else self.bundle.context
        return context if self._has_encoder else context - 1

    @property
    def answers_side_by_side(self) -> bool:
        """Whether prompts of different lengths are answered together, and not one length after the other."""
        return self._slot_reach > 0 or not self._is_asked_by_length

    @property
    def _has_seam(self) -> bool:
        """Whether training put a space between a prompt and its answer, which belongs to neither."""
        prompt_format = self.bundle.prompt_format
        return prompt_format is not None and prompt_format.kind != "text" and not self._has_encoder

    @property
    def _has_encoder(self) -> bool:
        """Whether an encoder reads the prompt, and the decoder's own text begins with the answer."""
        return self.bundle.task == "seq2seq"

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        """Special tokens by what they spell, which is in the text of no answer, so that no stop text is found there."""
        added = self.bundle.tokenizer.added_tokens_decoder.items()
        return {token.content: id for id, token in added if token.special}

    @cached_property
    def _slot_reach(self) -> float:
        """Up to how many tokens rows are answered by `decoding`; past them, with a word on why, by `generate`."""
        if self.bundle.num_virtual_tokens:
            logger.info("this model is asked through transformers' generate: virtual tokens stand before every row.")
            return 0
        if self._has_encoder:
            logger.info("this model is asked through transformers' generate: it is an encoder-decoder.")
            return 0
        with in_use(self._model, self._switch):
            obstacle = find_obstacle(self._model)
        if obstacle is not None:
            logger.warning("this model is asked through transformers' generate, which is slower: %s.", obstacle)
            return 0
        reach = find_shared_reach(self._model)
        if reach is None:
            return math.inf
        logger.info(
            "prompts whose answers may end past %d tokens are asked through transformers' generate, which is slower: "
            "there this model lets the longest row of a step change how the others are read.",
            reach,
        )
        return reach

    @cached_property
    def _is_asked_by_length(self) -> bool:
        """Whether only prompts of one length go through `generate` together."""
        if self.bundle.num_virtual_tokens:
            return True  # Padding would stand between the virtual tokens and the prompt, and move it away from them.
        with in_use(self._model, self._switch):
            is_moved = is_moved_by_padding(self._model)
        if is_moved:
            logger.warning("padding would change this model's answers: only prompts of one length go together.")
        return is_moved

    @cached_property
    def _searches_with_cache(self) -> bool:
        """Whether beams keep what they have read; else, with a word on why, they read it again for each token."""
        if self._has_encoder or self.bundle.num_virtual_tokens:
            return True
        with in_use(self._model, self._switch):
            is_reordered = is_cache_reordered(self._model)
        if not is_reordered:
            logger.warning(
                "beams of this model read all of their text again for each token, which is slower: "
                "what it keeps of a text can't follow a beam that goes on from another one."
            )
        return is_reordered

    def _answer(self, rows: Sequence[Row], batch_size: int) -> Generator[None]:
        """Yield after each step, until all rows are done."""
        inside: list[Row] = []
        outside: list[Row] = []
        for row in rows:
            (inside if row.settings.num_beams == 1 and row.reach <= self._slot_reach else outside).append(row)
        if inside:
            yield from decode(self._model, inside, num_slots=batch_size, switch=self._switch)
        for alike in self._iter_alike(outside):
            searched = [row for row in alike if row.settings.num_beams > 1]
            others = [row for row in alike if row.settings.num_beams == 1]
            if searched:
                use_cache = self._searches_with_cache
                yield from search_rows(
                    self._model, searched, batch_size=batch_size, use_cache=use_cache, switch=self._switch
                )
            yield from generate_rows(self._model, others, batch_size=batch_size, switch=self._switch)
        self._tell_where_the_context_ended(rows)

    def _tell_where_the_context_ended(self, rows: Sequence[Row]) -> None:
        """Warn of the answer that lost most, if any did."""
        if cut := [row for row in rows if row.is_cut]:
            worst = max(cut, key=lambda row: row.settings.max_new_tokens - row.room)
            logger.warning(
                "the context of %d tokens ended an answer after %d tokens, before max_new_tokens=%d.",
                self.bundle.context,
                worst.room,
                worst.settings.max_new_tokens,
            )

    def _iter_alike(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yield rows that may be padded to one length."""
        lengths = sorted({len(row.prompt_ids) for row in rows})
        if len(lengths) < 2 or not self._is_asked_by_length:
            yield rows
            return
        for length in lengths:
            yield [row for row in rows if len(row.prompt_ids) == length]

    def _iter_tokens(self, row: Row) -> Iterator[int]:
        num_shown = 0
        for _ in self._answer([row], 1):
            fresh = row.ids[num_shown:]  # A thread may add to them while these are read.
            num_shown += len(fresh)
            yield from fresh

    def _prepare(self, prompts: Sequence[Prompt], settings: SamplingSettings | Sequence[SamplingSettings]) -> list[Row]:
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} settings for {len(prompts)} prompts: give one for all, or one for each.")
        encoded = [self._encode(prompt) for prompt in prompts]
        self._check_context(encoded)
        self.bundle.require_embedding(max(chain.from_iterable(encoded), default=0))
        chance = secrets.randbits(63)
        asked: Counter[tuple[int, ...]] = Counter()  # By seed and prompt.
        rows = []
        for ids, own in zip(encoded, each, strict=True):
            seed = chance if own.seed is None else own.seed
            rows.append(self._build_row(ids, own, _build_key(seed, asked[seed, *ids], ids)))
            asked[seed, *ids] += 1
        return rows

    def _check_context(self, encoded: Sequence[list[int]]) -> None:
        longest = max(map(len, encoded), default=0)
        if longest > self.longest_prompt:
            problem = "is too long" if self._has_encoder else "leaves no room for an answer"
            raise DataError(
                f"a prompt of {longest} tokens {problem}: "
                f"the model's context is {self.bundle.context} tokens. Shorten it to at most {self.longest_prompt}."
            )

    def _measure_room(self, ids: Sequence[int], context: int) -> int:
        """Return how many tokens the answer may have; that of an encoder-decoder has a context of its own."""
        return context if self._has_encoder else context - len(ids)

    def _build_row(self, ids: list[int], settings: SamplingSettings, key: bytes) -> Row:
        context, tokenizer = self.bundle.context, self.bundle.tokenizer
        settings = self._complete(settings)
        room = (
            settings.max_new_tokens
            if context is None
            else min(settings.max_new_tokens, self._measure_room(ids, context))
        )
        source_ids, ids = (ids, [find_start_id(self._model)]) if self._has_encoder else ([], ids)
        stops = partial(ends_at_stop, tokenizer, ids, stops=settings.stop) if settings.stop else None
        end_ids = self._end_ids | {self._special_ids[text] for text in settings.stop if text in self._special_ids}
        return Row(ids, room, settings, end_ids=end_ids, key=key, stops=stops, source_ids=source_ids)

    def _complete(self, settings: SamplingSettings) -> SamplingSettings:
        """Return them with the model's own repetition penalty where they name none, and with its own stop texts."""
        own = self._model.generation_config
        assert isinstance(own, GenerationConfig)
        penalty = own.repetition_penalty if settings.repetition_penalty is None else settings.repetition_penalty
        stops = (own.stop_strings,) if isinstance(own.stop_strings, str) else own.stop_strings or ()
        whole: SamplingSettings = settings.replace(repetition_penalty=penalty, stop=(*settings.stop, *stops))
        return whole

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer = self.bundle.tokenizer
        if self._has_encoder:
            asked = render_prompt(prompt, self.bundle.prompt_format)
            return list(encode_with_template([asked], tokenizer)["input_ids"][0])
        if ids := encode_prompt(prompt, self.bundle.prompt_format, tokenizer):
            return ids
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ModelError(
                "the tokenizer has neither a begin- nor an end-of-text token, so the prompt can't be empty."
            )
        return [int(start)]

    def _decode(self, row: Row) -> str:
        text = decode_answer(self.bundle.tokenizer, row.prompt_ids, row.ids)
        text = "".join(cut_at_stop([text], row.settings.stop))
        return text.removeprefix(" ") if self._has_seam else text


def _never() -> bool:
    return False


def _build_key(seed: int, occurrence: int, prompt_ids: Sequence[int]) -> bytes:
    """Return what decides a row's draws: the prompt, how often it was asked before in this call, and the seed."""
    return blake2b(array("q", [seed, occurrence, *prompt_ids]).tobytes(), digest_size=16).digest()


def _without_seam(pieces: Iterator[str]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if text := piece if number else piece.removeprefix(" "):
            yield text
