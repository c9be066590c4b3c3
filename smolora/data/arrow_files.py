"""Tables of Arrow to rows: Parquet, and .arrow as `datasets` saves it (a stream of batches) or others do (a file).

Numbered labels are called by the names that `datasets` keeps in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config.data import FileType
from smolora.data.label_names import read_label_names, spell_labels
from smolora.data.rows import Reject, Row, check_values
from smolora.errors import DataError, clause

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

_FILE_MARK = b"ARROW1"
"""What a file of Arrow begins with, and a stream doesn't."""


def iter_parquet(path: Path) -> Iterator[Row | Reject]:
    """Read a Parquet file batch by batch.

    Raises:
        DataError: It can't be read.
    """
    from pyarrow import parquet

    with _named_errors(path, "parquet"), parquet.ParquetFile(path) as file:
        yield from _iter_rows(file.iter_batches(), path, file.schema_arrow)


def iter_arrow(path: Path) -> Iterator[Row | Reject]:
    """Read an .arrow file batch by batch.

    Raises:
        DataError: It can't be read.
    """
    with _open_arrow(path) as (schema, batches):
        yield from _iter_rows(batches, path, schema)


def read_names_in(path: Path, file_type: FileType) -> dict[str, Sequence[str]]:
    """Return what numbered labels are called, by column; nothing of a file of a type that can't say so.

    Raises:
        DataError: It can't be read.
    """
    if file_type == "arrow":
        with _open_arrow(path) as (schema, _):
            return read_label_names(schema.metadata)
    if file_type != "parquet":
        return {}
    from pyarrow import parquet

    with _named_errors(path, "parquet"):
        return read_label_names(parquet.read_schema(path).metadata)


@contextmanager
def _open_arrow(path: Path) -> Iterator[tuple[Schema, Iterable[RecordBatch]]]:
    import pyarrow as pa

    with _named_errors(path, "Arrow"), pa.OSFile(str(path)) as file:
        is_stream = file.read(len(_FILE_MARK)) != _FILE_MARK
        file.seek(0)
        if is_stream:
            stream = pa.ipc.open_stream(file)
            yield stream.schema, stream
        else:
            reader = pa.ipc.open_file(file)
            yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))


def _iter_rows(batches: Iterable[RecordBatch], path: Path, schema: Schema) -> Iterator[Row | Reject]:
    names = read_label_names(schema.metadata)
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield check_values(spell_labels(values, names), str(path), number)


@contextmanager
def _named_errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"can't read {path}: {clause(error)}. The file may be damaged or no {kind} file.") from error
