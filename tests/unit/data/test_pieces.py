import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolora.config.data import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.pieces import goes_on, join_pieces, split_row
from smolora.data.preprocessing import encode_rows
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.selection import RowSelection

FMT = PromptFormat(kind="text", columns={"text": "text"})


@given(st.text(alphabet="ab \n\t", max_size=20).filter(str.strip), st.integers(1, 4))
def test_pieces_of_a_text_join_to_it_again(text, size):
    pieces = split_row(Row({"text": text, "title": "t"}, "a", 1), "text", size)
    report = DataReport()
    assert join_pieces(pieces, "text", report) == [text.strip()]
    assert report.joined == len(pieces) - 1
    assert {(piece.values["title"], piece.origin) for piece in pieces} == {("t", "a:1")}


def test_pieces_between_tokens_join_to_the_text_again(tokenizer):
    text = "The cat sat on the mat.\n\n  It sat."
    assert join_pieces(split_row(Row({"text": text}, "a", 1), "text", 3, tokenizer), "text", DataReport()) == [text]


def test_a_text_ends_with_a_piece_whose_next_one_is_missing():
    (a, b, c), (d, e) = (split_row(Row({"text": text}, "f", 1), "text", 1) for text in ("a b c", "d e"))
    assert join_pieces([a, c, d, e], "text", DataReport()) == ["a", "c", "d e"]
    assert join_pieces([a, b, d, e], "text", DataReport()) == ["a b", "d e"]
    assert join_pieces([b, e], "text", DataReport()) == ["b", "e"]


def test_a_piece_that_is_cut_again_goes_on_where_it_did():
    [whole] = split_row(Row({"text": "a b", "space_to_next": "\n"}, "a", 1), "text", 2)
    first, last = split_row(whole, "text", 1)
    assert (first.values["space_to_next"], last.values["space_to_next"]) == (" ", "\n")


def test_a_piece_of_a_text_becomes_a_row_of_the_tokens_that_were_asked_for_at_most(tokenizer):
    rows = [Row({"text": "The cat sat on the mat: hello, and then the cat ran away. " * 9}, "a", 1)]
    selection = RowSelection(FMT, DataConfig(chunk_size=16), DataReport(), tokenizer)
    dataset = encode_rows(
        list(selection.select(rows, set())), FMT, tokenizer, data=DataConfig(), context=16, report=DataReport()
    )
    assert max(dataset.lengths) in (15, 16)


@pytest.mark.parametrize(
    ("values", "does"),
    [({"space_to_next": ""}, True), ({"space_to_next": None}, False), ({"space_to_next": "far"}, False), ({}, False)],
)
def test_what_goes_on_says_so_with_white_space_or_nothing(values, does):
    assert goes_on(values) is does
