"""Byte-level byte-pair encoding, trained by the `tokenizers` library (Sennrich et al. 2016; bytes as in GPT-2)."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import models, pre_tokenizers, trainers

from smolora.errors import ConfigError
from smolora.tokenizers.byte_level import END_OF_TEXT, ByteLevelTokenizer, iter_texts

SMALLEST_VOCAB = 257
"""The 256 bytes and `<|endoftext|>`: with fewer, some text would have no spelling."""

_LONGEST_WORD = 960
"""Bytes of a run of letters that merges are learned from in one piece: the time grows with the square of its length, to
48 s for 200 kB of DNA. Words are shorter; a multiple of 12 keeps characters of 2, 3 or 4 bytes whole."""


class BPETokenizer(ByteLevelTokenizer):
    """A tokenizer of frequent byte runs; untrained, it spells every text in bytes.

    >>> tokenizer = BPETokenizer(300).train(["low lower lowest"] * 10)
    >>> tokenizer.decode(tokenizer.encode("slowest 🦎"))
    'slowest 🦎'
    """

    def __init__(self, vocab_size: int = 2048) -> None:
        if vocab_size < SMALLEST_VOCAB:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small: the 256 bytes and {END_OF_TEXT} need {SMALLEST_VOCAB}."
            )
        super().__init__(models.BPE())
        self.largest_vocab = vocab_size
        self.train([])

    def train(self, texts: str | Iterable[str]) -> BPETokenizer:
        """Learn merges from one text or many and return self; the same texts give the same merges.

        A run of letters that is longer than any word, as of DNA, is learned in pieces.
        """
        trainer = trainers.BpeTrainer(
            vocab_size=self.largest_vocab,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        whole = self.backend.pre_tokenizer
        self.backend.pre_tokenizer = pre_tokenizers.Sequence([whole, pre_tokenizers.FixedLength(_LONGEST_WORD)])
        try:
            self.backend.train_from_iterator(iter_texts(texts), trainer)
        finally:
            self.backend.pre_tokenizer = whole
        return self

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The learned merges, most frequent first."""
        return [(left, right) for left, right in json.loads(self.backend.to_str())["model"]["merges"]]
