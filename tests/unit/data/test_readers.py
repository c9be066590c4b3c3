import bz2
import csv
import gzip
import json
import lzma
import os
import re
import sys

import pyarrow as pa
import pytest

from smolora.data.readers import (
    infer_type,
    list_files,
    read_columns,
    read_csv,
    read_documents,
    read_jsonl,
    read_rows,
    read_txt_folder,
)
from smolora.data.rows import Reject, Row
from smolora.errors import DataError


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def values(found):
    return [row.values for row in found if isinstance(row, Row)]


def rejects(found):
    return [(reject.line, reject.reason) for reject in found if isinstance(reject, Reject)]


def test_a_folder_of_text_is_read_at_any_depth_in_bytewise_order(tmp_path, write):
    for name in ("b.txt", "a/z.txt", "B.txt", "é.txt", "a.txt", "skip.csv", "empty.txt"):
        write(name, "" if name == "empty.txt" else name)
    write(".c.txt", "hidden")
    assert read_txt_folder(tmp_path) == ["B.txt", "a.txt", "a/z.txt", "b.txt", "é.txt"]


def test_a_linked_folder_is_read_once_however_many_paths_lead_to_it(tmp_path, write):
    write("real/b.txt", "linked")
    write("data/a.txt", "own")
    for name, target in {"more": "real", "again": "real", "loop": "data"}.items():
        (tmp_path / "data" / name).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data", target_is_directory=True)
    assert list_files(tmp_path / "data") == [tmp_path / "data" / "a.txt", tmp_path / "data" / "again" / "b.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no FIFOs")
def test_a_fifo_is_not_opened(tmp_path, write):
    write("a.txt", "text")
    os.mkfifo(tmp_path / "b.txt")
    assert read_txt_folder(tmp_path) == ["text"]
    with pytest.raises(DataError, match="no regular file"):
        read_rows(tmp_path / "b.txt", "txt")


def test_txt_is_a_row_per_line_and_keeps_its_line_number(write):
    found = read_rows(write("a.txt", "one\r\n\r\n  two\u2028still two\n<|endoftext|>\n"), "txt")
    assert values(found) == [{"text": "one"}, {"text": ""}, {"text": "  two\u2028still two"}, {"text": ""}]
    assert [row.line for row in found] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["<|endoftext|>", " <|endoftext|> "])
def test_a_line_that_ends_a_document_is_no_row_and_parts_texts_that_are_read_whole(write, line):
    path = write("a.txt", f"one\n{line}\ntwo\n")
    assert values(read_rows(path, "txt")) == [{"text": "one"}, {"text": ""}, {"text": "two"}]
    assert values(read_documents(path)) == [{"text": "one\n"}, {"text": "two\n"}]


def test_documents_are_whole_files_split_where_a_line_marks_the_end(write):
    found = read_documents(write("a.txt", "one\r\n\n  two\n<|endoftext|>\nthree <|endoftext|> four"))
    assert values(found) == [{"text": "one\r\n\n  two\n"}, {"text": "three <|endoftext|> four"}]
    assert [row.line for row in found] == [1, 5]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_read_as_plain_ones(write, suffix, pack):
    path = write(f"a.jsonl{suffix}", pack(b'{"text": "one"}\n'))
    assert infer_type(path) == "jsonl"
    assert read_jsonl(path) == ["one"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", b"text\nnot packed"),
        ("b.csv.gz", gzip.compress(b"text\n" * 999)[:-20]),
        ("c.csv.bz2", b"text\nno"),
        ("d.csv.xz", b"text\nno"),
    ],
    ids=[
        "not packed",
        "cut off",
        "not packed by bzip2",
        "not packed by xz",
    ],  # An archive holds the time: every process would name it anew.
)
def test_a_damaged_archive_is_named(write, name, content):
    with pytest.raises(DataError, match=f"can't read .*{name}"):
        read_rows(write(name, content), "csv")


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_a_packed_file_under_a_plain_name_is_refused_with_the_name_it_needs(write, pack, suffix):
    with pytest.raises(DataError, match=rf"is packed, and its name doesn't say so. Let it end in {suffix}"):
        read_rows(write("a.csv", pack(b"text\none\n")), "csv")


