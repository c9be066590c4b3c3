"""Held-out rows that were trained on."""

from __future__ import annotations

from smolora.data.overlap import Overlap, measure_overlap, measure_shared_text
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row


def rows(*values):
    return [Row(value, "rows.jsonl", line) for line, value in enumerate(values, start=1)]


def test_rows_and_prompts_are_counted_but_for_case_and_white_space():
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "q", "completion": "a"})
    train = rows({"q": "One  two", "a": "x"}, {"q": "three", "a": "y"})
    held_out = rows({"q": "one two", "a": "X "}, {"q": "three", "a": "z"}, {"q": "four", "a": "x"})
    assert measure_overlap(train, held_out, fmt) == Overlap(num_held_out=3, rows=1, prompts=2)


def test_plain_text_has_rows_alone():
    fmt = PromptFormat(kind="text", columns={"text": "text"})
    assert measure_overlap(rows({"text": "a b"}), rows({"text": "A B"}, {"text": "c"}), fmt) == Overlap(2, 1, None)


def test_rows_that_are_rendered_alike_are_the_same():
    fmt = PromptFormat(kind="instruction", columns={role: role for role in ("instruction", "input", "output")})
    train, held_out = (
        rows({"instruction": "a", "input": None, "output": "b"}),
        rows({"instruction": "a", "output": "b"}),
    )
    assert measure_overlap(train, held_out, fmt) == Overlap(1, 1, 1)


def test_text_is_shared_by_its_lines_and_short_ones_tell_nothing():
    train = ["ROMEO:\n" + "this line is in both" + "\n" + "this one stands only here"]
    assert measure_shared_text(train, ["ROMEO:\r\nthis line is in both\r\nthis line is in one.", "ROMEO:"]) == 0.5
    assert measure_shared_text(train, ["ROMEO:\n"]) == measure_shared_text(train, []) == 0
