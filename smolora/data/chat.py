"""Conversations to token ids, by a chat template: the tokenizer's, else the plain one here.

What is trained is found by rendering prefixes (the conversation up to a turn, and up to its end), never by a template's
generation markers, which most templates lack. Control tokens that a user typed are encoded as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from smolora.data.encoding import check_spelling, decode_ids, get_bos_ids, get_eos_id
from smolora.data.token_dataset import Example, build_example
from smolora.errors import DataError, clause, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}Assistant:{% endif %}"
)
"""Used where a tokenizer brings no template: `User: ...`, then on the next line `Assistant: ...<eos>`."""


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Who may speak; a template may name others. A turn of anyone else would be taken for one that isn't learned."""

_WEIGHTS: tuple[object, ...] = (None, 0, 1)
"""What a turn's `weight` may be, as in OpenAI's files; Parquet has None where JSON leaves a key out."""

_BOOKKEEPING = frozenset(("timestamp", "time", "date", "created_at", "create_time", "id", "message_id", "uuid"))
"""What is taken for something that templates don't read of a turn, where the template isn't known yet."""

_CALLS = frozenset(("tool_calls", "function_call"))
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_TOLD = ("role", "content", "weight")

_SAMPLE_CHAT: tuple[Message, ...] = (
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Which one?"},
)
_BEGINNINGS = ("", "{{ bos_token }}", "{{ bos_token + ' ' }}")


def choose_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the tokenizer's own chat template, of several the one for plain conversations, else ours."""
    found = tokenizer.chat_template if tokenizer is not None else None
    own = found.get("default") if isinstance(found, Mapping) else found
    return str(own) if own else PLAIN_CHAT_TEMPLATE


def spell_chat_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template by which plain transformers makes the prompts that `encode_chat_prompt` makes by `template`.

    Transformers adds no begin-of-text token to what a template renders, so the template has to write it. Some
    tokenizers take the space before the first word of a text away where that token is written.

    Raises:
        DataError: No template does, or `template` can't render a conversation.
    """
    wanted = encode_chat_prompt(_SAMPLE_CHAT, tokenizer, template=template)
    for beginning in _BEGINNINGS:
        spelt = beginning + template
        found = tokenizer.apply_chat_template(
            [dict(message) for message in _SAMPLE_CHAT],
            chat_template=spelt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        if list(found["input_ids"]) == wanted:
            return spelt
    raise DataError("the tokenizer encodes what the chat template renders otherwise behind its begin-of-text token.")


def check_messages(value: object) -> list[dict[str, str]]:
    """Return `value` as messages.

    Raises:
        DataError: It isn't a list of {"role": text, "content": text}, or a turn is empty that calls no tool either.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'messages must be a list of {{"role": ..., "content": ...}}, found {_shorten(value)}.')
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} must be an object with role and content, found {_shorten(message)}.")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str) or not text.strip():
                if key == "content" and not text and any(map(message.get, _CALLS)):
                    continue
                keys = ", ".join(map(str, message))
                raise DataError(
                    f"message {number} needs text under {key!r}, found {_shorten(text)} (its keys: {keys})."
                )
    return [dict(message) if message.get("content") else {**message, "content": ""} for message in value]


def read_sharegpt(value: object) -> object:
    """Return ShareGPT's turns, which have `from` and `value`, as messages; anything else as it is.

    >>> read_sharegpt([{"from": "human", "value": "hi"}])
    [{'role': 'user', 'content': 'hi'}]
    """
    if not (isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]):
        return value
    return [_read_sharegpt_turn(turn) if isinstance(turn, dict) else turn for turn in value]


def _read_sharegpt_turn(turn: Mapping[str, object]) -> dict[str, object]:
    speaker = turn.get("from")
    return {"role": _SPEAKERS.get(str(speaker), speaker), "content": turn.get("value")}


