"""What a caller hands to a run in place of files: rows, held-out rows, and what encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolora.data.preprocessor import DataPreprocessor
from smolora.errors import ConfigError, DataError, clause

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MemoryRows:
    """Rows in memory, in place of those that the configuration names."""

    train: Dataset | None = None
    held_out: Dataset | None = None
    """Left out, those of `data.eval_source` are held out, or some of `train`."""
    preprocessor: DataPreprocessor | None = None
    """Encodes rows, in place of the task's own; its form gives way to that of the rows."""
    labels: tuple[str, ...] = ()
    """Those of a model that is measured on the rows; left out, they are the preprocessor's, or learned."""
    label_names: tuple[str, ...] = ()
    """What numbers in place of labels stand for in that model's rows, from 0 up."""

    def __post_init__(self) -> None:
        if self.held_out is not None and self.train is None:
            raise ConfigError(
                "eval_dataset goes with a dataset. To hold out rows beside those of data.sources, "
                "name them with data.eval_source."
            )

    @property
    def known_labels(self) -> tuple[str, ...]:
        """The labels that aren't learned from the rows."""
        return self.labels or (self.preprocessor.fmt.labels if self.preprocessor else ())


FROM_SOURCES = MemoryRows()
"""No rows in memory: those that the configuration names."""


def as_dataset(rows: Dataset | Iterable[Mapping[str, object]]) -> Dataset:
    """Return rows in memory as a dataset with the columns of all of them; what is a dataset already, as it is.

    Raises:
        DataError: They are no rows, or the values of a column have several types.
    """
    from datasets import Dataset
    from pyarrow import ArrowException

    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise _refuse_rows(type(rows).__name__)
    records = list(rows)
    for record in records:
        if not isinstance(record, Mapping):
            raise _refuse_rows(f"{type(record).__name__} in a {type(rows).__name__}")
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    try:
        return Dataset.from_dict(columns)
    except ArrowException as error:
        raise DataError(
            f"{_describe_mixture(columns)}the values of a column have one type: {clause(error)}."
        ) from error


def _refuse_rows(found: str) -> DataError:
    return DataError(
        "rows in memory are a datasets.Dataset, or dicts such as {'prompt': ..., 'completion': ...}; found "
        f"{found}. Dataset.from_pandas makes a Dataset of a DataFrame, Dataset.from_dict one of columns; of a "
        "DatasetDict give one split."
    )


def _describe_mixture(columns: Mapping[str, Sequence[object]]) -> str:
    """Return where a column has a value of another type than before it; nothing where that is deeper in the values."""
    for name, values in columns.items():
        given = [(number, value) for number, value in enumerate(values, start=1) if value is not None]
        for number, value in given:
            if type(value) is not type(given[0][1]):
                kinds = f"{type(value).__name__}, where row {given[0][0]} has {type(given[0][1]).__name__}"
                return f"row {number}, column {name!r}, is {value!r:.80}, of the type {kinds}; "
    return ""
