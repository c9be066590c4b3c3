"""The form of a row: which columns make the prompt and which the completion, and how they become tokens.

One description, `PromptFormat`, is recognised from the data, used to encode the training rows, written beside the
weights, and read by everything that asks the model later: the prefix is the same tokens everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smolora.config.base import Section
from smolora.config.data import DataConfig
from smolora.config.model import TaskType
from smolora.data.chat import (
    PLAIN_CHAT_TEMPLATE,
    Message,
    check_conversation,
    check_messages,
    choose_chat_template,
    encode_chat_prompt,
    encode_conversation,
    list_taught,
)
from smolora.data.encoding import encode_pairs, encode_texts, get_bos_ids
from smolora.data.rows import find_column, match_column
from smolora.data.task_columns import FORMS_BY_TASK, USUAL_NAMES, refuse_other_fields, resolve_task_columns
from smolora.data.token_dataset import Example
from smolora.errors import ConfigError, DataError, ModelError
from smolora.records.staging import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FORMAT_FILE = "prompt_format.json"

Kind = Literal["text", "prompt_completion", "instruction", "messages", "classification", "token_classification", "qa"]

_RECOGNISED: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
}
"""The columns that make a form, most specific first."""

MAY_LACK = frozenset(("tools", "input"))
"""Roles whose column may be missing."""

_SHAREGPT = "conversations"
"""The column of messages in ShareGPT's files, where no form is recognised."""

_TRAINED: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("completion",),
    "instruction": ("output",),
    "messages": ("messages",),
    "classification": ("label",),
    "token_classification": ("tags",),
    "qa": ("answers",),
}