def is_learned(message: Mapping[str, object]) -> bool:
    """Whether a turn is a target: one of the assistant's, unless a `weight` of 0 makes it context alone."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_conversation(value: object, template: str | None, tools: object = None) -> list[dict[str, str]]:
    """Return `value` as messages that can be learned from; the first one carries the tools.

    Args:
        value: What a row holds.
        template: The chat template, which may name roles of its own; None where it isn't known yet.
        tools: What the row says may be called: a list of objects, or that as JSON.

    Raises:
        DataError: As `check_messages`, or a turn that nothing prompts is to be learned, or somebody unknown speaks, or
            a weight is neither 0 nor 1, or the template leaves tools or their calls out.
    """
    messages = check_messages(value)
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES and not any(quoted in (template or "") for quoted in (f"'{role}'", f'"{role}"')):
            raise DataError(
                f"message {number} has the unknown role {role!r}.{did_you_mean(role, ROLES)} Known: "
                f"{', '.join(ROLES)}, and those that data.chat_template names."
            )
        if role == "assistant" and message.get("weight") not in _WEIGHTS:
            raise DataError(
                f"message {number} has the weight {message['weight']!r}. Known: 1, by which a turn is learned as it is "
                "without a weight, and 0, by which it is context alone."
            )
        if not _CALLS.isdisjoint(message):
            for key in filter(message.get, _CALLS):
                _require_rendered(f"message {number} has", key, template)
    if is_learned(messages[0]):
        raise DataError("the conversation begins with the assistant, so nothing prompts its first turn.")
    if offered := _read_tools(tools):
        _require_rendered("the row has", "tools", template)
        messages[0] = {**messages[0], "tools": offered}
    return messages


def _require_rendered(found: str, key: str, template: str | None) -> None:
    if template is not None and key not in _list_names(template):
        raise DataError(
            f"{found} {key}, and the chat template leaves them out, so that something else would be learned. Set a "
            f"data.chat_template that renders them, or take {key} out of the row."
        )


def _read_tools(value: object) -> Any:
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except ValueError:
        tools = value
    if tools and (not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"tools must be a list of objects, or that as JSON, found {_shorten(value)}.")
    return tools


def list_taught(messages: Sequence[Message], template: str | None) -> list[list[object]]:
    """Return of each turn what is rendered and whether it is learned: equal for conversations that teach the same."""
    names = None if template is None else _list_names(template)
    return [
        [message["role"], message["content"]] if len(message) == 2 and "content" in message else _reduce(message, names)
        for message in messages
    ]


def _reduce(message: Message, names: Set[str] | None) -> list[object]:
    taught: list[object] = [message["role"], message.get("content") or ""]
    if message["role"] == "assistant" and not is_learned(message):
        taught.append("context")
    others = {key: value for key, value in message.items() if value and key not in _TOLD}
    read = {key: others[key] for key in others if (key not in _BOOKKEEPING if names is None else key in names)}
    return [*taught, read] if read else taught


@lru_cache
def _list_names(template: str) -> frozenset[str]:
    """Return the words of a template, among them the keys that it reads."""
    return frozenset(re.findall(r"\w+", template))


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> Example:
    """Encode a conversation; the turns that are learned are targets, the marks that end them included.

    Args:
        messages: As `check_conversation` returns them.
        tokenizer: The model's.
        template: The chat template; left out, the tokenizer's, else the plain one.

    Raises:
        DataError: The template can't render it, or rewrites a turn so that what to train on can't be told.
    """
    renderer = _Renderer(tokenizer, template)
    ids = renderer.render(messages)
    spans = []
    for turn, message in enumerate(messages):
        if is_learned(message):
            start = renderer.find_start(ids, messages, turn)
            end = renderer.find_end(ids, messages, turn, start)
            check_spelling(ids[start:end], message["content"].strip(), tokenizer)
            spans.append((start, end))
    if spans and spans[-1][1] == len(ids) and not renderer.has_control_token(ids[slice(*spans[-1])]):
        ids = [*ids, get_eos_id(tokenizer)]
        spans[-1] = (spans[-1][0], len(ids))
    bos = renderer.missing_bos(ids)
    return build_example([*bos, *ids], [(start + len(bos), end + len(bos)) for start, end in spans])


def encode_chat_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> list[int]:
    """Encode a conversation up to where the assistant answers: the prefix that training shows before that turn."""
    renderer = _Renderer(tokenizer, template)
    ids = renderer.render(messages, is_prompt=True)
    return [*renderer.missing_bos(ids), *ids]


def find_turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """Return the control token that ends an assistant's turn; None where the template writes none behind it."""
    try:
        return _Renderer(tokenizer, template).find_end_id(_SAMPLE_CHAT[:1])
    except DataError:  # It renders other conversations than this one.
        return None


