"""The benchmarks, as one table: files of each split, the reader of their rows, and the metrics they are judged by.

To add one: a row of `BENCHMARKS`, and in `benchmark_rows` a reader where none fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smolora.data.benchmark_files import cache_folder, fetch_file, find_file, warn_if_changed
from smolora.data.benchmark_rows import (
    NEWS_TOPICS,
    NLI_LABELS,
    SENTIMENTS,
    BenchmarkRow,
    Reader,
    read_ag_news,
    read_e2e,
    read_nli,
    read_samsum,
    read_squad,
    read_sst2,
)
from smolora.data.wikisql import read_wikisql
from smolora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DatasetType(StrEnum):
    """The names of the benchmarks."""

    E2E_NLG = "e2e_nlg"
    SAMSUM = "samsum"
    WIKISQL = "wikisql"
    MULTI_NLI = "multi_nli"
    SST2 = "sst2"
    AG_NEWS = "ag_news"
    SICK = "sick"
    SQUAD = "squad"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Data, prompts, references and metrics under one name."""

    name: DatasetType
    files: Mapping[Split, tuple[str, ...]]
    """Names that the file of a split goes by; the first that is there is read."""
    read: Reader
    metrics: tuple[str, ...]
    """Names in `smolora.evaluation.metrics.METRICS`."""
    labels: tuple[str, ...] = ()
    """The answers, where there are few."""
    own_names: Mapping[Split, str] = field(default_factory=dict)
    """What the files call a split, where that is another name."""
    urls: Mapping[Split, tuple[str, ...]] = field(default_factory=dict)
    """Where a split can be downloaded."""
    max_new_tokens: int = 128
    """Longest answer that is asked for."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    stand_ins: tuple[str, ...] = ()
    """Those of the files that hold other rows than the split: a part of it, or rows like it."""

    def find(self, split: str, folder: str | Path | None) -> Path:
        """Return the file of a split, in `folder`, or downloaded where no folder is named.

        Raises:
            ConfigError: The benchmark has no such split.
            DataError: The file isn't there.
        """
        if split not in self.files:
            raise ConfigError(f"{self.name} has no split {split!r}. Splits: {', '.join(self.files)}.")
        if folder is None:
            urls = self.urls.get(split, ())  # type: ignore[call-overload]
            return fetch_file(self.name, urls, cache_folder(self.name))
        file = find_file(self.name, Path(folder), self.files[split])  # type: ignore[index]
        warn_if_changed(file)
        return file

    def iter_rows(self, split: str, file: Path) -> Iterator[BenchmarkRow]:
        """Read the rows of a split one by one.

        Raises:
            DataError: A row can't be read.
        """
        return self.read(file, self.name_split(split))

    def is_stand_in(self, file: Path) -> bool:
        """Whether a file holds other rows than the split that it is read for."""
        return file.name in self.stand_ins

    def name_split(self, split: str) -> str:
        """Return what the benchmark's own files call a split."""
        return self.own_names.get(split, split)  # type: ignore[call-overload, no-any-return]


_E2E = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master"
_WIKISQL = "https://github.com/salesforce/WikiSQL/raw/master/data.tar.bz2"
_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"