class PromptFormat(Section):
    """How rows are rendered."""

    kind: Kind
    """text: all of it is learned. prompt_completion, instruction: the answer. messages: the assistant's turns.
    classification: the label of a text, or of two. token_classification: the labels of words. qa: where in a context
    the answer to a question is."""

    columns: dict[str, str]
    """Role of each column to its name in the data, such as {"prompt": "mr", "completion": "ref"}."""

    chat_template: str | None = None
    """messages only: the Jinja template."""

    end_token: str | None = None
    """The token that ends a text or an answer. Left out, the tokenizer's own; chat templates bring theirs."""

    labels: tuple[str, ...] = ()
    """classification, token_classification: the labels, in the order of the head's outputs."""

    label_names: tuple[str, ...] = ()
    """classification, token_classification: what numbers in place of labels stand for, from 0 up; nothing where the
    rows didn't say it."""

    may_lack_answer: bool = False
    """qa: whether some questions that were learned have no answer, so that a model may say nothing."""

    def with_end_token(self, end_token: str | None) -> PromptFormat:
        """Return the form with texts ended by `end_token`; our plain chat template too, which has none of its own."""
        if end_token is None:
            return self
        ended = PLAIN_CHAT_TEMPLATE.replace("{{ eos_token }}", end_token)
        template = self.chat_template and self.chat_template.replace(PLAIN_CHAT_TEMPLATE, ended)
        return self.model_copy(update={"chat_template": template, "end_token": end_token})

    def describe(self) -> str:
        """Return the mapping as a line for people.

        >>> PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"}).describe()
        "prompt_completion: prompt from column 'mr', completion from column 'ref' (trained)"
        """
        parts = [
            f"{role} from column {column!r}" + (" (trained)" if role in _TRAINED[self.kind] else "")
            for role, column in self.columns.items()
        ]
        return f"{self.kind}: {', '.join(parts)}"

    @property
    def label_column(self) -> str | None:
        """The column of labels, of texts or of words; None where rows have none."""
        return self.columns.get("label") or self.columns.get("tags")

    def with_labels(self, labels: Sequence[str]) -> PromptFormat:
        """Return the form with the labels that a head answers, in their order."""
        return self.model_copy(update={"labels": tuple(labels)})

    def with_chat_template(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Return the form of messages with the template that `data` names, else the tokenizer's, else ours."""
        if self.kind != "messages":
            return self
        return self.model_copy(update={"chat_template": data.chat_template or choose_chat_template(tokenizer)})


def name_by_roles(columns: Sequence[str], fmt: PromptFormat) -> dict[str, str]:
    """Return new names of columns, each with the old: what they are for, so that a form is recognised without a name.

    Other columns stay, but for those whose names are a role's of this form, or complete a form that goes before it.

    >>> name_by_roles(["review", "prompt", "completion"], PromptFormat(kind="text", columns={"text": "review"}))
    {'text': 'review', 'prompt': 'prompt'}
    """
    named = {role: column for role, column in fmt.columns.items() if column in columns}
    left_out = {*fmt.columns, *USUAL_NAMES.get(fmt.kind, _list_completing(fmt.kind))}
    used = set(fmt.columns.values())
    return named | {name: name for name in columns if name not in used and name.casefold() not in left_out}


def _list_completing(kind: Kind) -> list[str]:
    """Return a role of each form that is recognised before `kind`, without which it isn't."""
    return [
        [role for role in _RECOGNISED[form] if role not in MAY_LACK][-1] for form in takewhile(kind.__ne__, _RECOGNISED)
    ]


def write_prompt_format(fmt: PromptFormat, folder: Path) -> None:
    """Write `prompt_format.json` into a model's or an adapter's folder."""
    write_text(folder / PROMPT_FORMAT_FILE, fmt.model_dump_json(indent=2) + "\n")


def read_prompt_format(folder: Path) -> PromptFormat | None:
    """Read `prompt_format.json`; None where the folder has none.

    Raises:
        ModelError: The file isn't one of ours.
    """
    path = folder / PROMPT_FORMAT_FILE
    if not path.is_file():
        return None
    try:
        return PromptFormat(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"{path} can't be read: {error}. Restore it, or delete it to prompt with plain text."
        ) from error


def resolve_prompt_format(
    columns: Sequence[str],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: TaskType = "causal_lm",
) -> PromptFormat:
    """Recognise the form of rows from their columns, or from the fields that `data` names; case doesn't matter.

    Args:
        columns: The columns that the rows have.
        data: `text_field`, `prompt_field`, `completion_field` and the other fields name columns by hand.
        tokenizer: Whose chat template is used for messages; ours where it has none.
        task: What the model learns from the rows.

    Raises:
        DataError: A named column is missing, or no form fits.
        ConfigError: The named fields contradict each other, or a setting is another task's.
    """
    if data.stride is not None and task != "qa":
        raise ConfigError(
            f"data.stride={data.stride} would change nothing for {task}: only qa reads contexts in windows. Leave it "
            "out, or choose --task qa (model.task_type=qa)."
        )
    fmt = _recognise(columns, data, tokenizer, task)
    if data.chat_template is not None and fmt.kind != "messages":
        raise ConfigError(
            f"data.chat_template would change nothing for rows of the form {fmt.kind}: only messages are rendered by "
            "one. Leave it out."
        )
    return fmt


def _recognise(
    columns: Sequence[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, task: TaskType
) -> PromptFormat:
    if task in FORMS_BY_TASK:
        own_kind, own_columns = resolve_task_columns(columns, data, task)
        return PromptFormat(kind=own_kind, columns=own_columns)
    refuse_other_fields(data, task, "text_pair_field", "label_field")
    named = _named_format(columns, data)
    if named is not None:
        return named
    own = choose_chat_template(tokenizer) if tokenizer is not None else None
    template = data.chat_template or own
    for kind, roles in _RECOGNISED.items():
        found = {role: column for role in roles if (column := match_column(role, columns)) is not None}
        if not found.keys() >= set(roles) - MAY_LACK:
            continue
        return PromptFormat(kind=kind, columns=found, chat_template=template if kind == "messages" else None)
    if (column := match_column(_SHAREGPT, columns)) is not None:
        return PromptFormat(kind="messages", columns={"messages": column}, chat_template=template)
    raise DataError(
        f"the columns {', '.join(map(repr, columns)) or '(none)'} fit no form. Known: text; prompt and completion; "
        "instruction, output and perhaps input; messages, or conversations as in ShareGPT. Name yours: --text-field X "
        "(data.text_field=X), or --prompt-field X --completion-field Y (data.prompt_field=X data.completion_field=Y)."
    )


def _named_format(columns: Sequence[str], data: DataConfig) -> PromptFormat | None:
    if (data.prompt_field is None) != (data.completion_field is None):
        have, lack = ("prompt", "completion") if data.prompt_field else ("completion", "prompt")
        find_column(str(data.prompt_field or data.completion_field), columns)  # A wrong name is the first mistake.
        raise ConfigError(
            f"data.{have}_field is set without data.{lack}_field: a row needs both, or only a text_field. "
            f"Columns found: {', '.join(map(repr, columns))}."
        )
    if data.prompt_field is not None and data.completion_field is not None:
        if data.text_field is not None:
            raise ConfigError("data.text_field and data.prompt_field are both set: choose one form.")
        prompt, completion = (find_column(name, columns) for name in (data.prompt_field, data.completion_field))
        return PromptFormat(kind="prompt_completion", columns={"prompt": prompt, "completion": completion})
    if data.text_field is not None:
        return PromptFormat(kind="text", columns={"text": find_column(data.text_field, columns)})
    return None


def render_pair(row: Mapping[str, object], fmt: PromptFormat) -> tuple[str, str]:
    """Return the prompt and the completion of a row, as text; the prompt of plain text is empty.

    Raises:
        DataError: A column is missing or doesn't hold text.
    """
    values = {role: _read_text(row, column, is_optional=role == "input") for role, column in fmt.columns.items()}
    if fmt.kind == "text":
        return "", values["text"]
    if fmt.kind == "instruction":
        return _render_instruction(values["instruction"], values.get("input", "")), values["output"]
    return values["prompt"], values["completion"]


def read_conversation(row: Mapping[str, object], fmt: PromptFormat) -> list[dict[str, str]]:
    """Return the messages of a row; the first one carries the row's tools.

    Raises:
        DataError: As `check_conversation`.
    """
    tools = row.get(fmt.columns.get("tools", ""))
    return check_conversation(row.get(fmt.columns["messages"]), fmt.chat_template, tools)


def reduce_to_taught(value: object, role: str, fmt: PromptFormat) -> object:
    """Return what of a column's value is rendered, so that values that teach the same are equal."""
    if isinstance(value, str):
        return "" if value.isspace() else value
    if role == "messages" and isinstance(value, Sequence):
        return list_taught(value, fmt.chat_template)
    return "" if value is None or value == [] else value


def encode_row(row: Mapping[str, object], fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Encode one row: begin-of-text once where the tokenizer has the habit, end-of-text last; only answers are targets.

    Raises:
        DataError: The row doesn't fit the form.
    """
    if fmt.kind == "messages":
        return encode_conversation(read_conversation(row, fmt), tokenizer, template=fmt.chat_template)
    return encode_pairs([render_pair(row, fmt)], tokenizer, end_token=fmt.end_token)[0]


def encode_prompt(
    prompt: str | Sequence[Message], fmt: PromptFormat | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Encode what a model is asked: the same tokens that training showed before the answer.

    Args:
        prompt: A text, or messages. For messages a text is one user turn; for an instruction it is the instruction. A
            form without turns has no history: of messages, it is asked the last one.
        fmt: The form the model was trained in; None for a plain model.
        tokenizer: The model's.

    Raises:
        DataError: It is neither, or can't be rendered.
    """
    if isinstance(prompt, str) and fmt is not None and fmt.kind == "messages":
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        messages = check_prompt(prompt)
        if fmt is None or fmt.kind in {"messages", "text"}:
            return encode_chat_prompt(messages, tokenizer, template=fmt.chat_template if fmt else None)
    return [*get_bos_ids(tokenizer), *encode_texts([render_prompt(prompt, fmt)], tokenizer)[0]]


def render_prompt(prompt: str | Sequence[Message], fmt: PromptFormat | None) -> str:
    """Return what is asked as one text, in the form `fmt` where it is an instruction; of messages the last one."""
    text = prompt if isinstance(prompt, str) else check_prompt(prompt)[-1]["content"]
    return _render_instruction(text, "") if fmt is not None and fmt.kind == "instruction" else text


def list_prompts(prompts: str | Sequence[str | Sequence[Message]]) -> Sequence[str | Sequence[Message]]:
    """Return several prompts as they are; one text in a list, and so what is none, for `check_prompt` to refuse."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    return list(prompts)


def check_prompt(prompt: object) -> list[dict[str, str]]:
    """Return the messages of a prompt that is no text.

    Raises:
        DataError: It is no conversation either.
    """
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise DataError(
            'a prompt is a text, or a conversation as a list of {"role": ..., "content": ...}; found '
            f"{prompt!r:.80}. Several prompts, and one conversation among them, stand in a list."
        )
    return check_messages(prompt)


def _render_instruction(instruction: str, given: str) -> str:
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _read_text(row: Mapping[str, object], column: str, *, is_optional: bool) -> str:
    value = row.get(column)
    if value is None and is_optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must hold text, found {'nothing' if value is None else repr(value)[:80]}.")
    return value
