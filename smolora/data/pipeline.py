"""Steps from dataset to dataset, one after another, and the splitting of long texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from smolora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    Step = Callable[[Dataset], Dataset]

_WORD = re.compile(r"\S+")


class DatasetPipeline:
    """Runs steps in the order they were added; any callable from Dataset to Dataset is one.

    >>> from datasets import Dataset
    >>> pipeline = DatasetPipeline().add_processor(lambda dataset: dataset.select(range(1)))
    >>> pipeline.process(Dataset.from_dict({"text": ["a", "b"]})).num_rows
    1
    """

    def __init__(self) -> None:
        self.processors: list[Step] = []

    def add_processor(self, processor: Step) -> DatasetPipeline:
        """Add a step and return self."""
        self.processors.append(processor)
        return self

    def process(self, dataset: Dataset) -> Dataset:
        """Return the dataset after every step.

        Raises:
            ConfigError: A step returned something else than a Dataset.
        """
        from datasets import Dataset

        for number, processor in enumerate(self.processors, start=1):
            dataset = processor(dataset)
            if not isinstance(dataset, Dataset):
                raise ConfigError(f"step {number} of the pipeline returned {type(dataset).__name__}, not a Dataset.")
        return dataset


def chunk_texts(
    texts: Iterable[str], chunk_size: int, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    r"""Split each text into pieces of `chunk_size` words, or tokens where a tokenizer is given; 0 splits nothing.

    No word is lost and none is cut by words; the white space inside a piece stays as it was.

    >>> chunk_texts(["one two\n\nthree", "four"], 2)
    ['one two', 'three', 'four']
    """
    if chunk_size < 0:
        raise ConfigError(f"chunk_size is at least 0, found {chunk_size}.")
    if chunk_size == 0:
        return list(texts)
    if tokenizer is None:
        return [piece for text in texts for piece in _iter_word_pieces(text, chunk_size)]
    return [piece for text in texts for piece in _iter_token_pieces(text, chunk_size, tokenizer)]


def _iter_word_pieces(text: str, size: int) -> Iterator[str]:
    start, end, count = 0, 0, 0
    for word in _WORD.finditer(text):
        if count == size:
            yield text[start:end]
            count = 0
        if count == 0:
            start = word.start()
        end, count = word.end(), count + 1
    if count:
        yield text[start:end]


def _iter_token_pieces(text: str, size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield pieces whose ends fall between tokens, and never inside a character that several tokens spell."""
    if not tokenizer.is_fast:
        raise ConfigError("chunking by tokens needs a tokenizer with a tokenizer.json; chunk by words instead.")
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    starts = [start for start, _ in encoded["offset_mapping"]]
    bounds = [0, *(starts[index] for index in range(size, len(starts), size)), len(text)]
    for start, end in pairwise(bounds):
        if start < end:
            yield text[start:end]
