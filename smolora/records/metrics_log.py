"""metrics.jsonl: one JSON object per logged step, appended line by line, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from smolora.records.staging import describe_os_error, write_text

Scalar = float | int | str | None


class MetricsLog:
    """Appends records to one file; valid JSON always, null where a number isn't finite."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Scalar]) -> None:
        """Write one line and flush it.

        Raises:
            StorageError: It can't be written.
        """
        finite = {key: _finite(value) for key, value in record.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise describe_os_error(error, self.path) from error

    def read(self) -> list[dict[str, Scalar]]:
        """Return every whole record; a line torn by a kill is left out."""
        return _parse(self._read_bytes(0))

    def read_new(self, offset: int) -> tuple[list[dict[str, Scalar]], int]:
        """Return the records of the lines that are ended from byte `offset` on, and where the last of them ends."""
        text = self._read_bytes(offset)
        ended = text[: text.rfind(b"\n") + 1]
        return _parse(ended), offset + len(ended)

    def _read_bytes(self, offset: int) -> bytes:
        if not self.path.is_file():
            return b""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read()

    def cut(self, step: int) -> None:
        """Drop the records past `step`, so that a resumed run continues a single curve."""
        kept = [record for record in self.read() if isinstance(at := record.get("step"), int) and at <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def _parse(text: bytes) -> list[dict[str, Scalar]]:
    records = []
    for line in text.decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _finite(value: Scalar) -> Scalar:
    return None if isinstance(value, float) and not math.isfinite(value) else value