_LINE = ("\n",)

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name=DatasetType.E2E_NLG,
            files={
                "train": ("trainset.csv", "trainset.csv.gz", "trainset_rebuilt.csv.gz"),
                "validation": ("devset.csv", "devset.csv.gz"),
                "test": ("testset_w_refs.csv", "testset_w_refs.csv.gz"),
            },
            urls={
                "train": (f"{_E2E}/trainset.csv",),
                "validation": (f"{_E2E}/devset.csv",),
                "test": (f"{_E2E}/testset_w_refs.csv",),
            },
            stand_ins=("trainset_rebuilt.csv.gz",),
            read=read_e2e,
            metrics=("bleu_lowercase", "nist", "rouge", "meteor", "distinct", "meteor_1_5", "cider"),
        ),
        Benchmark(
            name=DatasetType.SAMSUM,
            files={
                "train": ("train.jsonl", "train.jsonl.gz", "train.json"),
                "validation": ("val.jsonl", "val.jsonl.gz", "val.json"),
                "test": ("test.jsonl", "test.jsonl.gz", "test.json"),
            },
            read=read_samsum,
            metrics=("rouge", "bleu", "meteor", "distinct"),
        ),
        Benchmark(
            name=DatasetType.WIKISQL,
            files={
                "train": ("train.jsonl", "train.jsonl.gz", "data.tar.bz2", "train_first1000_with_header.jsonl.gz"),
                "validation": ("dev.jsonl", "dev.jsonl.gz", "data.tar.bz2"),
                "test": ("test.jsonl", "data.tar.bz2", "test_first1000_with_header.jsonl.gz", "test.jsonl.gz"),
            },
            own_names={"validation": "dev"},
            urls=dict.fromkeys(SPLITS, (_WIKISQL,)),
            stand_ins=("train_first1000_with_header.jsonl.gz", "test_first1000_with_header.jsonl.gz"),
            read=read_wikisql,
            metrics=("logical_form", "execution", "exact_match"),
            stop=_LINE,
        ),
        Benchmark(
            name=DatasetType.MULTI_NLI,
            files={
                "train": ("multinli_1.0_train.jsonl", "multinli_1.0_train.jsonl.gz"),
                "validation": ("multinli_1.0_dev_mismatched.jsonl", "mnli_mismatched_textfooler1000.jsonl"),
                "test": ("multinli_1.0_dev_matched.jsonl", "mnli_matched_textfooler1000.jsonl"),
            },
            stand_ins=("mnli_mismatched_textfooler1000.jsonl", "mnli_matched_textfooler1000.jsonl"),
            read=read_nli,
            metrics=("labels",),
            labels=NLI_LABELS,
            max_new_tokens=8,
            stop=_LINE,
        ),
        Benchmark(
            name=DatasetType.SST2,
            files={
                "train": ("sst2_train.jsonl", "train.jsonl"),
                "validation": ("sst2_dev.jsonl", "dev.jsonl"),
                "test": ("sst2_test.jsonl", "test.jsonl"),
            },
            read=read_sst2,
            metrics=("labels",),
            labels=SENTIMENTS,
            max_new_tokens=8,
            stop=_LINE,
        ),
        Benchmark(
            name=DatasetType.AG_NEWS,
            files={
                "train": ("agnews_train.jsonl", "agnews_train.jsonl.gz"),
                "test": ("agnews_test.jsonl", "agnews_test.jsonl.gz"),
            },
            read=read_ag_news,
            metrics=("labels",),
            labels=NEWS_TOPICS,
            max_new_tokens=8,
            stop=_LINE,
        ),
        Benchmark(
            name=DatasetType.SICK,
            files={
                "train": ("sick_train.jsonl",),
                "validation": ("sick_trial.jsonl",),
                "test": ("sick_test.jsonl",),
            },
            read=read_nli,
            metrics=("labels",),
            labels=NLI_LABELS,
            max_new_tokens=8,
            stop=_LINE,
        ),
        Benchmark(
            name=DatasetType.SQUAD,
            files={"train": ("train-v1.1.json",), "test": ("dev-v1.1.json", "xquad.en.json")},
            urls={"train": (f"{_SQUAD}/train-v1.1.json",), "test": (f"{_SQUAD}/dev-v1.1.json",)},
            stand_ins=("xquad.en.json",),
            read=read_squad,
            metrics=("squad",),
            max_new_tokens=32,
            stop=_LINE,
        ),
    )
}

_OTHER_NAMES = {"e2e": "e2e_nlg", "mnli": "multi_nli"}


def resolve_name(name: str) -> str:
    """Return the name in the table of a benchmark that presets call by a shorter one; any other name as it is."""
    return _OTHER_NAMES.get(name, name)


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name, or by the shorter one of presets, such as e2e.

    Raises:
        ConfigError: There is none of that name.
    """
    name = resolve_name(name)
    if name not in BENCHMARKS:
        raise ConfigError(
            f"no benchmark {name!r}.{did_you_mean(name, BENCHMARKS)} Benchmarks: {', '.join(BENCHMARKS)}."
        )
    return BENCHMARKS[name]


def find_benchmark_files(benchmark: str, folder: Path) -> tuple[Path, Path]:
    """Return the files of training and held-out rows.

    Raises:
        DataError: One of them isn't in `folder`.
    """
    files = get_benchmark(benchmark).files
    return find_file(benchmark, folder, files["train"]), find_file(benchmark, folder, files["validation"])


def load_and_preprocess_dataset(
    name: DatasetType | str,
    *,
    data_dir: str | Path | None = None,
    split: Split = "train",
    num_samples: int | None = None,
) -> Dataset:
    """Load a benchmark as rows of `prompt` and `completion`, the form that `train` and `SmoLoRA` recognise.

    An input with several references becomes as many rows.

    Args:
        name: A benchmark.
        data_dir: Folder with its files. Left out, they are downloaded, where that is possible.
        split: train, validation or test.
        num_samples: Inputs to take from the start; all where left out.

    Raises:
        ConfigError: There is no such benchmark or split.
        DataError: Its files aren't there, or a row can't be read.
    """
    from datasets import Dataset

    benchmark = get_benchmark(name)
    rows = islice(benchmark.iter_rows(split, benchmark.find(split, data_dir)), num_samples)
    return Dataset.from_list([{"prompt": row.prompt, "completion": text} for row in rows for text in row.references])
