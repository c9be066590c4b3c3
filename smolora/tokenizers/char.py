"""One token a character, as byte-level BPE whose merges only assemble the bytes of one character.

A character that training never saw falls back to its bytes, so it never stands for another one; and since the result
is an ordinary `tokenizer.json`, transformers and llama.cpp tokenise the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import models

from smolora.tokenizers.byte_level import END_OF_TEXT, ByteLevelTokenizer, iter_texts


class CharTokenizer(ByteLevelTokenizer):
    """A tokenizer of characters.

    >>> tokenizer = CharTokenizer.train("héllo")
    >>> tokenizer.decode(tokenizer.encode("hello, wörld"))
    'hello, wörld'
    >>> len(tokenizer.encode("é")), len(tokenizer.encode("ö"))
    (1, 2)
    """

    def __init__(self, characters: Iterable[str]) -> None:
        """Give each of `characters` a token; every other one is spelt in bytes."""
        known = sorted(set(characters))
        spelling = {character: _spell(character) for character in known}
        vocab = {END_OF_TEXT: 0, **{symbol: byte + 1 for byte, symbol in enumerate(_BYTE_SYMBOLS)}}
        merges: dict[tuple[str, str], None] = {}
        for symbols in spelling.values():
            for length in range(2, len(symbols) + 1):
                merges[symbols[: length - 1], symbols[length - 1]] = None
                vocab.setdefault(symbols[:length], len(vocab))
        super().__init__(models.BPE(vocab=vocab, merges=list(merges)))
        self.backend.add_special_tokens([END_OF_TEXT])
        self.char_to_id = {character: vocab[symbols] for character, symbols in spelling.items()}
        self.id_to_char = {token_id: character for character, token_id in self.char_to_id.items()}

    @classmethod
    def train(cls, texts: str | Iterable[str]) -> CharTokenizer:
        """Return a tokenizer with a token for every character of one text or many."""
        characters: set[str] = set()
        for text in iter_texts(texts):
            characters.update(text)
        return cls(characters)


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable stand-in for each byte: itself where visible, else the next one from U+0100."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


_BYTE_SYMBOLS = _byte_symbols()


def _spell(character: str) -> str:
    return "".join(_BYTE_SYMBOLS[byte] for byte in character.encode("utf-8"))
