"""Chat in a terminal or through pipes: questions come in by lines, answers go out as they are computed.

Answers are all that `answers` gets; greetings, notes and mistakes go to `notes`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TextIO

from smolora.errors import DataError, did_you_mean
from smolora.generation.sampling import DEFAULT_SAMPLING, SamplingSettings
from smolora.inference.conversation import Conversation
from smolora.models.bundle import ModelBundle
from smolora.runtime.console import decoded_input

_COMMANDS = {
    "/help": "show this list",
    "/reset": "forget the conversation",
    "/quit": "leave (so does Ctrl-D)",
}


def run_chat(
    bundle: ModelBundle,
    settings: SamplingSettings = DEFAULT_SAMPLING,
    *,
    system: str | None = None,
    questions: TextIO | None = None,
    answers: TextIO | None = None,
    notes: TextIO | None = None,
) -> None:
    """Chat until the questions end, with a `system` turn at the start. The streams default to stdin, stdout and stderr.

    Ctrl-C stops the answer that is being computed, and keeps what was said of it.

    Raises:
        ConfigError: There is a system turn, and the model has no form for it.
        DataError: A question of a pipe is past the context. A person at a terminal is told, and asks another.
    """
    questions = questions or sys.stdin
    chat = _Chat(Conversation(bundle, settings, system=system), answers or sys.stdout, notes or sys.stderr)
    chat.note(f"{chat.conversation.describe()} /help lists the commands.")
    for line in _iter_lines(questions):
        if line == "/quit":
            return
        if line.startswith("/"):
            chat.obey(line)
        elif line:
            try:
                chat.answer(line)
            except DataError as error:
                if not questions.isatty():
                    raise
                chat.note(str(error))


class _Chat:
    def __init__(self, conversation: Conversation, answers: TextIO, notes: TextIO) -> None:
        self.conversation = conversation
        self._answers = answers
        self._notes = notes

    def note(self, text: str) -> None:
        self._notes.write(f"{text}\n")
        self._notes.flush()

    def obey(self, command: str) -> None:
        if command == "/reset":
            self.conversation.reset()
            self.note("The conversation is forgotten.")
        elif command == "/help":
            self.note(
                "\n".join(f"{name:8}{meaning}" for name, meaning in _COMMANDS.items()) + "\nCtrl-C stops an answer."
            )
        else:
            self.note(f"no command {command}.{did_you_mean(command, _COMMANDS)} Commands: {', '.join(_COMMANDS)}.")

    def answer(self, question: str) -> None:
        try:
            with closing(self.conversation.ask(question)) as pieces:
                self._write(pieces)
        except KeyboardInterrupt:
            self._answers.write("\n")
            self.note("(stopped)")

    def _write(self, pieces: Iterator[str]) -> None:
        for number, piece in enumerate(pieces):
            if number == 0 and self.conversation.num_forgotten:
                self.note(f"(the context is full: the oldest {self.conversation.num_forgotten} turns are forgotten)")
            self._answers.write(piece)
            self._answers.flush()
        self._answers.write("\n")
        self._answers.flush()


def _iter_lines(questions: TextIO) -> Iterator[str]:
    """Yield stripped lines; on a terminal with a prompt, line editing and history."""
    is_terminal = questions is sys.stdin and questions.isatty() and sys.stdout.isatty()
    if is_terminal and sys.platform != "win32":
        import readline  # noqa: F401 - importing it gives `input` its line editing
    while True:
        try:
            with decoded_input():
                line = input("> ") if is_terminal else next(questions)
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl-D or /quit leaves)\n")
            continue
        yield line.strip()
