"""Files to rows: txt, csv (with commas, semicolons or tabs), jsonl, json, plain or packed; parquet and arrow.

A record that can't be used becomes a Reject with its line and reason, and the rest is read on; a file whose records
can't be told apart (a duplicate header, an unterminated quote) is a DataError. No reader guesses, none drops a record.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from smolora.config.data import FileType
from smolora.data.arrow_files import iter_arrow, iter_parquet
from smolora.data.rows import Reject, Row, check_values, find_broken_character, find_column, list_columns
from smolora.data.squad import is_squad, iter_questions
from smolora.errors import DataError, StorageError, count_of, did_you_mean, suggest_path

Read = Iterator[Row | Reject]

END_OF_DOCUMENT = "<|endoftext|>"
"""A line of a text file that holds nothing else separates documents; it is never part of the text."""

_LONGEST_FIELD = 2**31 - 1
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PACKING_MARKS = {b"\x1f\x8b": ".gz", b"\xfd7": ".xz"}
"""First bytes that no text has; bzip2's are letters."""

_UNPACKERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def read_txt_folder(folder: str | Path) -> list[str]:
    """Return the contents of every .txt, .text and .md file under `folder`, at any depth, in bytewise order of paths.

    Hidden files and those that hold only white space are left out.
    """
    texts = [_read_text(path) for path in list_files(Path(folder)) if infer_type(path) == "txt"]
    return [text for text in texts if text.strip()]


def read_csv(path: str | Path, text_field: str = "text") -> list[str]:
    """Return one column of a csv file, a text per row."""
    return _read_column(Path(path), "csv", text_field)


def read_jsonl(path: str | Path, text_field: str = "text") -> list[str]:
    """Return one field of a file with a JSON object per line, a text per row."""
    return _read_column(Path(path), "jsonl", text_field)


def read_rows(path: Path, file_type: FileType) -> list[Row | Reject]:
    """Read every record of a file; see `iter_rows`."""
    return list(iter_rows(path, file_type))


def iter_rows(path: Path, file_type: FileType) -> Read:
    """Read a file record by record, holding no more than one (a json file: than all).

    Raises:
        DataError: The file is missing, isn't a regular file, or can't be told apart into records.
    """
    if file_type not in _READERS:
        raise DataError(
            f"no reader for {file_type!r}.{did_you_mean(file_type, _READERS)} Types: {', '.join(_READERS)}."
        )
    check_readable(path)
    return _READERS[file_type](path)


def read_columns(path: Path, file_type: FileType) -> list[str]:
    """Return the columns of all rows of a file, in the order they first appear.

    Lines of JSON are read for their keys alone, at a third of the time that rows take; what is wrong with a line is for
    `iter_rows` to say.

    Raises:
        DataError: A name can't be read.
    """
    columns = _read_keys(path) if file_type == "jsonl" else list_columns(iter_rows(path, file_type))
    _check_names(columns, path)
    return columns


def _check_names(names: Iterable[str], path: Path) -> None:
    for name in names:
        if problem := find_broken_character(name):
            raise DataError(f"{path}: the name of column {name!r} can't be read: {problem}.")


def _read_keys(path: Path) -> list[str]:
    columns: dict[str, None] = {}
    with open_text(path) as file:
        for line in file:
            try:
                value = _decode_line(line, _PLAIN_DECODER)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and not value.keys() <= columns.keys():
                columns |= dict.fromkeys(value)
    return list(columns)


def read_documents(path: Path) -> list[Row | Reject]:
    """Read a text file whole, as one document, or several where lines of `<|endoftext|>` separate them."""
    documents: list[Row | Reject] = []
    lines: list[str] = []
    first = 1
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip() == END_OF_DOCUMENT:
                documents.append(check_values({"text": "".join(lines)}, str(path), first))
                lines, first = [], number + 1
            else:
                lines.append(line)
    return [*documents, check_values({"text": "".join(lines)}, str(path), first)]


def infer_type(path: Path) -> FileType | None:
    """Return the type that a file's name promises, compressed or not; None for an unknown one."""
    return _TYPES_BY_SUFFIX.get(find_suffix(path))


def find_suffix(path: Path) -> str:
    """Return the suffix of a file's name, or of the name that it has once it is unpacked."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in _UNPACKERS else suffix


def list_files(folder: Path) -> list[Path]:
    """Return the regular files under `folder`, at any depth, in bytewise order of their paths.

    What is hidden, a file or a folder whose name begins with a dot, is left out. A link to a folder is followed, but a
    folder that several paths lead to, as where links go round, is read once.

    Raises:
        StorageError: A folder may not be read.
    """

    def refuse(error: OSError) -> None:  # Left to itself, os.walk passes over what it may not open.
        raise _refuse_reading(Path(error.filename)) from error

    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]  # A FIFO would hang at opening.
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open UTF-8 text, plain or compressed, without its byte-order mark and with line ends as they are.

    Bytes that aren't UTF-8 become lone surrogates, which `check_values` turns into a reject of their own row.

    Raises:
        DataError: The file can't be opened or unpacked, is packed under another name, or is UTF-16.
    """
    check_readable(path)
    opener = _UNPACKERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            start = file.read(2).encode("utf-8", "surrogateescape")
            if packing := _PACKING_MARKS.get(start):
                raise DataError(f"{path} is packed, and its name doesn't say so. Let it end in {packing}.")
            if b"\0" in start or start in _UTF16_MARKS:
                raise DataError(f"{path} is UTF-16 text, or no text at all. Save it as UTF-8.")
            file.seek(0)
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"can't read {path}: {error}. The file may be damaged or cut; copy it again.") from error


