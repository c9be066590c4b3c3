"""Rows that are pieces of a longer text: what they are cut into, what says that they go on, and how they are joined.

A piece that goes on has two columns more: `space_to_next`, the white space between it and the next one, which neither
of them holds, and `next_piece`, a digest of that one. The last piece of a text has none, so it alone is ended when it
is learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING

from smolora.data.encoding import encode_continuation, encode_texts, get_bos_ids
from smolora.data.ledger import DataReport
from smolora.data.pipeline import chunk_texts
from smolora.data.rows import Row, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_TO_NEXT, NEXT_PIECE = "space_to_next", "next_piece"
PIECE_COLUMNS = (SPACE_TO_NEXT, NEXT_PIECE)


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
        link = {SPACE_TO_NEXT: text[end:start], NEXT_PIECE: _digest(following)}
        rows.append(row._replace(values={**row.values, column: piece, **link}))
    return [*rows, row._replace(values={**row.values, column: pieces[-1]})]


def count_added_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a piece gets beside its own: begin and end, and SentencePiece's space before a text."""
    space = len(encode_texts(["\n"], tokenizer)[0]) - len(encode_continuation("\n", tokenizer))
    return len(get_bos_ids(tokenizer)) + 1 + space


def join_pieces(rows: Iterable[Row], column: str, report: DataReport) -> list[str]:
    """Return the texts of rows, a piece and the one it goes on in as one; the report counts what was joined.

    Where that one isn't the next row, since it was held out or dropped as a duplicate, the text ends with the piece.
    """
    texts: list[list[str]] = []
    space, expected = "", None
    for row in rows:
        text = str(row.values[column])
        if expected is not None and expected == _digest(text):
            report.joined += 1
            texts[-1] += [space, text]
        else:
            texts.append([text])
        space, expected = (str(row.values.get(name)) for name in PIECE_COLUMNS) if goes_on(row.values) else ("", None)
    return ["".join(parts) for parts in texts]


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