def test_a_byte_order_mark_is_no_part_of_the_first_column(write):
    assert read_csv(write("a.csv", b"\xef\xbb\xbftext,x\none,1\n")) == ["one"]
    assert read_jsonl(write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n')) == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_what_to_do(write, encoding):
    with pytest.raises(DataError, match=r"is UTF-16 text, or no text at all\. Save it as UTF-8"):
        read_rows(write("a.csv", "text\none\n".encode(encoding)), "csv")


def test_a_text_with_nul_is_rejected_and_the_rest_read(write):
    found = read_rows(write("a.txt", b"one\nt\0wo\nthr\xc3\xa9\0e\n"), "txt")
    reason = "column 'text', character {}: U+0000 is in no text (if the file is UTF-16, save it as UTF-8)"
    assert rejects(found) == [(2, reason.format(1)), (3, reason.format(4))]
    assert len(found) == 3


def test_nul_inside_a_list_is_told_from_the_text_that_spells_its_escape(write):
    rows = [{"tags": [{"a": text}]} for text in ("x\0", "\\\0", r"\u0000", r"\\u0000")]
    found = read_rows(write("a.jsonl", "\n".join(map(json.dumps, rows))), "jsonl")
    assert [line for line, _ in rejects(found)] == [1, 2]


def test_a_line_that_is_no_utf_8_is_rejected_and_the_rest_read(write):
    found = read_rows(write("a.txt", b"one\ntw\xffo\nthree\n"), "txt")
    reason = "column 'text', character 2: byte 0xff is no UTF-8 (if the file is in another encoding, save it as UTF-8)"
    assert rejects(found) == [(2, reason)]
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "id,größe\n1,2\n".encode("cp1252")), ("a.jsonl", '{"größe": 1}'.encode("latin-1"))],
)
def test_a_column_whose_name_is_no_utf_8_is_named(write, name, content):
    with pytest.raises(DataError, match=r"the name of column 'gr\\udcf6\\udcdfe' can't be read: .*save it as UTF-8"):
        read_columns(write(name, content), name.partition(".")[2])


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.csv", "id;question\n1;a, b\n", {"id": "1", "question": "a, b"}),
        ("a.csv", "id\tquestion\n1\ta; b\n", {"id": "1", "question": "a; b"}),
        ("a.csv", '"a, b";c\n1;2\n', {"a, b": "1", "c": "2"}),
        ("a.csv", "id,a;b\n1,c;d\n", {"id": "1", "a;b": "c;d"}),
        ("a.csv", "text\na;b\n", {"text": "a;b"}),
        ("a.tsv", 'id\ta, b\n1\t"c\td"\n', {"id": "1", "a, b": "c\td"}),
    ],
)
def test_the_header_says_what_parts_the_columns(write, name, content, row):
    path = write(name, content)
    assert values(read_rows(path, infer_type(path))) == [row]


def test_a_column_is_matched_without_regard_to_case(write):
    assert read_csv(write("a.csv", "MR,Text\n1,one\n"), "text") == ["one"]


def test_a_missing_column_is_an_error_and_never_no_rows(write):
    with pytest.raises(DataError, match=r"no column 'text'.*'txt', 'b'"):
        read_csv(write("a.csv", "txt,b\none,1\n"))


def test_line_ends_inside_quotes_stay_as_they_are(write):
    found = read_rows(write("a.csv", 'text\n"one\r\ntwo"\n\nthree\n'), "csv")
    assert values(found) == [{"text": "one\r\ntwo"}, {}, {"text": "three"}]
    assert [row.line for row in found] == [2, 4, 5]


def test_a_long_field_is_read_and_the_limit_of_csv_put_back(write):
    before = csv.field_size_limit()
    assert read_csv(write("a.csv", "text\n" + "x" * 200_000 + "\n")) == ["x" * 200_000]
    assert csv.field_size_limit() == before


def test_a_duplicate_header_is_fatal(write):
    with pytest.raises(DataError, match="header names 'text' more than once"):
        read_rows(write("a.csv", "text,id,text\n1,2,3\n"), "csv")


def test_an_unterminated_quote_is_fatal_and_says_where_it_opened(write):
    with pytest.raises(DataError, match=r"a\.csv:3: a quote opened"):
        read_rows(write("a.csv", 'text\none\n"two\nthree\n'), "csv")


def test_a_malformed_row_whose_end_cannot_be_told_is_fatal_and_leaves_no_rest_of_it(write):
    path = write("a.csv", 'text,label\nfine,1\n"a "quoted" word\nsecond line",1\nok,2\n')
    with pytest.raises(DataError, match=r"a\.csv:3: a quote opened in this row isn't closed in it"):
        read_rows(path, "csv")


def test_a_row_with_another_number_of_fields_is_rejected(write):
    found = read_rows(write("a.csv", "a,b\n1,2\n1\n1,2,3\n"), "csv")
    assert rejects(found) == [(3, "1 field, but the header has 2"), (4, "3 fields, but the header has 2")]


