"""What was said so far, and how it is put to a model: by the form the model was trained in."""

from __future__ import annotations

from collections.abc import Generator

from smolora.errors import ConfigError
from smolora.generation.decoding import Switch, keep_as_it_is
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.generation.text_generator import Prompt, TextGenerator
from smolora.models.bundle import ModelBundle


class Conversation:
    """A history that grows by a question and its answer, and forgets its oldest turns when the context is full.

    A model of messages sees the turns through its chat template. One of plain text goes on from everything said. One
    trained on single questions sees the last one alone.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        settings: SamplingSettings = DEFAULT_SAMPLING,
        *,
        system: str | None = None,
        switch: Switch = keep_as_it_is,
    ) -> None:
        """Begin with nothing said but what `system` tells the model; `switch` is `TextGenerator`'s.

        Raises:
            ConfigError: The model has no form for a system turn.
        """
        self.settings = settings
        self._begun = begin_conversation(bundle, system)
        self.turns = list(self._begun)
        self.num_forgotten = 0
        self._generator = TextGenerator(bundle, switch=switch)
        self._context = bundle.context
        self._form = _choose_form(bundle)

    def describe(self) -> str:
        """Return what the model sees of the history, as a sentence."""
        return {
            "turns": "The model sees the conversation through its chat template.",
            "continued": "The model continues text: it goes on from everything written so far.",
            "single": "The model was trained on single prompts: it sees each line alone.",
        }[self._form]

    def ask(self, text: str) -> Generator[str]:
        """Yield the answer in pieces. Closed early, what was yielded is the answer; an empty one is forgotten.

        `num_forgotten` counts the turns that this question pushed out.

        Raises:
            DataError: The text alone is past the context; the history stays as it was.
        """
        before, answer = list(self.turns), ""
        self.turns.append({"role": "user", "content": text})
        try:
            settings = self._make_room()
            for piece in self._generator.stream(self._prompt(), settings=settings):
                answer += piece
                yield piece
        finally:
            if answer.strip():
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns = before

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.turns = list(self._begun)

    def _prompt(self) -> Prompt:
        if self._form == "turns":
            return self.turns
        if self._form == "single":
            return self.turns[-1]["content"]
        lines = [("\n" if turn["role"] == "user" else "") + turn["content"] for turn in self.turns]
        return "".join(lines).removeprefix("\n")

    def _make_room(self) -> SamplingSettings:
        """Drop the oldest turns until half the context, or the longest answer, is free; return settings that fit."""
        self.num_forgotten = 0
        if self._context is None:
            return self.settings
        wanted, first = min(self.settings.max_new_tokens, self._context // 2), len(self._begun)
        while (free := self._context - self._generator.count_tokens(self._prompt())) < wanted and self.turns[
            first + 1 :
        ]:
            del self.turns[first : first + 2]
            self.num_forgotten += 2
        settings: SamplingSettings = self.settings.replace(
            max_new_tokens=max(1, min(self.settings.max_new_tokens, free))
        )
        return settings


def begin_conversation(bundle: ModelBundle, system: str | None) -> list[dict[str, str]]:
    """Return the turns before the first question: a system turn, where there is one to take.

    Raises:
        ConfigError: The model has no form for it.
    """
    if system is None:
        return []
    if _choose_form(bundle) != "turns":
        raise ConfigError("--system is a turn of a conversation, and this model wasn't trained on any: leave it out.")
    return [{"role": "system", "content": system}]


def _choose_form(bundle: ModelBundle) -> str:
    kind = bundle.prompt_format.kind if bundle.prompt_format else None
    if kind == "messages" or (kind is None and bundle.tokenizer.chat_template):
        return "turns"
    return "continued" if kind in {None, "text"} else "single"
