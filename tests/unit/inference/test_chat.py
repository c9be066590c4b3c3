"""A chat over streams: answers on one, everything else on another."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from smolora.data.prompts import PromptFormat
from smolora.errors import ConfigError, DataError
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.inference.chat import run_chat
from smolora.inference.conversation import Conversation
from tests.tiny import CONTEXT, tiny_bundle

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=6)
MESSAGES = PromptFormat(kind="messages", columns={"messages": "messages"})
PAIRS = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("chat") / "base")


def _chat(bundle, *lines, settings=GREEDY):
    answers, notes = io.StringIO(), io.StringIO()
    run_chat(bundle, settings, questions=io.StringIO("\n".join(lines) + "\n"), answers=answers, notes=notes)
    return answers.getvalue(), notes.getvalue()


def test_only_answers_go_to_the_answers_and_greetings_to_the_notes(bundle):
    answers, notes = _chat(bundle, "the cat")
    assert answers == TextGenerator(bundle).generate("the cat", settings=GREEDY)[0] + "\n"
    assert "/help" in notes


def test_the_chat_ends_with_its_questions_and_at_quit(bundle):
    assert _chat(bundle, "the cat", "/quit", "the dog") == _chat(bundle, "the cat")


def test_blank_lines_are_no_questions(bundle):
    assert _chat(bundle, "", "  ")[0] == ""


def test_help_lists_every_command(bundle):
    _, notes = _chat(bundle, "/help")
    assert all(name in notes for name in ("/help", "/reset", "/quit", "Ctrl-C"))


def test_a_misspelt_command_is_no_question_and_names_the_nearest(bundle):
    answers, notes = _chat(bundle, "/rest")
    assert answers == ""
    assert "no command /rest. Did you mean '/reset'?" in notes


def test_reset_makes_the_next_answer_a_first_one(bundle):
    answers, _ = _chat(bundle, "the cat", "/reset", "the cat")
    first, second = answers.removesuffix("\n")[: len(answers) // 2 - 1], answers[len(answers) // 2 :].rstrip("\n")
    assert first == second


class _Keyboard(io.StringIO):
    """Questions that a person types."""

    def isatty(self):
        return True


def test_a_question_past_the_context_is_noted_at_a_terminal_and_the_chat_goes_on(bundle):
    questions, answers, notes = _Keyboard("x\N{SNOWMAN}" * CONTEXT + "\nthe cat\n"), io.StringIO(), io.StringIO()
    run_chat(bundle, GREEDY, questions=questions, answers=answers, notes=notes)
    assert f"the model's context is {CONTEXT} tokens" in notes.getvalue()
    assert answers.getvalue() == _chat(bundle, "the cat")[0]


def test_a_question_past_the_context_ends_a_chat_through_pipes(bundle):
    with pytest.raises(DataError, match=f"the model's context is {CONTEXT} tokens"):
        _chat(bundle, "x\N{SNOWMAN}" * CONTEXT, "the cat")


def test_a_question_that_is_no_text_ends_a_chat_through_pipes(bundle):
    questions = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    with pytest.raises(DataError, match="standard input isn't UTF-8 text"):
        run_chat(bundle, GREEDY, questions=questions, answers=io.StringIO(), notes=io.StringIO())


def test_a_full_context_forgets_the_oldest_turns_with_a_note(bundle):
    _, notes = _chat(bundle, *["the cat sat on the mat"] * 12)
    assert "the context is full: the oldest 2 turns are forgotten" in notes


def test_a_model_of_messages_is_asked_the_whole_conversation(bundle):
    conversation = Conversation(replace(bundle, prompt_format=MESSAGES), GREEDY)
    first = "".join(conversation.ask("the cat"))
    second = "".join(conversation.ask("the dog"))
    history = [_turn("user", "the cat"), _turn("assistant", first), _turn("user", "the dog")]
    generator = TextGenerator(replace(bundle, prompt_format=MESSAGES))
    assert second == "".join(generator.stream(history, settings=GREEDY))


def _turn(role, content):
    return {"role": role, "content": content}


def test_the_system_turn_stays_whatever_is_forgotten(bundle):
    conversation = Conversation(replace(bundle, prompt_format=MESSAGES), GREEDY, system="be glad")
    forgotten = 0
    while not forgotten:
        list(conversation.ask("the cat sat on the mat"))
        forgotten = conversation.num_forgotten
    assert [turn["role"] for turn in conversation.turns[:2]] == ["system", "user"]
    conversation.reset()
    assert conversation.turns == [_turn("system", "be glad")]


def test_a_model_without_conversations_has_no_system_turn(bundle):
    with pytest.raises(ConfigError, match="this model wasn't trained on any: leave it out"):
        run_chat(bundle, system="be glad", questions=io.StringIO(), answers=io.StringIO(), notes=io.StringIO())


def test_a_model_of_pairs_is_asked_each_line_alone(bundle):
    tuned = replace(bundle, prompt_format=PAIRS)
    conversation = Conversation(tuned, GREEDY)
    list(conversation.ask("the cat"))
    assert "".join(conversation.ask("the dog")) == TextGenerator(tuned).generate("the dog", settings=GREEDY)[0]


def test_a_model_of_plain_text_goes_on_from_everything_written(bundle):
    conversation = Conversation(bundle, GREEDY)
    first = "".join(conversation.ask("the cat"))
    second = "".join(conversation.ask("the dog"))
    assert second == TextGenerator(bundle).generate(f"the cat{first}\nthe dog", settings=GREEDY)[0]


def test_an_answer_that_is_interrupted_keeps_what_was_said(bundle):
    conversation = Conversation(bundle, GREEDY)
    pieces = conversation.ask("the cat")
    said = next(pieces)
    pieces.close()
    assert conversation.turns == [_turn("user", "the cat"), _turn("assistant", said)]


class _InterruptingPipe(io.StringIO):
    """A reader who presses Ctrl-C at the first piece of an answer."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            super().write("!")
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_chat(bundle):
    answers, notes = _InterruptingPipe(), io.StringIO()
    questions = io.StringIO("the cat\n/reset\nthe dog\n")
    run_chat(bundle, GREEDY, questions=questions, answers=answers, notes=notes)
    assert "(stopped)" in notes.getvalue()
    assert answers.getvalue() == "!\n" + _chat(bundle, "the dog")[0]


def test_an_empty_answer_leaves_no_turn_behind(tmp_path):
    bundle = tiny_bundle("llama", tmp_path / "base")
    bundle.model.generation_config.eos_token_id = list(range(288))
    conversation = Conversation(bundle, GREEDY)
    assert list(conversation.ask("the cat")) == []
    assert conversation.turns == []
