import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolora.config.data import DataConfig
from smolora.data.chat import PLAIN_CHAT_TEMPLATE
from smolora.data.encoding import decode_ids, join_seam
from smolora.data.prompts import (
    PROMPT_FORMAT_FILE,
    PromptFormat,
    encode_prompt,
    encode_row,
    read_prompt_format,
    resolve_prompt_format,
    write_prompt_format,
)
from smolora.errors import ConfigError, DataError, ModelError

PAIR = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})
TEXT = PromptFormat(kind="text", columns={"text": "text"})
INSTRUCTION = PromptFormat(
    kind="instruction", columns={"instruction": "instruction", "input": "input", "output": "output"}
)

PAIRS = [
    ("Hi there", "Bob went"),
    ("Answer: ", "Paris"),
    ("a\n\n", "b"),
    ("foo", "\nbar"),
    ("A: hi\r\nB: ho\r\n", "é 😀 ok"),
    ("café ", "  two"),
    ("see <s> and </s>", "<|endoftext|> is text"),
]


def targets(example, tokenizer):
    return decode_ids(example.input_ids[example.is_target].tolist(), tokenizer)


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_prompt_at_inference_is_exactly_the_prefix_trained_on(tokenizer, prompt, completion):
    example = encode_row({"p": prompt, "c": completion}, PAIR, tokenizer)
    prefix = encode_prompt(prompt, PAIR, tokenizer)
    assert example.input_ids[: len(prefix)].tolist() == prefix
    assert example.is_target.tolist() == [False] * len(prefix) + [True] * (len(example) - len(prefix))


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_learned_tokens_spell_the_completion_and_the_end(tokenizer, prompt, completion):
    example = encode_row({"p": prompt, "c": completion}, PAIR, tokenizer)
    assert targets(example, tokenizer).strip() == join_seam(prompt, completion).strip() + tokenizer.eos_token


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_example_spells_prompt_and_completion_as_given(gpt2, prompt, completion):
    example = encode_row({"p": prompt, "c": completion}, PAIR, gpt2)
    expected = prompt + join_seam(prompt, completion) + gpt2.eos_token
    assert decode_ids(example.input_ids.tolist(), gpt2) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_is_a_prefix_of_its_example(bpe, prompt, completion):
    example = encode_row({"p": prompt, "c": completion}, PAIR, bpe)
    prefix = encode_prompt(prompt, PAIR, bpe)
    assert example.input_ids[: len(prefix)].tolist() == prefix


def test_one_space_joins_only_where_neither_side_has_white_space():
    assert join_seam("Q", "A") == " A"
    assert join_seam("Q\t", "A") == "A"
    assert join_seam("Q", "\nA") == "\nA"


def test_a_text_is_learned_whole_with_its_end(bpe):
    example = encode_row({"text": "the cat"}, TEXT, bpe)
    assert decode_ids(example.input_ids.tolist(), bpe) == "the cat<|endoftext|>"
    assert example.is_target.tolist() == [False] + [True] * (len(example) - 1)


def test_begin_of_text_stands_exactly_once_where_the_tokenizer_has_the_habit(llama):
    texts = [encode_row({"text": text}, TEXT, llama).input_ids.tolist() for text in ("once upon", "<s> once")]
    prompts = [encode_prompt("once", fmt, llama) for fmt in (None, TEXT, PAIR)]
    chats = [encode_prompt([{"role": "user", "content": "once"}], None, llama)]
    for ids in [*texts, *prompts, *chats]:
        assert ids[0] == llama.bos_token_id
        assert ids.count(llama.bos_token_id) == 1


def test_no_begin_of_text_where_the_tokenizer_lacks_the_habit(gpt2):
    assert gpt2.bos_token_id not in encode_prompt("once", PAIR, gpt2)


def test_a_tokenizer_without_an_end_of_text_is_refused(bpe):
    bpe.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        encode_row({"text": "the cat"}, TEXT, bpe)


def test_an_instruction_is_rendered_the_same_for_a_row_and_for_a_question(bpe):
    row = {"instruction": "say hi", "input": "", "output": "hello"}
    example = encode_row(row, INSTRUCTION, bpe)
    prefix = encode_prompt("say hi", INSTRUCTION, bpe)
    assert example.input_ids[: len(prefix)].tolist() == prefix
    assert decode_ids(prefix, bpe) == "### Instruction:\nsay hi\n\n### Response:\n"


def test_the_input_of_an_instruction_is_part_of_the_prompt(bpe):
    example = encode_row({"instruction": "add", "input": "1 2", "output": "3"}, INSTRUCTION, bpe)
    prompt = example.input_ids[~example.is_target].tolist()
    assert "### Input:\n1 2\n\n" in decode_ids(prompt, bpe)


def test_a_form_without_turns_is_asked_the_last_message(bpe):
    history = [{"role": "user", "content": text} for text in ("first", "second")]
    assert encode_prompt(history, PAIR, bpe) == encode_prompt("second", PAIR, bpe)


