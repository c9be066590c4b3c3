"""Token ids of an answer to its text, whole or piece by piece, with the same result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_ANCHOR_TOKENS = 32
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def iter_pieces(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Iterable[int]
) -> Iterator[str]:
    """Yield the answer's text as its tokens come, holding a character back until all its bytes are there.

    What came before stays in front of every decoding and is cut off the text: alone, the first token of a SentencePiece
    answer would lose its space. It is the end of the prompt, and later of the answer, from the end of a piece on.
    """
    ids = list(prompt_ids[-_ANCHOR_TOKENS:])
    shown = text = _decode(tokenizer, ids)
    num_anchoring = 0  # All of them: the first cut is to be where a piece has ended.
    for token_id in answer_ids:
        ids.append(token_id)
        text = _decode(tokenizer, ids)
        if len(text) > len(shown) and not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
            if len(ids) - num_anchoring >= _ANCHOR_TOKENS:
                ids = ids[num_anchoring:]
                shown = text = _decode(tokenizer, ids)
                num_anchoring = len(ids)
    if len(text) > len(shown):
        yield text[len(shown) :]


def decode_answer(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """Return what `iter_pieces` yields, joined; with one decoding instead of one a token wherever that is the same."""
    anchor = list(prompt_ids[-_ANCHOR_TOKENS:])
    text = _decode(tokenizer, [*anchor, *answer_ids])
    if _UNFINISHED in text:  # Bytes that spell no character: what they become depends on which came together.
        return "".join(iter_pieces(tokenizer, prompt_ids, answer_ids))
    return text[len(_decode(tokenizer, anchor)) :]


def cut_at_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the text up to the first of `stops`, holding back what may turn out to be the beginning of one.

    >>> list(cut_at_stop(["one t", "wo three"], ["two"]))
    ['one ']
    """
    held = ""
    for piece in pieces:
        held += piece
        if found := [held.index(stop) for stop in stops if stop in held]:
            held = held[: min(found)]
            break
        begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if shown := held[: len(held) - begun]:
            yield shown
        held = held[len(shown) :]
    if held:
        yield held


def ends_at_stop(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int], stops: Sequence[str]
) -> bool:
    """Return whether one of `stops` is in the text of the last tokens: as many as it may take to spell the longest."""
    count = 4 * max(map(len, stops))  # A token is at least a byte of UTF-8.
    text = decode_answer(tokenizer, [*prompt_ids, *answer_ids[:-count]], answer_ids[-count:])
    return any(stop in text for stop in stops)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
