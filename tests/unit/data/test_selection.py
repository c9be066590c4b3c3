import pytest

from smolora.config.data import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.prompts import PromptFormat, resolve_prompt_format
from smolora.data.rows import Reject, Row
from smolora.data.selection import RowSelection, split_validation
from smolora.errors import ConfigError

TEXT = PromptFormat(kind="text", columns={"text": "text"})
PAIR = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})


def select(values, fmt=TEXT, **settings):
    report = DataReport()
    rows = [Row(value, "a", line) if isinstance(value, dict) else value for line, value in enumerate(values, start=1)]
    chosen = list(RowSelection(fmt, DataConfig(**settings), report).select(rows, set()))
    report.train = len(chosen)
    report.check()
    return [row.values for row in chosen], report


def texts(*values):
    return [{"text": value} for value in values]


def test_duplicates_are_dropped_in_order():
    rows, report = select(texts("b", "a", "b", "c", "a"))
    assert rows == texts("b", "a", "c")
    assert report.duplicate == 2


def test_duplicates_stay_where_asked():
    rows, _report = select(texts("a", "a"), deduplicate=False)
    assert len(rows) == 2


@pytest.mark.parametrize(
    "rows",
    [
        [{"i": "a", "o": "b"}, {"i": "a", "x": None, "o": "b"}, {"i": "a", "x": " ", "o": "b"}],
        [{"m": [{"role": "user", "content": "a", "timestamp": number, "id": number}]} for number in (1, 2)],
        [
            {"m": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "a", **more}]}
            for more in ({}, {"weight": None}, {"tool_calls": []})
        ],
        [{"m": [{"role": "user", "content": "a"}], "t": tools} for tools in ([], None)],
    ],
)
def test_rows_that_teach_the_same_are_duplicates(rows):
    columns = {"instruction": "i", "input": "x", "output": "o"} if "i" in rows[0] else {"messages": "m", "tools": "t"}
    fmt = PromptFormat(kind="instruction" if "i" in rows[0] else "messages", columns=columns)
    assert select(rows, fmt)[0] == rows[:1]


@pytest.mark.parametrize(
    ("more", "template"),
    [
        *(({"name": "Ann"}, None), ({"weight": 0}, None), ({"content": "A"}, None)),
        *(({"mood": "glad"}, "{{ m.mood }}"), ({"mood": "glad"}, None), ({"documents": [b"A"]}, None)),
    ],
)
def test_turns_that_teach_something_else_are_no_duplicates(more, template):
    fmt = PromptFormat(kind="messages", columns={"messages": "m"}, chat_template=template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    assert len(select([{"m": turns}, {"m": [turns[0], {**turns[1], **more}]}], fmt)[0]) == 2


def test_rows_that_differ_in_one_column_of_the_form_are_no_duplicates():
    rows, _report = select([{"p": "a", "c": "b"}, {"p": "a", "c": "d"}], PAIR)
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("given", "kept", "count", "said"),
    [
        ("abac", "c", 2, "2 of 3 rows to learn from (66.7 %) are left out: the held-out rows hold the same."),
        ("cbd", "cd", 1, "1 of 3 rows to learn from (33.3 %) is left out: the held-out rows hold the same."),
        ("ab", "ab", 0, "all that is learned from is held out too: a low held-out loss proves nothing."),
        ("cd", "cd", 0, None),
        ("", "", 0, None),
    ],
)
def test_rows_that_are_held_out_too_are_left_out_unless_there_is_no_other(caplog, given, kept, count, said):
    report, held_out = DataReport(), set()
    selection = RowSelection(TEXT, DataConfig(), report)
    rows = [[Row({"text": text}, "a", line) for line, text in enumerate(part, start=1)] for part in ("ab", given)]
    report.held_out = len(list(selection.select(rows[0], held_out)))
    learned = list(selection.leave_out(selection.select(rows[1], set()), held_out))
    assert "".join(str(row.values["text"]) for row in learned) == kept
    report.train = len(learned)
    report.check()
    assert report.also_held_out == count
    assert caplog.messages == ([said] if said else [])


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"text": " \r\n"}, {"text": None}])
def test_a_row_without_text_is_counted_as_empty(row):
    rows, report = select([row, {"text": "a"}])
    assert (len(rows), report.empty) == (1, 1)


@pytest.mark.parametrize("row", [{"p": "", "c": "b"}, {"p": "a", "c": ""}])
def test_a_pair_that_lacks_one_side_is_empty(row):
    assert select([row, {"p": "a", "c": "b"}], PAIR)[1].empty == 1


def test_an_instruction_without_input_is_no_empty_row():
    fmt = PromptFormat(kind="instruction", columns={"instruction": "i", "input": "x", "output": "o"})
    rows, _report = select([{"i": "a", "x": None, "o": "b"}, {"i": "a", "o": "c"}], fmt)
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "column 'text' must hold text, found int 3"),
        ({"other": "a"}, "no column 'text'; found 'other'"),
        (Reject("a", 2, "malformed"), "malformed"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected_with_its_line(row, reason):
    _rows, report = select([{"text": "a"}, row])
    assert report.rejects == [Reject("a", 2, reason)]


def test_conversations_of_sharegpt_are_messages_and_others_who_speak_are_rejected():
    fmt = resolve_prompt_format(["id", "conversations"], DataConfig())
    talks = [
        [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"from": "observation", "value": "a"}],
    ]
    rows, report = select([{"conversations": talk} for talk in talks], fmt)
    roles = [(turn["role"], turn["content"]) for turn in rows[0]["conversations"]]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert "unknown role 'observation'" in report.rejects[0].reason


