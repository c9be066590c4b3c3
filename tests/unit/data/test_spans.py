"""Questions in windows over their contexts, and answers read back by their characters."""

from __future__ import annotations

import json

import numpy as np
import pytest

from smolora.config import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.preprocessing import encode_rows, get_preprocessor
from smolora.data.prompts import PromptFormat, resolve_prompt_format
from smolora.data.readers import read_rows
from smolora.data.rows import Row
from smolora.data.spans import LONGEST_ANSWER, QuestionAnsweringPreprocessor, find_answer
from smolora.data.squad import iter_questions
from smolora.data.task_rows import find_answer_problem, learn_form, read_answers
from smolora.errors import ConfigError, DataError
from tests.tiny import tiny_encoder_tokenizer, tiny_tokenizer

FORM = PromptFormat(kind="qa", columns={role: role for role in ("context", "question", "answers")})
CONTEXT = "The Eagle is an Italian place in the riverside area. Zürich isn't there; they went away, 12 of 34! " * 3


def make_row(answer: str | None = "riverside", context: str = CONTEXT, question: str = "Where is it?") -> dict:
    found = [] if answer is None else [answer]
    return {
        "context": context,
        "question": question,
        "answers": {"text": found, "answer_start": [context.index(text) for text in found]},
    }


def qa(**settings) -> QuestionAnsweringPreprocessor:
    return QuestionAnsweringPreprocessor(FORM, tiny_encoder_tokenizer(), **settings)


def point_at(window, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.where(np.arange(len(window.example)) == place, 9.0, 0.0) for place in (first, last))


def encode(row: dict, **data) -> tuple[list, DataReport]:
    report = DataReport(train=1)
    report.files["rows"] = 1
    config = DataConfig(**data)
    preprocessor = get_preprocessor("qa", fmt=FORM, tokenizer=tiny_encoder_tokenizer(), stride=config.stride)
    rows = [Row(row, "rows", 7)]
    dataset = encode_rows(
        rows, FORM, preprocessor.tokenizer, data=config, context=64, report=report, preprocessor=preprocessor
    )
    return list(dataset), report


@pytest.mark.parametrize("answer", ["The", "riverside", "Zürich isn't there", "12 of 34"])
def test_an_answer_makes_the_round_trip_through_its_tokens(answer):
    row = make_row(answer)
    (window,) = qa().encode_windows(row, None)
    first, last = window.example.labels
    found = find_answer(CONTEXT, [window], [point_at(window, first, last)])
    assert found.text == answer and CONTEXT[found.start :].startswith(answer)