def _with_arguments_as_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls have arguments as templates expect them; in OpenAI's files they are JSON in a text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        called: Any = call.get("function") if isinstance(call, Mapping) else None
        try:
            calls.append({**call, "function": {**called, "arguments": json.loads(called["arguments"])}})
        except (ValueError, TypeError, KeyError):
            calls.append(call)
    return {**message, "tool_calls": calls}


@dataclass(frozen=True)
class _Renderer:
    """Renders conversations with one tokenizer and one template, and finds turns in what was rendered."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    def render(self, messages: Sequence[Message], *, is_prompt: bool = False) -> list[int]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                [_with_arguments_as_objects(message) for message in messages],
                tools=messages[0].get("tools"),
                chat_template=self.template or choose_chat_template(self.tokenizer),
                add_generation_prompt=is_prompt,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
                tokenizer_kwargs={"verbose": False},
            )
        except (TemplateError, ValueError, TypeError, ArithmeticError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template can't render this conversation (roles {roles}): {clause(error)}."
            ) from error
        return list(encoded["input_ids"])

    def missing_bos(self, ids: Sequence[int]) -> list[int]:
        """Return the begin-of-text id unless the template wrote it already."""
        bos = get_bos_ids(self.tokenizer)
        return [] if list(ids[: len(bos)]) == bos else bos

    def find_start(self, ids: list[int], messages: Sequence[Message], turn: int) -> int:
        prompt = self.render(messages[:turn], is_prompt=True)
        if ids[: len(prompt)] != prompt:
            raise self._refuse_prefix(ids, prompt, turn + 1)
        return len(prompt)

    def _refuse_prefix(self, ids: Sequence[int], prompt: Sequence[int], number: int) -> DataError:
        """Return what to say of a turn with which what comes before it has other tokens than without."""
        whole, before = decode_ids(ids, self.tokenizer), decode_ids(prompt, self.tokenizer)
        if whole.startswith(before):
            problem = f"the tokenizer makes one token of {before[-1:]!r}, by which the chat template ends what comes "
            problem += f"before turn {number}, and the first word of the turn"
            advice = "Set a data.chat_template in which the generation prompt ends without it"
        else:
            problem = f"the chat template renders what comes before turn {number} differently once the turn is there"
            advice = "Set another data.chat_template"
        return DataError(
            f"{problem}, so the model would learn from a prefix that it never sees later. {advice}, or drop the row."
        )

    def find_end(self, ids: list[int], messages: Sequence[Message], turn: int, start: int) -> int:
        """Return where a turn ends: as in the conversation cut after it, else at the first mark that ends a turn.

        Some templates (Qwen 3's) render the last turn differently from earlier ones, so cutting isn't always exact.
        """
        cut = self.render(messages[: turn + 1])
        if ids[: len(cut)] == cut:
            return len(cut)
        mark = self._find_turn_mark(messages[:turn])
        for end in range(start + len(mark), len(ids) + 1):
            if mark and ids[end - len(mark) : end] == mark:
                return end
        raise DataError(f"the chat template doesn't mark where turn {turn + 1} ends, so what to learn can't be told.")

    def _find_turn_mark(self, history: Sequence[Message]) -> list[int]:
        """Return the tokens that end an assistant turn: what two turns of different text have in common at the end."""
        first, second = (self.render([*history, {"role": "assistant", "content": text}])[::-1] for text in ("a", "b c"))
        common = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return [token for token, _ in common][::-1]

    def find_end_id(self, history: Sequence[Message]) -> int | None:
        """Return the first control token of the mark that ends an assistant turn."""
        return self._find_control_id(self._find_turn_mark(history))

    def has_control_token(self, ids: Sequence[int]) -> bool:
        """Whether some token is one that plain text can't produce, such as <|im_end|>."""
        return self._find_control_id(ids) is not None

    def _find_control_id(self, ids: Sequence[int]) -> int | None:
        added = self.tokenizer.added_tokens_decoder.items()  # Some tokenizers add runs of spaces.
        control = {*self.tokenizer.all_special_ids, *(id for id, token in added if not token.content.isspace())}
        return next((token for token in ids if token in control), None)


def _shorten(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]
