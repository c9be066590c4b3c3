import pytest

from smolora.config.data import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.preprocessing import InstructionPreprocessor, encode_rows, get_preprocessor
from smolora.data.preprocessor import render_marked
from smolora.data.prompts import PromptFormat, encode_row
from smolora.data.rows import Row
from smolora.data.sources import read_sources
from smolora.errors import ConfigError, DataError
from tests.unit.data.conftest import require_shared

PAIR = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})
TEXT = PromptFormat(kind="text", columns={"text": "text"})
ROWS = [Row({"p": "aaaa", "c": "bb"}, "f", 1), Row({"p": "a" * 20, "c": "bbbb"}, "f", 2)]  # 8 and 26 characters


def encode(rows, tokenizer, *, context=128, fmt=PAIR, report=None, **settings):
    report = report or DataReport()
    return encode_rows(rows, fmt, tokenizer, data=DataConfig(**settings), context=context, report=report), report


def test_rows_within_the_limit_are_encoded_and_counted(char):
    dataset, report = encode(ROWS, char)
    assert dataset.lengths.tolist() == [4 + 3 + 1, 20 + 5 + 1]
    counts = report.encoded["train"]
    assert (counts.rows, counts.examples, counts.input_tokens, counts.target_tokens) == (2, 2, 34, 10)
    assert dataset.num_target_tokens == 10


def test_many_rows_encode_as_one_by_one(tokenizer):
    rows = [Row({"p": f"the cat {n}", "c": f"sat {n}"}, "f", n) for n in range(1100)]
    dataset, _ = encode(rows, tokenizer)
    for index in (0, 999, 1000, 1099):
        single = encode_row(rows[index].values, PAIR, tokenizer)
        assert dataset[index].input_ids.tolist() == single.input_ids.tolist()
        assert dataset[index].is_target.tolist() == single.is_target.tolist()


def test_a_row_past_the_context_is_refused_with_its_place_and_the_choices(char):
    with pytest.raises(DataError, match="f:2 becomes 26 tokens, but the longest allowed is 25.*truncate.*drop"):
        encode(ROWS, char, context=25)


@pytest.mark.parametrize(("fmt", "is_said"), [(TEXT, True), (PAIR, False)])
def test_only_plain_text_that_is_too_long_may_be_cut_into_pieces(char, fmt, is_said):
    with pytest.raises(DataError, match="longest allowed is 5") as error:
        encode([Row({"text": "a" * 9, "p": "a" * 9, "c": "b"}, "f", 1)], char, fmt=fmt, max_length=5)
    assert ("data.chunk_size=5 data.chunk_tokenizer=MODEL" in str(error.value)) is is_said


def test_of_a_text_in_pieces_the_last_alone_is_ended(tokenizer):
    dataset, _ = encode(
        [Row({"text": "the cat", "space_to_next": " "}, "f", 1), Row({"text": "sat on"}, "f", 1)], tokenizer, fmt=TEXT
    )
    assert [tokenizer.eos_token_id in example.input_ids for example in dataset] == [False, True]
    assert dataset[0].is_target[-1]


def test_a_row_of_exactly_the_limit_passes(char):
    assert len(encode(ROWS, char, context=26)[0]) == 2


def test_max_length_is_the_limit_where_set(char):
    with pytest.raises(DataError, match="longest allowed is 10"):
        encode(ROWS, char, max_length=10)


def test_a_max_length_past_the_context_is_refused(char):
    with pytest.raises(ConfigError, match="max_length=200 is past the model's context of 128"):
        encode(ROWS, char, max_length=200)


def test_a_model_without_a_limit_takes_any_length(char):
    assert len(encode(ROWS, char, context=None)[0]) == 2


def test_truncating_counts_the_target_tokens_it_cuts(char):
    dataset, report = encode(ROWS, char, context=22, overlong="truncate")
    assert dataset.lengths.tolist() == [8, 22]
    counts = report.encoded["train"]
    assert (counts.truncated, counts.cut_target_tokens, counts.target_tokens) == (1, 4, 4 + 2)