def test_messages_that_are_none_are_rejected():
    fmt = PromptFormat(kind="messages", columns={"messages": "m"})
    rows, report = select([{"m": "hi"}, {"m": [{"role": "user", "content": "hi"}]}], fmt)
    assert len(rows) == 1
    assert "must be a list" in report.rejects[0].reason


@pytest.mark.parametrize(
    ("role", "reason"),
    [("assistant", "begins with the assistant"), ("usr", "unknown role 'usr'. Did you mean 'user'?")],
)
def test_a_conversation_that_cannot_be_learned_from_is_a_reject(role, reason):
    fmt = PromptFormat(kind="messages", columns={"messages": "m"})
    rows, report = select([{"m": [{"role": role, "content": "hi"}]}, {"m": [{"role": "user", "content": "hi"}]}], fmt)
    assert (len(rows), report.rejects[0].line) == (1, 1)
    assert reason in report.rejects[0].reason


def test_cleaning_comes_before_empty_rows_and_duplicates():
    rows, report = select(texts("<b>A</b>", "a", "<br>"), clean=("strip_html", "lowercase"))
    assert rows == texts("a")
    assert (report.empty, report.duplicate) == (1, 1)


def test_the_turns_of_a_conversation_are_cleaned_and_one_that_is_left_blank_is_a_reject():
    fmt = PromptFormat(kind="messages", columns={"messages": "m"})
    call = {"role": "assistant", "content": None, "tool_calls": [{"Name": "F"}]}
    talks = [[{"role": "user", "content": text}, call] for text in ("<b>A</b>", "<br>")]
    rows, report = select([{"m": talk} for talk in talks], fmt, clean=("strip_html", "lowercase"))
    assert rows == [{"m": [{"role": "user", "content": "a"}, call]}]
    assert "message 1 needs text under 'content'" in report.rejects[0].reason


def test_cleaning_leaves_columns_outside_the_form_alone():
    rows, _ = select([{"text": "A", "title": "B"}], clean=("lowercase",))
    assert rows == [{"text": "a", "title": "B"}]


def test_chunks_are_counted():
    rows, report = select(texts("a b c d e", "f"), chunk_size=2)
    assert [row["text"] for row in rows] == ["a b", "c d", "e", "f"]
    assert report.added_by_chunking == 2


@pytest.mark.parametrize(("text", "is_said"), [("一二三四五。" * 9, True), ("one two three " * 9, False)])
def test_text_without_spaces_has_one_hint_at_tokens_in_place_of_words(caplog, text, is_said):
    select(texts(text, text + "a"), chunk_size=3)
    assert ["data.chunk_tokenizer=MODEL" in message for message in caplog.messages] == [True] * is_said


def test_pairs_are_not_chunked():
    with pytest.raises(ConfigError, match="these rows are prompt_completion"):
        select([{"p": "a", "c": "b"}], PAIR, chunk_size=2)


ROWS = [Row({"text": str(number)}, "a", number) for number in range(1000)]


@pytest.mark.parametrize(("rows", "held_out"), [(49, 0), (50, 2), (1000, 50)])
def test_five_percent_are_held_out_and_none_of_few(rows, held_out):
    train, validation = split_validation(ROWS[:rows], DataConfig(), seed=0)
    assert (len(train), len(validation)) == (rows - held_out, held_out)


@pytest.mark.parametrize(
    ("rows", "settings", "is_said"),
    [
        (49, {"validation_fraction": 0.2}, True),
        (49, {"validation_fraction": 0.0}, False),
        (50, {}, False),
        (0, {}, False),
    ],
)
def test_it_is_said_that_none_of_few_rows_is_held_out_and_what_to_do(caplog, rows, settings, is_said):
    caplog.set_level("INFO")
    split_validation(ROWS[:rows], DataConfig(**settings), seed=0)
    assert ("Name others with data.eval_source (--eval-data)" in caplog.text) == is_said


def test_the_number_held_out_is_bounded():
    assert len(split_validation(ROWS, DataConfig(max_validation_rows=7), seed=0)[1]) == 7


def test_the_split_loses_no_row_and_keeps_order():
    train, validation = split_validation(ROWS, DataConfig(), seed=0)
    assert sorted(train + validation, key=lambda row: row.line) == ROWS
    assert train == sorted(train, key=lambda row: row.line)


def test_the_split_depends_on_the_seed_alone():
    assert split_validation(ROWS, DataConfig(), seed=1) == split_validation(list(ROWS), DataConfig(), seed=1)
    assert split_validation(ROWS, DataConfig(), seed=1) != split_validation(ROWS, DataConfig(), seed=2)