def check_readable(path: Path) -> None:
    """Raise unless `path` is a regular file that may be read.

    Raises:
        DataError: There is no such file, or it is a folder or a pipe.
        StorageError: The permission is missing.
    """
    if not path.exists():
        raise DataError(f"no such file: {path}.{suggest_path(path)}")
    if not os.access(path, os.R_OK):
        raise _refuse_reading(path)
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, where a file was expected.")


def _refuse_reading(path: Path) -> StorageError:
    return StorageError(f"can't read {path}: permission denied. Have yourself given the right, or name another copy.")


def _read_text(path: Path) -> str:
    with open_text(path) as file:
        found = check_values({"text": file.read()}, str(path), 1)
    return str(_raise_on_reject(found).values["text"])


def _read_column(path: Path, file_type: FileType, text_field: str) -> list[str]:
    rows = [_raise_on_reject(found) for found in read_rows(path, file_type)]
    column = find_column(text_field, list_columns(rows))
    return [str(row.values[column]) for row in rows if row.values.get(column) is not None]


def _raise_on_reject(found: Row | Reject) -> Row:
    if isinstance(found, Reject):
        raise DataError(f"{found.file}:{found.line}: {found.reason}. Repair the line, or read it with max_rejects set.")
    return found


def _iter_txt(path: Path) -> Read:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            yield check_values({"text": "" if text.strip() == END_OF_DOCUMENT else text}, str(path), number)


def _iter_csv(path: Path) -> Read:
    with open_text(path) as file, _long_fields():
        lines: list[str] = []
        # strict: without it, text after a closing quote and a quote that never closes are read as if they were meant.
        reader = csv.reader(_keep_lines(file, lines), strict=True, delimiter=_find_delimiter(file, path))
        header = _read_header(reader, path)
        while True:
            lines.clear()
            first_line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error) or "".join(lines).count('"') % 2:
                    raise DataError(
                        f"{path}:{first_line}: a quote opened in this row isn't closed in it, so the rest of the file "
                        "can't be told apart. Close the quote, or double it where it is text."
                    ) from None
                yield Reject(str(path), first_line, f"malformed csv: {error}")
                continue
            yield _match_header(fields, header, path, first_line)


def _keep_lines(file: TextIO, lines: list[str]) -> Iterator[str]:
    """Yield the lines of a file, and put each into `lines`."""
    for line in file:
        lines.append(line)
        yield line


def _find_delimiter(file: TextIO, path: Path) -> str:
    """Return the first of the usual delimiters that the header has outside of quotes; a comma where it has none."""
    header = _QUOTED.sub("", file.readline())
    file.seek(0)
    usual = "\t,;" if find_suffix(path) == ".tsv" else ",;\t"
    return next((delimiter for delimiter in usual if delimiter in header), ",")


_QUOTED = re.compile(r'"[^"]*"?')


def _read_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is malformed: {error}.") from None
    _check_names(header, path)
    duplicates = sorted({name for name in header if header.count(name) > 1})
    if duplicates:
        listed = ", ".join(map(repr, duplicates))
        raise DataError(f"{path}:1: the header names {listed} more than once, so the column meant can't be told.")
    return header


def _match_header(fields: list[str], header: list[str], path: Path, line: int) -> Row | Reject:
    if not fields:  # A blank line.
        return Row({}, str(path), line)
    if len(fields) != len(header):
        return Reject(str(path), line, f"{count_of(len(fields), 'field')}, but the header has {len(header)}")
    return check_values(dict(zip(header, fields, strict=True)), str(path), line)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a field, which is global to the process, for a while."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _iter_jsonl(path: Path) -> Read:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                yield Row({}, str(path), number)
                continue
            try:
                value = _decode_line(line, _DECODER)
            except (ValueError, RecursionError) as error:
                yield Reject(str(path), number, f"malformed JSON: {error}")
                continue
            yield _check_object(value, path, number)


def _decode_line(line: str, decoder: json.JSONDecoder) -> object:
    """Return what `decoder.decode` does, without its two regular expressions, which take as long as a short row."""
    text = line.rstrip(_JSON_SPACE)
    value, end = decoder.raw_decode(text, len(text) - len(text.lstrip(_JSON_SPACE)))
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(text[end:].lstrip(_JSON_SPACE)))
    return value


def _iter_json(path: Path) -> Read:
    values = _load_json(path)
    if is_squad(values):
        try:
            values = list(iter_questions(values))
        except DataError as error:
            raise DataError(f"{path}: {error}.") from error
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, found {type(values).__name__}.")
    for number, value in enumerate(values, start=1):
        yield _check_object(value, path, number)


def _load_json(path: Path) -> Any:
    """Return what a file holds; an empty one holds no rows."""
    with open_text(path) as file:
        text = file.read()
    try:
        return json.loads(text, object_pairs_hook=_unique_keys) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is malformed JSON: {error}. Is it one object a line? Then its type is jsonl."
        ) from error


def _check_object(value: object, path: Path, number: int) -> Row | Reject:
    if not isinstance(value, dict):
        return Reject(str(path), number, f"expected a JSON object, found {type(value).__name__}")
    return check_values(value, str(path), number)


def _unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found


_JSON_SPACE = " \t\n\r"
_PLAIN_DECODER = json.JSONDecoder()
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
"""Made once: json.loads makes one for every line, which takes as long as reading it."""


_READERS: dict[FileType, Callable[[Path], Read]] = {
    "txt": _iter_txt,
    "csv": _iter_csv,
    "jsonl": _iter_jsonl,
    "json": _iter_json,
    "parquet": iter_parquet,
    "arrow": iter_arrow,
}

_TYPES_BY_SUFFIX: dict[str, FileType] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
