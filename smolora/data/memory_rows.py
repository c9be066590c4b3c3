"""What a caller hands to a run in place of files: rows, held-out rows, and what encodes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolora.data.preprocessor import DataPreprocessor
from smolora.errors import ConfigError

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

    def __post_init__(self) -> None:
        if self.held_out is not None and self.train is None:
            raise ConfigError(
                "eval_dataset goes with a dataset. To hold out rows beside those of data.sources, "
                "name them with data.eval_source."
            )


FROM_SOURCES = MemoryRows()
"""No rows in memory: those that the configuration names."""
