"""generate and chat: the answer alone on stdout."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import save_adapter
from smolora.config.adapter import LoRAConfig
from smolora.data.chat import PLAIN_CHAT_TEMPLATE
from smolora.data.prompts import PromptFormat
from smolora.generation.sampling import SamplingSettings
from smolora.inference.pipeline import InferencePipeline
from smolora.models.loading import load_model
from smolora.models.saving import save_model
from smolora.recipes.generate import generate
from smolora.records.run_dir import RunDir
from tests.tiny import CONTEXT, save_tiny_model

FEW = ("--max-new-tokens", 8)


@pytest.fixture
def moved(tmp_path):
    """A run whose base was moved away, and the base."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.resolved_config.write_text("")
    bundle = attach_adapter(load_model(save_tiny_model("gpt2", tmp_path / "base")), LoRAConfig(), seed=0)
    save_adapter(bundle, run.adapter)
    return run.path, (tmp_path / "base").rename(tmp_path / "moved")


@pytest.mark.parametrize("verb", ["generate", "chat", "merge", "evaluate"])
def test_a_base_that_was_moved_is_named_with_base(smolora, moved, rows, verb, monkeypatch):
    run, place = moved
    fields = ("--prompt-field", "mr", "--completion-field", "ref", "--num-samples", 1)
    more = {"generate": ("the cat", *FEW), "chat": FEW, "merge": (), "evaluate": ("--data", rows, *fields, *FEW)}[verb]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    code, _, err = smolora(verb, run, *more)
    assert (code, "take --base PATH" in err) == (4, True)
    assert smolora(verb, run, *more, "--base", "./none")[0] == 4
    code, _, err = smolora(verb, run, *more, "--base", save_tiny_model("gpt2", run / "other", seed=1))
    assert (code, "was trained on another base" in err) == (4, True)
    assert smolora(verb, run, *more, "--base", place)[0] == 0


def test_the_answer_is_all_of_stdout(smolora, base):
    answer = generate(str(base), "the cat", SamplingSettings(temperature=0.0, max_new_tokens=8))
    assert smolora("generate", base, "the cat", "--greedy", *FEW) == (0, f"{answer}\n", "")
    assert smolora("infer", base, "the cat", "--temperature", 0, *FEW)[1] == f"{answer}\n"


def test_a_model_of_conversations_is_told_something_before(smolora, tmp_path, monkeypatch):
    talker = replace(
        load_model(save_tiny_model("llama", tmp_path / "base")),
        prompt_format=PromptFormat(
            kind="messages", columns={"messages": "messages"}, chat_template=PLAIN_CHAT_TEMPLATE
        ),
    )
    save_model(talker, tmp_path / "talker")
    asked = [{"role": "system", "content": "be glad"}, {"role": "user", "content": "the cat"}]
    settings = SamplingSettings(temperature=0.0, max_new_tokens=8)
    answer = InferencePipeline(talker).chat(asked, settings=settings)
    more = ("--system", "be glad", "--greedy", *FEW)
    assert smolora("generate", tmp_path / "talker", "the cat", *more)[:2] == (0, f"{answer}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert smolora("chat", tmp_path / "talker", *more)[:2] == (0, f"{answer}\n")
    code, _, err = smolora("generate", tmp_path / "base", "the cat", *more)
    assert (code, "--system is a turn of a conversation" in err) == (2, True)


def test_a_seed_repeats_the_answer(smolora, base):
    first, again, other = (smolora("generate", base, "the cat", *FEW, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_text_and_a_penalty_are_taken(smolora, base):
    whole = smolora("generate", base, "the cat", "--greedy", *FEW)[1]
    stopped = smolora("generate", base, "the cat", "--greedy", *FEW, "--stop", "never", "--stop", whole[3:5])[1]
    assert stopped == whole[: whole.index(whole[3:5])] + "\n"
    settings = SamplingSettings(temperature=0.0, max_new_tokens=8, repetition_penalty=9.0)
    penalised = smolora("generate", base, "the cat", "--greedy", *FEW, "--repetition-penalty", 9)[1]
    assert penalised == generate(str(base), "the cat", settings) + "\n" != whole


def test_beams_are_searched_and_go_with_no_other_choice(smolora, base):
    answer = generate(str(base), "the cat", SamplingSettings(num_beams=3, max_new_tokens=8))
    assert smolora("generate", base, "the cat", "--num-beams", 3, *FEW) == (0, f"{answer}\n", "")
    for choice in (("--greedy",), ("--seed", 1), ("--temperature", 0.7)):
        code, out, err = smolora("generate", base, "the cat", "--num-beams", 3, *choice)
        assert (code, out) == (2, "")
        assert choice[0].strip("-") in err


def test_a_prompt_may_begin_with_a_dash(smolora, base):
    assert smolora("generate", base, "- the cat", *FEW)[0] == 0


def test_a_prompt_that_names_a_file_is_asked_as_it_is_with_a_warning(smolora, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ask").write_text("the cat", encoding="utf-8")
    code, out, err = smolora("generate", base, "ask", "--greedy", *FEW)
    assert (code, out) == (0, generate(str(base), "ask", SamplingSettings(temperature=0.0, max_new_tokens=8)) + "\n")
    assert "the prompt is the name of a file, not what it holds" in err
    assert "the name of a file" not in smolora("generate", base, "the cat " * 400)[2]


def test_a_dash_reads_the_prompt_from_standard_input(smolora, base, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(b"the cat\nsat\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    answer = smolora("generate", base, "-", "--greedy", *FEW)
    assert answer == smolora("generate", base, "the cat\nsat", "--greedy", *FEW)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, _, err = smolora("generate", base, "-")
    assert (code, "standard input isn't UTF-8 text" in err) == (3, True)


def test_an_empty_prompt_starts_from_nothing(smolora, base):
    assert smolora("generate", base, "", *FEW)[0] == 0


def test_a_prompt_past_the_context_is_3(smolora, base):
    code, out, err = smolora("generate", base, "\n" * CONTEXT)
    assert (code, out) == (3, "")
    assert f"the model's context is {CONTEXT} tokens" in err


def test_a_device_that_isnt_known_is_2(smolora, base):
    code, _, err = smolora("generate", base, "the cat", "--device", "tpu")
    assert code == 2
    assert "'tpu' isn't on this machine" in err


def test_a_classifier_is_asked_with_generate_in_place_of_chat(smolora, tmp_path):
    bundle = load_model(save_tiny_model("gpt2", tmp_path / "base"), task="classification", labels=("no", "yes"))
    save_model(bundle, tmp_path / "classifier")
    code, _, err = smolora("chat", tmp_path / "classifier")
    assert (code, f'smolora generate {tmp_path / "classifier"} "text" says the label' in err) == (2, True)
    assert smolora("generate", tmp_path / "classifier", "the cat")[1] in ("no\n", "yes\n")


def test_chat_answers_a_line_at_a_time_through_pipes(smolora, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n/quit\n"))
    code, out, err = smolora("chat", base, "--greedy", *FEW)
    assert code == 0
    assert out == smolora("generate", base, "the cat", "--greedy", *FEW)[1]
    assert "/help lists the commands" in err


def test_a_piped_question_past_the_context_is_3_with_one_message(smolora, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\N{SNOWMAN}" * CONTEXT + "\n"))
    code, out, err = smolora("chat", base, *FEW)
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].startswith("smolora: error: a prompt of ")
