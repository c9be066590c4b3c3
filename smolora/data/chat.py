"""Conversations to token ids, by a chat template: the tokenizer's, else the plain one here.

What is trained is found by rendering prefixes (the conversation up to a turn, and up to its end), never by a template's
generation markers, which most templates lack. Control tokens that a user typed are encoded as ordinary text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from smolora.data.encoding import check_spelling, get_bos_ids, get_eos_id
from smolora.data.token_dataset import Example, build_example
from smolora.errors import DataError

Message = Mapping[str, str]

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}Assistant:{% endif %}"
)
"""Used where a tokenizer brings no template: `User: ...`, then on the next line `Assistant: ...<eos>`."""


def check_messages(value: object) -> list[dict[str, str]]:
    """Return `value` as messages.

    Raises:
        DataError: It isn't a list of {"role": text, "content": text}, or a turn is empty.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'messages must be a list of {{"role": ..., "content": ...}}, found {_shorten(value)}.')
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} must be an object with role and content, found {_shorten(message)}.")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str) or not text.strip():
                keys = ", ".join(map(str, message))
                raise DataError(f"message {number} needs text under {key!r}, found {_shorten(text)} (its keys: {keys}).")
    return [dict(message) for message in value]


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> Example:
    """Encode a conversation; every assistant turn is a target, the mark that ends it included.

    Raises:
        DataError: The template can't render it, or rewrites a turn so that what to train on can't be told.
    """
    ids = _render(messages, tokenizer, template)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _find_start(ids, messages, turn, tokenizer, template)
        end = _find_end(ids, start, messages, turn, tokenizer, template)
        check_spelling(ids[start:end], message["content"].strip(), tokenizer)
        spans.append((start, end))
    if spans and spans[-1][1] == len(ids) and not _ends_with_control_token(ids, spans[-1], tokenizer):
        ids = [*ids, get_eos_id(tokenizer)]
        spans[-1] = (spans[-1][0], len(ids))
    bos = _missing_bos(ids, tokenizer)
    return build_example([*bos, *ids], [(start + len(bos), end + len(bos)) for start, end in spans])


def encode_chat_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> list[int]:
    """Encode a conversation up to where the assistant answers: the prefix that training shows before that turn."""
    ids = _render(messages, tokenizer, template, is_prompt=True)
    return [*_missing_bos(ids, tokenizer), *ids]


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None, *, is_prompt: bool = False
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template or tokenizer.chat_template or PLAIN_CHAT_TEMPLATE,
            add_generation_prompt=is_prompt,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            tokenizer_kwargs={"verbose": False},
        )
    except (TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template can't render this conversation (roles {roles}): {error}.") from error
    return list(encoded["input_ids"])


def _missing_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin-of-text id unless the template wrote it already."""
    bos = get_bos_ids(tokenizer)
    return [] if list(ids[: len(bos)]) == bos else bos


def _find_start(
    ids: list[int], messages: Sequence[Message], turn: int, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> int:
    if turn == 0:
        raise DataError("the conversation begins with the assistant, so nothing prompts its first turn.")
    prompt = _render(messages[:turn], tokenizer, template, is_prompt=True)
    if ids[: len(prompt)] != prompt:
        raise DataError(
            f"the chat template renders what comes before turn {turn + 1} differently once the turn is there, so the "
            "model would be trained on a prefix that it never sees later. Use another data.chat_template or drop the row."
        )
    return len(prompt)


def _find_end(
    ids: list[int],
    start: int,
    messages: Sequence[Message],
    turn: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> int:
    """Return where a turn ends: as in the conversation cut after it, else at the first mark that ends a turn.

    Some templates (Qwen 3's) render the last turn differently from earlier ones, so cutting there isn't always exact.
    """
    cut = _render(messages[: turn + 1], tokenizer, template)
    if ids[: len(cut)] == cut:
        return len(cut)
    first, second = (
        _render([*messages[:turn], {"role": "assistant", "content": text}], tokenizer, template) for text in ("a", "b c")
    )
    mark: list[int] = []
    while first[-1 - len(mark)] == second[-1 - len(mark)]:
        mark.insert(0, first[-1 - len(mark)])
    for end in range(start + len(mark), len(ids) + 1):
        if mark and ids[end - len(mark) : end] == mark:
            return end
    raise DataError(f"the chat template doesn't mark where turn {turn + 1} ends, so it can't be told what to train on.")


def _ends_with_control_token(ids: list[int], span: tuple[int, int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the turn holds a token that plain text can't produce, such as <|im_end|>."""
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return any(token in control for token in ids[span[0] : span[1]])


def _shorten(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]