def test_text_after_a_closing_quote_is_rejected(write):
    found = read_rows(write("a.csv", 'text\n"one" two\nthree\n'), "csv")
    assert [line for line, _ in rejects(found)] == [2]
    assert values(found) == [{"text": "three"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{bad", "malformed JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"text": "a", "text": "b"}', "'text' appears twice"),
        ('{"text": "\\ud800"}', "U\\+D800 is half a pair"),
        ('{"messages": [{"content": "\\udfff"}]}', "column 'messages'"),
        ("[" * 100_000, "malformed JSON"),
        (' {"text": "a"} b', r"malformed JSON: Extra data: line 1 column 16 \(char 15\)"),
        ('\u00a0{"text": "a"}', "malformed JSON: Expecting value"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number_and_the_rest_read(write, line, reason):
    found = read_rows(write("a.jsonl", f'{{"text": "one"}}\n{line}\n{{"text": 3}}\n'), "jsonl")
    assert values(found) == [{"text": "one"}, {"text": 3}]
    [(number, text)] = rejects(found)
    assert number == 2
    assert re.search(reason, text)


def test_white_space_around_an_object_is_no_fault(write):
    path = write("a.jsonl", '\t {"text": "one"} \r\n  {"more": "two"}')
    assert values(read_rows(path, "jsonl")) == [{"text": "one"}, {"more": "two"}]
    assert read_columns(path, "jsonl") == ["text", "more"]


def test_a_blank_line_of_jsonl_is_a_row_without_values(write):
    assert values(read_rows(write("a.jsonl", '{"a": 1}\n\n'), "jsonl")) == [{"a": 1}, {}]


def test_an_empty_json_file_has_no_rows(write):
    assert read_rows(write("a.json", "\n"), "json") == []


def test_a_json_file_is_a_list_of_objects(write):
    found = read_rows(write("a.json", json.dumps([{"text": "one"}, 3])), "json")
    assert values(found) == [{"text": "one"}]
    assert rejects(found) == [(2, "expected a JSON object, found int")]


@pytest.mark.parametrize(
    ("content", "message"), [('{"a": 1}', "must hold a list"), ('{"a": 1}\n{"a": 2}', "its type is jsonl")]
)
def test_another_json_file_is_refused(write, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write("a.json", content), "json")


def test_parquet_is_read(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert values(read_rows(tmp_path / "a.parquet", "parquet")) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_is_read_as_a_stream_and_as_a_file(tmp_path, kind):
    table = pa.table({"text": ["one", "two", "three"]})
    with kind(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    found = read_rows(tmp_path / "a.arrow", "arrow")
    assert [(row.values["text"], row.line) for row in found] == [("one", 1), ("two", 2), ("three", 3)]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_numbered_labels_of_a_saved_dataset_are_called_by_their_names(tmp_path, kind):
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]), tags=List(ClassLabel(names=["O"])))
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1], "tags": [[0], []]}, features=features)
    (dataset.to_parquet if kind == "parquet" else dataset.save_to_disk)(tmp_path / "a.parquet")
    [file] = [tmp_path / "a.parquet"] if kind == "parquet" else (tmp_path / "a.parquet").glob("*.arrow")
    expected = [{"text": "a", "label": "yes", "tags": ["O"]}, {"text": "b", "label": -1, "tags": []}]
    assert values(read_rows(file, kind)) == expected


@pytest.mark.parametrize("metadata", [None, {b"huggingface": b"?"}, {b"huggingface": b'{"info": {"features": null}}'}])
def test_a_table_without_names_of_labels_keeps_its_numbers(tmp_path, metadata):
    table = pa.table({"label": [1]}).replace_schema_metadata(metadata)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert values(read_rows(tmp_path / "a.arrow", "arrow")) == [{"label": 1}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_of_columns_is_named(write, kind):
    with pytest.raises(DataError, match=rf"can't read .*a\.{kind}: .*[^.]\. The file may be damaged"):
        read_rows(write(f"a.{kind}", "nothing of the kind"), kind)


def test_the_promised_readers_name_the_line_they_can_not_use(write):
    with pytest.raises(DataError, match=r"a\.jsonl:2: malformed JSON"):
        read_jsonl(write("a.jsonl", '{"text": "one"}\n{\n'))


def test_a_missing_file_and_an_unknown_type_are_named(tmp_path, write):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "no.txt", "txt")
    with pytest.raises(DataError, match=r"no reader for 'cvs'. Did you mean 'csv'\?"):
        read_rows(write("a", ""), "cvs")
