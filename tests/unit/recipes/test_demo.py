"""The demo's walk, at a hundredth of its effort: every part runs and leaves what it says."""

from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from smolora.errors import ConfigError, DataError, StoppedBySignal
from smolora.recipes.demo import run_demo

EFFORT = 0.004


def test_the_walk_ends_with_answers_before_and_after(tmp_path, capsys):
    run_demo(tmp_path / "out", effort=EFFORT)
    shown = capsys.readouterr()
    for words in ("1. write", "2. pretrain", "3. tune", "4. merge", "5. ask", "before:", "after:", "of 10", "in all"):
        assert words in shown.err
    assert shown.out == ""
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "tuned" / "final_merged").config.n_layer == 2


def test_a_persons_own_text_takes_the_same_walk(tmp_path, capsys):
    passages = [
        f"Passage {number} is about the {'sea wind rain sun'.split()[number % 4]}. " * 4 for number in range(200)
    ]
    (tmp_path / "mine.txt").write_text("\n\n".join(passages))
    run_demo(tmp_path / "out", tmp_path / "mine.txt", effort=EFFORT)
    shown = capsys.readouterr().err
    assert "mine.txt is cut into passages" in shown
    assert "answers right" not in shown  # A text has no single right continuation.
    assert "Passage" in shown.split("before:")[0]


class Impatient(io.StringIO):
    """Presses Ctrl-C at the first step that is shown."""

    def write(self, text):
        if text.startswith("step") and "step" not in self.getvalue():
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_a_demo_that_is_stopped_says_how_to_start_anew(tmp_path):
    with pytest.raises(
        StoppedBySignal, match=r"doesn't go on from there. Remove .*/out, or choose another folder"
    ) as told:
        run_demo(tmp_path / "out", console=Console(file=Impatient()), effort=EFFORT)
    assert "--resume" not in str(told.value)


def test_a_filled_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(ConfigError, match="holds mine already"):
        run_demo(tmp_path, effort=EFFORT)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_text_too_short_to_learn_from_leaves_no_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("a few words")
    with pytest.raises(DataError, match="passages"):
        run_demo(tmp_path / "out", tmp_path / "mine.txt", effort=EFFORT)
    assert not (tmp_path / "out").exists()
