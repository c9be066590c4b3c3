"""Text to token ids, the same way in training and inference.

Text is always data: a text that spells a control token is encoded as ordinary characters. Special tokens are added by
the callers, on purpose: `get_bos_ids` says what the tokenizer's habit is, `get_eos_id` what ends a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolora.data.token_dataset import Example, build_example
from smolora.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_ANCHORS = ("\n", "a", ".")


def get_bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin-of-text id, as a list of one, where the tokenizer puts it before a text; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def get_eos_id(tokenizer: PreTrainedTokenizerBase, end_token: str | None = None) -> int:
    """Return the id that ends a text: that of `end_token`, else the tokenizer's end-of-text.

    Raises:
        ModelError: The tokenizer has none, so a model could never learn to stop.
    """
    if end_token is not None:
        return int(tokenizer.convert_tokens_to_ids(end_token))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token (eos_token), so a model could not learn to stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each text, with no special token added and none read from the text.

    Raises:
        DataError: A text holds half of a surrogate pair.
    """
    _refuse_surrogates(texts)
    if not texts:
        return []
    # verbose=False: how long a text may be is checked by us, for the whole example.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def encode_with_template(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    with_offsets: bool = False,
) -> BatchEncoding:
    """Encode texts, or pairs of them, in the tokenizer's own template, such as [CLS] a [SEP] b [SEP].

    What spells a special token in a text stays text. `token_type_ids` are there where the tokenizer has them.

    Args:
        texts: The first, or only, texts.
        tokenizer: The model's.
        pairs: The second texts.
        limit: Cut to so many tokens, the template's included; of a pair the longer text, token by token.
        with_offsets: Return `offset_mapping` too: the characters that each token stands for.

    Raises:
        DataError: A text holds half of a surrogate pair.
        ModelError: Offsets are asked of a tokenizer that has none.
    """
    _refuse_surrogates([*texts, *(pairs or ())])
    if with_offsets and not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} doesn't tell where its tokens are. Use a model with tokenizer.json."
        )
    return tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        truncation="longest_first" if limit is not None else False,
        max_length=limit,
        verbose=False,
    )


def encode_answers(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode what an encoder-decoder is to write, in the tokenizer's own template for that, with its end token.

    Raises:
        DataError: A text holds half of a surrogate pair.
        ModelError: The tokenizer has no end token.
    """
    _refuse_surrogates(texts)
    eos = get_eos_id(tokenizer)
    encoded = tokenizer(text_target=list(texts), split_special_tokens=True, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return [list(ids) if eos in ids else [*ids, eos] for ids in encoded]


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        if (half := find_surrogate(text)) is not None:
            raise DataError(
                f"a text holds {text[half]!r} at character {half}: half of a surrogate pair is no character."
            )


def find_surrogate(text: str) -> int | None:
    """Return where a text holds half of a surrogate pair, which no tokenizer can encode, or None.

    >>> find_surrogate("ab" + chr(0xD800))
    2
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, end_token: str | None = None
) -> list[Example]:
    """Encode (prompt, completion) pairs; the ids before the completion are exactly those of the prompt alone.

    The pair is encoded as one text where the tokenizer keeps the prompt's ids in it. Where it would merge across the
    seam, the completion is encoded by itself, so that training never shows a prefix that inference can't produce.

    Raises:
        DataError: The target tokens don't spell the completion.
    """
    bos, eos = get_bos_ids(tokenizer), get_eos_id(tokenizer, end_token)
    answers = [join_seam(prompt, completion) for prompt, completion in pairs]
    unique = list(dict.fromkeys(prompt for prompt, _ in pairs))  # One prompt often has several answers.
    ids_of = dict(zip(unique, encode_texts(unique, tokenizer), strict=True))
    wholes = encode_texts([prompt + answer for (prompt, _), answer in zip(pairs, answers, strict=True)], tokenizer)
    examples = []
    for (prompt, _), whole, answer in zip(pairs, wholes, answers, strict=True):
        prompt_ids = ids_of[prompt]
        if whole[: len(prompt_ids)] == prompt_ids:
            answer_ids = whole[len(prompt_ids) :]
        else:
            answer_ids = encode_continuation(answer, tokenizer)
        check_spelling(answer_ids, answer, tokenizer)
        ids = [*bos, *prompt_ids, *answer_ids, eos]
        examples.append(build_example(ids, [(len(bos) + len(prompt_ids), len(ids))]))
    return examples


def join_seam(prompt: str, completion: str) -> str:
    r"""Return the completion as it follows the prompt: one space in front where neither side has white space there.

    >>> join_seam("Q: 1+1", "2"), join_seam("Q: 1+1\n", "2"), join_seam("", "2")
    (' 2', '2', '2')
    """
    touches = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return f" {completion}" if touches else completion


def encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text that continues another one.

    SentencePiece puts a space before the first word of every text, which a continuation must not get: it is encoded
    behind an anchor, which is then cut off again.
    """
    for anchor in _ANCHORS:
        anchor_ids, anchored = encode_texts([anchor, anchor + text], tokenizer)
        if anchored[: len(anchor_ids)] == anchor_ids:
            return anchored[len(anchor_ids) :]
    return encode_texts([text], tokenizer)[0]


def decode_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what ids spell, special tokens included and no space tidied away."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check_spelling(ids: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless `ids` spell `text`, or what the tokenizer itself makes of it (some fold case or drop characters).

    Raises:
        DataError: They don't, so the wrong tokens would be trained on.
    """
    found = decode_ids(ids, tokenizer).strip()
    if text.strip() in found:
        return
    own = decode_ids(encode_texts([text], tokenizer)[0], tokenizer)
    if "".join(own.split()) not in "".join(found.split()):
        raise DataError(
            f"the tokens to train on spell {found[:200]!r} where {text[:200]!r} was meant, so the wrong text would be "
            "learned. The tokenizer or its chat template rewrites this row; change the row, or use another tokenizer."
        )
