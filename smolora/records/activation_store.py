"""Rows of numbers on disk, found by the content they were made from; a kill at any moment loses at most the last one.

A record is appended to `data.bin` and then named in `index.jsonl` with its checksum, so a torn one is never read.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from smolora.records.staging import describe_os_error, write_json


class _Place(NamedTuple):
    offset: int
    size: int
    checksum: int


class ActivationStore:
    """Bytes by key in a folder, up to a limit; what doesn't fit isn't kept.

    Args:
        folder: Made where it is missing.
        identity: What the bytes depend on; a folder of another identity is emptied.
        limit: Bytes of data.

    Raises:
        StorageError: The folder can't be made or read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], *, limit: int) -> None:
        self._limit = limit
        self._data = folder / "data.bin"
        self._index = folder / "index.jsonl"
        self._header = folder / "identity.json"
        try:
            if not self._is_of(identity):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                self._data.touch()
                self._index.touch()
                write_json(self._header, dict(identity))
            self._places = self._read_index()
            self._size = self._data.stat().st_size
        except OSError as error:
            raise describe_os_error(error, folder) from error

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @property
    def num_bytes(self) -> int:
        """Bytes of data on disk."""
        return self._size

    def read(self, key: str) -> bytearray | None:
        """Return what was stored under `key`, or None where nothing is or the bytes are damaged or gone."""
        place = self._places.get(key)
        if place is None:
            return None
        found = bytearray(place.size)
        with suppress(OSError), self._data.open("rb") as file:
            file.seek(place.offset)
            if file.readinto(found) == place.size and zlib.crc32(found) == place.checksum:
                return found
        del self._places[key]
        return None

    def append(self, key: str, content: bytes) -> bool:
        """Store `content` under `key`, unless something is there; return whether it fits.

        Raises:
            StorageError: It can't be written. All is let go then, and nothing more is kept.
        """
        if key in self._places:
            return True
        if self._size + len(content) > self._limit:
            return False
        place = _Place(self._size, len(content), zlib.crc32(content))
        try:
            with self._data.open("ab") as file:
                file.write(content)
            with self._index.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, *place]))  # A line break first: a torn line spoils no other.
        except OSError as error:
            self._let_go()
            raise describe_os_error(error, self._data.parent) from error
        self._places[key] = place
        self._size += len(content)
        return True

    def _let_go(self) -> None:
        """Give the disk its room back: whatever else is written there needs it more."""
        self._places.clear()
        self._size = self._limit = 0
        with suppress(OSError):
            os.truncate(self._index, 0)
            os.truncate(self._data, 0)

    def _is_of(self, identity: Mapping[str, object]) -> bool:
        """Whether the folder is whole and holds what was made from `identity`."""
        if not all(file.is_file() for file in (self._data, self._index, self._header)):
            return False
        with suppress(ValueError):
            return json.loads(self._header.read_text(encoding="utf-8")) == identity  # type: ignore[no-any-return]
        return False

    def _read_index(self) -> dict[str, _Place]:
        places = {}
        for line in self._index.read_text(encoding="utf-8").splitlines():
            try:
                key, *place = json.loads(line)
            except ValueError:
                continue  # Empty, or torn by a kill: its data is there, unnamed.
            places[key] = _Place(*place)
        return places
