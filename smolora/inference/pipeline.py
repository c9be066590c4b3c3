"""`InferencePipeline`: a merged model, a base with an adapter, or a base with several, asked by task.

Prompts go through the same rendering as in training, evaluation and chat, so that an adapter sees what
it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, overload

import numpy as np
import numpy.typing as npt

from smolora.adapters.store import open_base, open_model
from smolora.adapters.switching import AdapterSwitch
from smolora.data.benchmark_rows import render_question
from smolora.data.chat import Message
from smolora.data.prompts import list_prompts
from smolora.data.spans import SpanAnswer
from smolora.errors import ConfigError
from smolora.evaluation.head_source import classify_texts, find_answers, label_words, refuse_drawing
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.text_generator import Prompt, TextGenerator
from smolora.inference.conversation import Conversation
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import HEAD_TASKS


@dataclass(frozen=True)
class Classification:
    """The likeliest of a few labels, and the share of each."""

    label: str
    shares: dict[str, float]
    """Probabilities of the labels, made to sum to 1."""


class InferencePipeline:
    """Answers one prompt or many; one text in, one answer out, and a list for a list.

    Every method takes `adapter`: the name of one of several, or `base` for the model without any. Threads may share a
    pipeline: they take turns at the model, and of streams that are read in turns each has its own adapter.

    Example:
        ```python
        print(InferencePipeline.from_path("restaurants").generate(["name[Aromi]", "name[Zizzi]"]))
        ```
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        settings: SamplingSettings = DEFAULT_SAMPLING,
        batch_size: int = 16,
    ) -> None:
        """Take an opened model.

        Args:
            bundle: A model, with or without an adapter; with `adapters` without.
            adapters: Runs or adapter folders by name; the first one answers unless another is asked for.
            settings: How answers are drawn, where a call doesn't say.
            batch_size: Rows that are answered at a time.

        Raises:
            ConfigError: A name of an adapter isn't one, or the bundle carries an adapter already.
            ModelError: An adapter is damaged, or was trained on another base.
        """
        self.settings = settings
        self.batch_size = batch_size
        self._bundle = bundle
        self._switch = AdapterSwitch(bundle, adapters or None)
        self._generators: dict[str | None, TextGenerator] = {}

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        *,
        base: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        device: str = "auto",
        settings: SamplingSettings = DEFAULT_SAMPLING,
        batch_size: int = 16,
    ) -> InferencePipeline:
        """Open a run, a model or adapter folder, or a hub id.

        Args:
            path: What to open.
            base: The base of an adapter, where its folder doesn't name it.
            adapters: Adapters by name, on `path` as their base, which is held and asked as the first one had it.
            device: auto, cpu, cuda or mps.
            settings: How answers are drawn, where a call doesn't say.
            batch_size: Rows that are answered at a time.

        Raises:
            ConfigError: Both `base` and `adapters` are given.
            ModelError: There is nothing to open, or an adapter is another base's or for another task.
        """
        if adapters:
            if base is not None:
                raise ConfigError("adapters= are put on the first argument, so it is the base: leave base= out.")
            bundle = open_base(path, next(iter(adapters.values())), device=device)
        else:
            bundle = open_model(path, base, device=device)
        return cls(bundle, adapters=adapters, settings=settings, batch_size=batch_size)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of several adapters; empty where there is one or none."""
        return self._switch.names

    @overload
    def generate(  # type: ignore[overload-overlap]  # A text is a sequence of texts, too.
        self, prompts: str, *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> list[str]: ...

    def generate(
        self, prompts: str | Sequence[Prompt], *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> str | list[str]:
        """Return the answer to a text, or to each of a list of texts and conversations, without the prompt."""
        asked = list_prompts(prompts)
        with self._switch.left_alone():
            answers = self._generator_of(adapter).generate(
                asked, settings=settings or self.settings, batch_size=self.batch_size
            )
        return answers[0] if isinstance(prompts, str) else answers

    def stream(
        self, prompt: Prompt, *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> Iterator[str]:
        """Yield the answer in pieces; joined they are what `generate` returns. Closing it stops the computation."""
        with self._switch.left_alone():
            yield from self._generator_of(adapter).stream(prompt, settings=settings or self.settings)

    def chat(
        self, messages: Sequence[Message], *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> str:
        """Return the next turn of a conversation, given as messages with role and content."""
        return self.generate([messages], settings=settings, adapter=adapter)[0]

    def start_conversation(self, settings: SamplingSettings | None = None) -> Conversation:
        """Return a conversation that keeps its history and streams its answers.

        Raises:
            ConfigError: There are several adapters.
        """
        if self.adapters:
            raise ConfigError("a conversation is held with one model: open one adapter alone, or use chat().")
        return Conversation(self._bundle, settings or self.settings, switch=self._switch.switch_to)

    @overload
    def classify(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        labels: Sequence[str] = (),
        *,
        text_pairs: str | None = None,
        adapter: str | None = None,
    ) -> Classification: ...

    @overload
    def classify(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str] = (),
        *,
        text_pairs: Sequence[str] | None = None,
        adapter: str | None = None,
    ) -> list[Classification]: ...

    def classify(
        self,
        prompts: str | Sequence[Prompt],
        labels: Sequence[str] = (),
        *,
        text_pairs: str | Sequence[str] | None = None,
        adapter: str | None = None,
    ) -> Classification | list[Classification]:
        """Return the likeliest label of each text or prompt.

        A classifier answers by its head, and has labels of its own. Of a model that writes, it is the likeliest of
        `labels`, each with its end token, as evaluation does.

        Args:
            prompts: Texts; or prompts and conversations, for a model that writes.
            labels: What is chosen from; a classifier's are its own.
            text_pairs: The second texts, for a classifier that was trained on two.
            adapter: Which of several.

        Raises:
            ConfigError: There are no labels, or not the classifier's; or it was trained on another number of texts.
        """
        asked = list_prompts(prompts)
        pairs = [text_pairs] if isinstance(text_pairs, str) else text_pairs
        with self._switch.opened(adapter) as bundle:
            if bundle.task in HEAD_TASKS:
                losses, labels = (
                    -classify_texts(bundle, asked, labels, pairs, batch_size=self.batch_size),
                    bundle.labels,
                )
            else:
                losses = self._measure_labels(bundle, asked, labels, pairs)
        found = [_choose(row, labels) for row in losses]
        return found[0] if isinstance(prompts, str) else found

    @overload
    def answer(  # type: ignore[overload-overlap]
        self,
        questions: str,
        contexts: str | None = None,
        *,
        settings: SamplingSettings | None = None,
        adapter: str | None = None,
    ) -> str: ...

    @overload
    def answer(
        self,
        questions: Sequence[str],
        contexts: str | Sequence[str] | None = None,
        *,
        settings: SamplingSettings | None = None,
        adapter: str | None = None,
    ) -> list[str]: ...

    def answer(
        self,
        questions: str | Sequence[str],
        contexts: str | Sequence[str] | None = None,
        *,
        settings: SamplingSettings | None = None,
        adapter: str | None = None,
    ) -> str | list[str]:
        """Answer a question or several, each about its text or all about one.

        A model for question answering cuts the answer out of the text, or says nothing where it was tuned on questions
        without an answer too; see `find_answer`. One that writes is asked as `squad` asks, greedily.

        Raises:
            ConfigError: There are not as many texts as questions; a model for question answering has no text, or is
                given settings.
        """
        asked = [questions] if isinstance(questions, str) else questions
        if self._bundle.task == "qa":
            refuse_drawing(self._bundle, settings, by_likelihood=False)
            said = [text for text, _ in self._find_answers(asked, contexts, adapter)]
            return said[0] if isinstance(questions, str) else said
        about = _spread(contexts, asked)
        prompts = [
            question if context is None else render_question(question, context)
            for question, context in zip(asked, about, strict=True)
        ]
        answers = self._answer_greedily(prompts, settings, adapter)
        return answers[0] if isinstance(questions, str) else answers

    @overload
    def find_answer(  # type: ignore[overload-overlap]
        self, questions: str, contexts: str, *, adapter: str | None = None
    ) -> SpanAnswer: ...

    @overload
    def find_answer(
        self, questions: Sequence[str], contexts: str | Sequence[str], *, adapter: str | None = None
    ) -> list[SpanAnswer]: ...

    def find_answer(
        self, questions: str | Sequence[str], contexts: str | Sequence[str], *, adapter: str | None = None
    ) -> SpanAnswer | list[SpanAnswer]:
        """Return the best answer in a context, where it begins, its score and that of there being none.

        A context that is too long is read in windows.

        Raises:
            ConfigError: The model isn't one for question answering, or there are not as many contexts as questions.
            DataError: A question leaves no room for its context.
        """
        asked = [questions] if isinstance(questions, str) else questions
        spans = [span for _, span in self._find_answers(asked, contexts, adapter)]
        return spans[0] if isinstance(questions, str) else spans

    @overload
    def label_words(  # type: ignore[overload-overlap]
        self, words: Sequence[str], *, adapter: str | None = None
    ) -> list[Classification]: ...

    @overload
    def label_words(
        self, words: Sequence[Sequence[str]], *, adapter: str | None = None
    ) -> list[list[Classification]]: ...

    def label_words(
        self, words: Sequence[str] | Sequence[Sequence[str]], *, adapter: str | None = None
    ) -> list[Classification] | list[list[Classification]]:
        """Return the likeliest label of every word of a row, or of each of several rows, by a token classifier's head.

        Raises:
            ConfigError: The model is no token classifier, or what is given is a text in place of its words.
            DataError: A word has no token of its own within the model's context.
        """
        is_one = not isinstance(words, str) and all(isinstance(word, str) for word in words)
        rows = cast("Sequence[Sequence[str]]", [words] if is_one or isinstance(words, str) else words)
        with self._switch.opened(adapter) as bundle:
            found = label_words(bundle, rows, batch_size=self.batch_size)
            chosen = [[_choose(-line, bundle.labels) for line in row] for row in found]
        return chosen[0] if is_one else chosen

    @overload
    def summarise(  # type: ignore[overload-overlap]
        self, texts: str, *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> str: ...

    @overload
    def summarise(
        self, texts: Sequence[str], *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> list[str]: ...

    def summarise(
        self, texts: str | Sequence[str], *, settings: SamplingSettings | None = None, adapter: str | None = None
    ) -> str | list[str]:
        """Summarise a text or several, asked as the benchmark `samsum` asks: a text is the prompt; greedily."""
        answers = self._answer_greedily([texts] if isinstance(texts, str) else texts, settings, adapter)
        return answers[0] if isinstance(texts, str) else answers

    def _answer_greedily(
        self, prompts: Sequence[str], settings: SamplingSettings | None, adapter: str | None
    ) -> list[str]:
        """Return answers without white space around them; greedy ones, where the call has no settings of its own."""
        settings = settings or self.settings.replace(temperature=0.0)
        return [answer.strip() for answer in self.generate(prompts, settings=settings, adapter=adapter)]

    def _find_answers(
        self, questions: Sequence[str], contexts: str | Sequence[str] | None, adapter: str | None
    ) -> list[tuple[str, SpanAnswer]]:
        if contexts is None:
            raise ConfigError(
                "a model for question answering finds answers in contexts: give one for all, or for each."
            )
        about = cast("Sequence[str]", _spread(contexts, questions))
        with self._switch.opened(adapter) as bundle:
            return find_answers(bundle, questions, about, batch_size=self.batch_size)

    def _measure_labels(
        self, bundle: ModelBundle, prompts: Sequence[Prompt], labels: Sequence[str], pairs: Sequence[str] | None
    ) -> npt.NDArray[np.float64]:
        """Return -log p of every label as the answer to every prompt, [N, C]."""
        if not labels:
            raise ConfigError("classify needs labels to choose from: this model isn't a classifier with its own.")
        if pairs is not None:
            raise ConfigError("text_pairs are for a classifier; this model reads prompts. Write both texts into one.")
        scorer = LikelihoodScorer(bundle, batch_size=self.batch_size)
        measured = scorer.measure([(prompt, label) for prompt in prompts for label in labels])
        return np.array([one.loss_sum for one in measured]).reshape(len(prompts), len(labels))

    def _generator_of(self, adapter: str | None) -> TextGenerator:
        if adapter not in self._generators:
            switch = partial(self._switch.switch_to, adapter)
            self._generators[adapter] = TextGenerator(self._switch.find(adapter), switch=switch)
        return self._generators[adapter]


def _spread(contexts: str | Sequence[str] | None, questions: Sequence[str]) -> Sequence[str | None]:
    """Return a context for each question."""
    about = [contexts] * len(questions) if contexts is None or isinstance(contexts, str) else contexts
    if len(about) != len(questions):
        raise ConfigError(f"{len(about)} contexts for {len(questions)} questions: give one for all, or one for each.")
    return about


def _choose(losses: npt.NDArray[np.float64], labels: Sequence[str]) -> Classification:
    shares = np.exp(losses.min() - losses)
    shares /= shares.sum()
    return Classification(labels[int(losses.argmin())], dict(zip(labels, shares.tolist(), strict=True)))
