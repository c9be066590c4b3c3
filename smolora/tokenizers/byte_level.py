"""What the two trained tokenizers share: tokens are runs of UTF-8 bytes, so any text round-trips exactly.

Both hold one special token, `<|endoftext|>`, with id 0. Text that spells it is encoded as ordinary characters: only
the program ends a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from smolora.errors import DataError

END_OF_TEXT = "<|endoftext|>"


class ByteLevelTokenizer:
    """Encodes and decodes with a byte-level `tokenizers.Tokenizer`."""

    def __init__(self, model: models.BPE) -> None:
        self.backend = Tokenizer(model)
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self.backend.decoder = decoders.ByteLevel()
        # Without this, a text that spells `<|endoftext|>` would become the control token.
        self.backend.encode_special_tokens = True

    @property
    def vocab(self) -> dict[str, int]:
        """Token to id; tokens are spelt in GPT-2's printable alphabet of bytes."""
        return self.backend.get_vocab()

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special token included."""
        return self.backend.get_vocab_size()

    @property
    def eos_token_id(self) -> int:
        """The id that ends a text."""
        return self.vocab[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with no special token added.

        Raises:
            DataError: `text` holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds {text[error.start]!r} at character {error.start}: half of a surrogate pair, which is "
                "no character and can't be encoded. Remove it, or repair the file it came from."
            ) from None
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are spelt out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` library reads."""
        self.backend.save(str(path))


def iter_texts(texts: str | Iterable[str]) -> Iterable[str]:
    """Return one text as a list of one, and many as they are (a string is an iterable of characters, not of texts)."""
    return [texts] if isinstance(texts, str) else texts
