"""Rows that are pieces of a longer text: what they are cut into, what says that they go on, and how they are joined.

A piece that goes on has a column more, `space_to_next`: the white space between it and the next one, which neither of
them holds. The last piece of a text has none, so it alone is ended when it is learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from smolora.data.encoding import encode_continuation, encode_texts, get_bos_ids
from smolora.data.ledger import DataReport
from smolora.data.pipeline import chunk_texts
from smolora.data.rows import Row, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_TO_NEXT = "space_to_next"


def goes_on(values: Values) -> bool:
    """Whether the text of a row doesn't end with it, but goes on in another piece."""
    space = values.get(SPACE_TO_NEXT)
    return isinstance(space, str) and not space.strip()


def split_row(row: Row, column: str, size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Row]:
    """Return a row for each piece of the text in `column`, as `chunk_texts` cuts it."""
    text = str(row.values[column])
    pieces = chunk_texts([text], size, tokenizer=tokenizer)
    rows, start = [], text.index(pieces[0])
    for piece, following in pairwise(pieces):
        end = start + len(piece)
        start = text.index(following, end)
        rows.append(row._replace(values={**row.values, column: piece, SPACE_TO_NEXT: text[end:start]}))
    return [*rows, row._replace(values={**row.values, column: pieces[-1]})]


def count_added_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a piece gets beside its own: begin and end, and SentencePiece's space before a text."""
    space = len(encode_texts(["\n"], tokenizer)[0]) - len(encode_continuation("\n", tokenizer))
    return len(get_bos_ids(tokenizer)) + 1 + space


def join_pieces(rows: Iterable[Row], column: str, report: DataReport) -> list[str]:
    """Return the texts of rows, those of pieces that follow each other as one; the report counts what was joined.

    Pieces of two files aren't joined where a text's last piece was dropped, as a duplicate is.
    """
    texts: list[list[str]] = []
    open_in: str | None = None
    for row in rows:
        if row.file == open_in:
            report.joined += 1
        else:
            texts.append([])
        texts[-1].append(str(row.values[column]))
        open_in = row.file if goes_on(row.values) else None
        if open_in is not None:
            texts[-1].append(str(row.values[SPACE_TO_NEXT]))
    return ["".join(parts) for parts in texts]