@pytest.mark.parametrize(
    ("columns", "kind", "found"),
    [
        (["Text"], "text", {"text": "Text"}),
        (["id", "PROMPT", "Completion"], "prompt_completion", {"prompt": "PROMPT", "completion": "Completion"}),
        (["instruction", "output"], "instruction", {"instruction": "instruction", "output": "output"}),
        (["messages", "text"], "messages", {"messages": "messages"}),
    ],
)
def test_the_form_is_recognised_from_the_columns_without_regard_to_case(columns, kind, found):
    fmt = resolve_prompt_format(columns, DataConfig())
    assert (fmt.kind, fmt.columns) == (kind, found)


def test_the_input_column_of_an_instruction_is_found():
    fmt = resolve_prompt_format(["output", "Input", "instruction"], DataConfig())
    assert fmt.columns == {"instruction": "instruction", "input": "Input", "output": "output"}


def test_named_fields_win_over_recognition():
    fmt = resolve_prompt_format(["MR", "ref", "text"], DataConfig(prompt_field="mr", completion_field="ref"))
    assert fmt.columns == {"prompt": "MR", "completion": "ref"}
    assert fmt.describe().endswith("completion from column 'ref' (trained)")


def test_columns_that_fit_nothing_are_listed():
    with pytest.raises(DataError, match="'mr', 'ref' fit no form"):
        resolve_prompt_format(["mr", "ref"], DataConfig())


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(
        DataError, match=r"no column 'dialog'. Did you mean 'dialogue'\? Columns found: 'dialogue', 'id'"
    ):
        resolve_prompt_format(["dialogue", "id"], DataConfig(text_field="dialog"))


def test_columns_that_differ_only_by_case_must_be_spelt():
    with pytest.raises(DataError, match="differ only by case"):
        resolve_prompt_format(["TEXT", "Text"], DataConfig(text_field="text"))
    assert resolve_prompt_format(["TEXT", "Text"], DataConfig(text_field="Text")).columns == {"text": "Text"}


def test_half_a_pair_of_fields_is_refused():
    with pytest.raises(ConfigError, match="completion_field"):
        resolve_prompt_format(["a", "b"], DataConfig(prompt_field="a"))


@pytest.mark.parametrize("name", ["prompt_field", "completion_field"])
def test_of_one_field_alone_a_wrong_name_is_said_before_the_missing_one(name):
    with pytest.raises(DataError, match=r"no column 'nope'. Columns found: 'mr', 'ref'"):
        resolve_prompt_format(["mr", "ref"], DataConfig(**{name: "nope"}))
    with pytest.raises(ConfigError, match=rf"{name} is set without .* needs both.* Columns found: 'mr', 'ref'"):
        resolve_prompt_format(["mr", "ref"], DataConfig(**{name: "mr"}))


def test_contradicting_fields_are_refused():
    with pytest.raises(ConfigError, match="choose one form"):
        resolve_prompt_format(["a", "b"], DataConfig(prompt_field="a", completion_field="b", text_field="a"))


def test_a_chat_template_without_messages_is_refused():
    with pytest.raises(ConfigError, match="would change nothing for rows of the form instruction"):
        resolve_prompt_format(["instruction", "output"], DataConfig(chat_template="{{ messages }}"))


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq", "classification", "token_classification"])
def test_a_stride_without_windows_is_refused(task):
    with pytest.raises(ConfigError, match=rf"data\.stride=0 would change nothing for {task}: only qa reads contexts"):
        resolve_prompt_format(["prompt", "completion"], DataConfig(stride=0), task=task)


def test_a_value_that_is_no_text_is_refused(bpe):
    with pytest.raises(DataError, match="column 'c' must hold text, found 5"):
        encode_row({"p": "a", "c": 5}, PAIR, bpe)


@pytest.mark.parametrize("fmt", [None, PAIR, INSTRUCTION])
@pytest.mark.parametrize("prompt", [None, 5, {"role": "user", "content": "hi"}])
def test_what_is_no_prompt_is_refused_with_what_one_is(bpe, fmt, prompt):
    with pytest.raises(DataError, match=r"a prompt is a text, or a conversation as a list of .*; found (None|5|\{)"):
        encode_prompt(prompt, fmt, bpe)


def test_half_of_a_surrogate_pair_in_a_prompt_is_refused(bpe):
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_prompt("a\ud800", None, bpe)


def test_the_form_is_read_as_it_was_written(tmp_path):
    fmt = PromptFormat(kind="messages", columns={"messages": "m"}, chat_template=PLAIN_CHAT_TEMPLATE)
    write_prompt_format(fmt, tmp_path)
    assert read_prompt_format(tmp_path) == fmt


def test_a_folder_without_a_form_has_none(tmp_path):
    assert read_prompt_format(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "poem", "columns": {}}', "3"])
def test_a_damaged_form_is_refused(tmp_path, content):
    (tmp_path / PROMPT_FORMAT_FILE).write_text(content)
    with pytest.raises(ModelError, match="can't be read"):
        read_prompt_format(tmp_path)
