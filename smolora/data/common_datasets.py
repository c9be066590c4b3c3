"""The usual datasets as one table: what each is for, what its rows are called, and how it is loaded.

The table is of the benchmarks; one that is added there is here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig
from smolora.config.model import TaskType
from smolora.data.benchmarks import BENCHMARKS, Benchmark, Split, load_and_preprocess_dataset

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class CommonDataset:
    """A dataset that people know by its name.

    Example:
        ```python
        rows = COMMON_DATASETS["sick"].load(data_dir="data/nli", num_samples=100)
        ```
    """

    benchmark: Benchmark

    @property
    def task(self) -> TaskType:
        """What it is usually asked for; a language model can be asked all of it."""
        if self.benchmark.labels:
            return "classification"
        return "qa" if "squad" in self.benchmark.metrics else "causal_lm"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that `load` gives, whatever the files call them."""
        return ("prompt", "completion")

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers, where there are few."""
        return self.benchmark.labels

    @property
    def metrics(self) -> tuple[str, ...]:
        """What its answers are judged by."""
        return self.benchmark.metrics

    @property
    def splits(self) -> tuple[str, ...]:
        """Its splits, each with the files it may be read from."""
        return tuple(self.benchmark.files)

    @property
    def can_download(self) -> bool:
        """Whether `load` works without a folder."""
        return bool(self.benchmark.urls)

    @property
    def data(self) -> DataConfig:
        """The settings with which its rows train its task: for a classifier, the label of a text."""
        if self.task == "classification":
            return DataConfig(text_field="prompt", label_field="completion")
        return DataConfig(prompt_field="prompt", completion_field="completion")

    def load(
        self, split: Split = "train", *, data_dir: str | Path | None = None, num_samples: int | None = None
    ) -> Dataset:
        """Return rows; see `load_and_preprocess_dataset`.

        Raises:
            ConfigError: It has no such split.
            DataError: Its files aren't there.
        """
        return load_and_preprocess_dataset(self.benchmark.name, data_dir=data_dir, split=split, num_samples=num_samples)


COMMON_DATASETS: Mapping[str, CommonDataset] = {
    str(name): CommonDataset(benchmark) for name, benchmark in BENCHMARKS.items()
}