@pytest.mark.parametrize("stride", [0, 5, 20])
def test_windows_are_those_of_the_tokenizer(stride):
    row = make_row()
    windows = qa(stride=stride).encode_windows(row, 48)
    theirs = tiny_encoder_tokenizer()(
        row["question"],
        CONTEXT,
        truncation="only_second",
        max_length=48,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [window.example.input_ids.tolist() for window in windows] == theirs["input_ids"]
    assert [window.example.token_type_ids.tolist() for window in windows] == theirs["token_type_ids"]
    for number, window in enumerate(windows):
        in_context = np.array([part == 1 for part in theirs.sequence_ids(number)])
        assert np.array_equal(window.offsets[in_context], np.array(theirs["offset_mapping"][number])[in_context])
        assert not window.offsets[~in_context].any()


def test_an_answer_may_begin_and_end_in_the_context_or_at_position_0_alone():
    (example,) = qa().encode([make_row()])
    segments = example.token_type_ids.astype(bool)
    assert example.is_target[0] and not example.is_target[1:][~segments[1:]].any()
    assert example.is_target[segments].tolist() == [True] * (segments.sum() - 1) + [False]  # The last one is [SEP].


def test_a_window_without_the_answer_points_to_position_0():
    row = make_row("riverside", "The Eagle is a place by the riverside. " + "They went away, 12 of 34! " * 8)
    windows = qa().encode_windows(row, 48)
    texts = [
        row["context"][window.offsets[first, 0] : window.offsets[last, 1]]
        for window in windows
        for first, last in [window.example.labels]
    ]
    assert len(windows) > 2 and texts[0].strip() == "riverside"
    assert windows[-1].example.labels.tolist() == [0, 0]


@pytest.mark.parametrize("limit", range(24, 60, 3))
def test_a_window_has_the_answer_exactly_where_it_holds_all_of_it(limit):
    row = make_row("they went away")
    start = row["answers"]["answer_start"][0]
    for window in qa(stride=3).encode_windows(row, limit):
        real = window.offsets[window.offsets[:, 1] > 0]
        holds_it = real[0, 0] <= start and real[-1, 1] >= start + len("they went away")
        assert (window.example.labels.tolist() != [0, 0]) == holds_it


def test_an_unanswerable_question_points_to_position_0():
    assert qa().encode([make_row(None)])[0].labels.tolist() == [0, 0]


def test_windows_are_counted_and_share_a_quarter_of_their_context():
    examples, report = encode(make_row())
    counts = report.encoding("train")
    assert counts.rows == 1 and counts.examples == len(examples) == 1 + counts.added_by_windows > 2
    first, second = (example.input_ids[np.flatnonzero(example.is_target)[1:]] for example in examples[:2])
    shared = len(first) // 4
    assert first[-shared:].tolist() == second[:shared].tolist()
    assert max(map(len, examples)) == 64


def test_the_stride_stays_with_another_form():
    assert qa(stride=7).with_format(FORM, tiny_encoder_tokenizer()).stride == 7


def test_a_question_that_leaves_no_room_is_refused_or_dropped():
    long = make_row(question="Where is it? " * 20)
    with pytest.raises(DataError, match="rows:7: the question takes .* of 64 tokens"):
        encode(long)
    with pytest.raises(DataError, match="are longer than 64 tokens"):  # Nothing else is there.
        encode(long, overlong="drop")


def test_a_stride_without_a_way_on_is_refused_with_what_is_allowed():
    with pytest.raises(DataError, match=r"data.stride=60, but .* Allowed: up to \d+"):
        encode(make_row(), stride=60)


def test_a_question_without_anything_before_its_context_is_refused():
    with pytest.raises(DataError, match="nothing stands before the context"):
        QuestionAnsweringPreprocessor(FORM, tiny_tokenizer()).encode([make_row(question="")])


def read_naively(context, windows, logits, longest):
    found, best = "", float("-inf")
    for window, (starts, ends) in zip(windows, logits, strict=True):
        for first in range(len(window.offsets)):
            for last in range(first, min(first + longest, len(window.offsets))):
                is_context = all(context[slice(*window.offsets[place])].strip() for place in (first, last))
                if is_context and float(starts[first]) + float(ends[last]) > best:
                    best = float(starts[first]) + float(ends[last])
                    found = context[window.offsets[first, 0] : window.offsets[last, 1]].strip()
    return found, best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("longest", [1, 4, LONGEST_ANSWER])
def test_reading_back_finds_what_trying_all_spans_finds(seed, longest):
    windows, rng = qa(stride=4).encode_windows(make_row(), 40), np.random.default_rng(seed)
    logits = [tuple(rng.integers(-4, 5, (2, 64)).astype(np.float32)) for _ in windows]  # Whole numbers: many ties.
    found = find_answer(CONTEXT, windows, logits, longest=longest)
    assert (found.text, found.score) == read_naively(CONTEXT, windows, logits, longest)
    assert CONTEXT[found.start :].startswith(found.text)
    assert found.null_score == min(starts[0] + ends[0] for starts, ends in logits)


def test_tokens_of_white_space_count_among_those_of_an_answer():
    context = "a \n \n \n \n b"
    (window,) = qa().encode_windows(make_row(None, context), None)
    last = int(np.flatnonzero(window.offsets[:, 1])[-1])
    first = int(np.flatnonzero(window.offsets[:, 1])[0])
    logits = [point_at(window, first, last)]
    assert find_answer(context, [window], logits, longest=last - first + 1).text == context
    assert find_answer(context, [window], logits, longest=last - first).text != context


def test_logits_of_the_question_and_of_padding_are_never_an_answer():
    (window,) = qa().encode_windows(make_row(), None)
    places = np.flatnonzero(window.offsets[:, 1])
    starts = np.full(len(window.example) + 9, 50.0, np.float32)
    starts[places] = 0.0
    starts[places[3]] = 1.0
    assert find_answer(CONTEXT, [window], [(starts, starts)]).score == 2.0


def test_the_form_keeps_whether_a_training_question_has_no_answer():
    answered, unanswered = (Row(make_row(answer), "rows", 1) for answer in ("riverside", None))
    assert not learn_form([answered], [unanswered], FORM).may_lack_answer
    assert learn_form([answered, unanswered], [], FORM).may_lack_answer


def test_the_nested_file_of_squad_is_a_row_a_question(tmp_path):
    answer = {"text": "b", "answer_start": 2}
    paragraph = {"context": "a b", "qas": [{"id": "1", "question": "?", "answers": [answer]}]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph, paragraph]}]}))
    rows = read_rows(file, "json")
    assert [row.line for row in rows] == [1, 2]
    assert rows[0].values == {"id": "1", "context": "a b", "question": "?", "answers": [answer]}
    assert find_answer_problem("a b", rows[0].values["answers"]) is None


def test_a_question_that_lacks_something_is_named():
    paragraph = {"context": "a b", "qas": [{"question": "?"}]}
    with pytest.raises(DataError, match="not in SQuAD's format: KeyError 'answers'"):
        list(iter_questions({"data": [{"paragraphs": [paragraph]}]}))


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"text": ["b"], "answer_start": [1]}, "isn't at character 1 of the context, where ' ' is"),
        ({"text": ["b"], "answer_start": [-1]}, "isn't at character -1"),
        ([{"text": "c", "answer_start": 2}], "'c' isn't at character 2 of the context, where 'b' is"),
        ({"text": ["b"], "answer_start": []}, "as in SQuAD"),
        ("b", "as in SQuAD"),
        ({"text": [" "], "answer_start": [1]}, "isn't at character 1"),
    ],
)
def test_answers_that_cannot_be_learned_have_a_reason(answers, problem):
    assert problem in find_answer_problem("a b", answers)


def test_answers_are_read_as_lists_and_as_pairs():
    assert read_answers([{"text": "b", "answer_start": 2}]) == read_answers({"text": ["b"], "answer_start": [2]})


def test_a_context_is_not_cleaned_under_its_answers():
    with pytest.raises(ConfigError, match="data.clean"):
        resolve_prompt_format(list(FORM.columns), DataConfig(clean=("lowercase",)), task="qa")