def test_a_row_whose_completion_is_cut_off_whole_is_dropped_and_counted(char):
    dataset, report = encode(ROWS, char, context=20, overlong="truncate")
    counts = report.encoded["train"]
    assert len(dataset) == 1
    assert (counts.dropped_without_target, counts.truncated, counts.cut_target_tokens) == (1, 0, 6)


def test_dropping_counts_the_rows(char):
    dataset, report = encode(ROWS, char, context=20, overlong="drop")
    assert (len(dataset), report.encoded["train"].dropped_overlong) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"max_length": 6, "overlong": "drop"},
            r"2 are longer than 6 tokens \(data.max_length\) and were dropped. Raise data.max_length \(up to 128\)",
        ),
        (
            {"context": 6, "overlong": "drop"},
            r"2 are longer than 6 tokens \(the context of the model\) and were dropped. Cut them with --overlong",
        ),
        (
            {"max_length": 4, "overlong": "truncate"},
            r"2 have nothing to learn within 4 tokens \(data.max_length\). Raise data.max_length \(up to 128\), or",
        ),
    ],
)
def test_rows_that_leave_nothing_to_learn_are_refused_with_the_limit_and_what_to_change(char, settings, why):
    with pytest.raises(DataError, match=f"none of the 2 train rows is left with a token to learn: {why}"):
        encode(ROWS, char, **settings)


def test_a_conversation_without_an_answer_is_dropped_and_counted(chatml):
    fmt = PromptFormat(kind="messages", columns={"messages": "m"}, chat_template=chatml.chat_template)
    ask = {"role": "user", "content": "hi"}
    rows = [Row({"m": [ask]}, "f", 1), Row({"m": [ask, {"role": "assistant", "content": "hello"}]}, "f", 2)]
    dataset, report = encode(rows, chatml, fmt=fmt)
    assert (len(dataset), report.encoded["train"].dropped_without_target) == (1, 1)


def test_a_row_that_can_not_be_encoded_is_named(char):
    with pytest.raises(DataError, match="f:2: column 'c' must hold text"):
        encode([ROWS[0], Row({"p": "a", "c": 3}, "f", 2)], char)


def test_sides_are_counted_apart(char):
    report = DataReport()
    encode_rows(ROWS, PAIR, char, data=DataConfig(), context=None, report=report, side="validation")
    assert list(report.encoded) == ["validation"]


def test_the_same_rows_have_the_same_fingerprint(char):
    assert encode(ROWS, char)[0].fingerprint == encode(ROWS, char)[0].fingerprint
    assert encode(ROWS, char)[0].fingerprint != encode(ROWS[::-1], char)[0].fingerprint


def test_marked_runs_join_to_the_example(tokenizer):
    example = encode_row({"p": "the cat", "c": "sat down"}, PAIR, tokenizer)
    spans = render_marked(example, tokenizer)
    assert [flag for _, flag in spans] == [False, True]
    assert [text.strip() for text, _ in spans][1] == "sat down" + tokenizer.eos_token
    assert "".join(text for text, _ in spans).endswith("the cat sat down" + tokenizer.eos_token)


def test_a_task_is_found_by_name(char):
    assert isinstance(get_preprocessor("instruction", fmt=PAIR, tokenizer=char), InstructionPreprocessor)
    assert len(get_preprocessor("causal_lm", fmt=TEXT, tokenizer=char).encode([{"text": "abc"}])) == 1


def test_an_unknown_task_is_named_with_the_nearest(char):
    with pytest.raises(ConfigError, match=r"no task 'causal'. Did you mean 'causal_lm'\?"):
        get_preprocessor("causal", fmt=PAIR, tokenizer=char)


def test_plain_text_is_no_instruction(char):
    with pytest.raises(DataError, match="don't fit this task"):
        get_preprocessor("instruction", fmt=TEXT, tokenizer=char)


def test_real_rows_spell_their_completion(llama):
    path = require_shared("data/e2e/devset.csv")
    data = DataConfig(sources=(str(path),), prompt_field="mr", completion_field="ref")
    rows = read_sources(data, seed=0).train[:200]
    dataset, _ = encode(
        rows,
        llama,
        context=512,
        fmt=PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"}),
    )
    for row, example in zip(rows, dataset, strict=True):
        assert render_marked(example, llama)[-1][0].strip() == row.values["ref"].strip() + "</s>"
