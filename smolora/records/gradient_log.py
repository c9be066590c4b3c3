"""gradient_analysis.*: gradient norms as CSV, a row per logged step, and their summary as JSON.

An empty cell means that nothing there has a gradient: it is frozen, or the model has none of it. A zero is a zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from smolora.errors import DataError
from smolora.records.run_dir import RunDir
from smolora.records.staging import describe_os_error, write_text

Cell = float | int | None


class GradientNormLog:
    """The gradient files of one folder, appended row by row, cut back to the checkpoint on resume.

    Args:
        folder: A run's folder, or any other.

    Example:
        ```python
        rows = GradientNormLog("my-run").read_groups()
        print([row["attention"] for row in rows])
        ```
    """

    def __init__(self, folder: str | Path) -> None:
        run = RunDir(folder)
        self._groups, self._layers, self._summary = (
            _Table(run.group_norms),
            _Table(run.layer_norms),
            run.gradient_summary,
        )

    def append(
        self, step: int, phase: int, active: int, groups: Mapping[str, float | None], layers: Mapping[str, float | None]
    ) -> None:
        """Write one row of each file.

        Args:
            step: Updates done.
            phase: Number of the phase from 1; 0 where there are none.
            active: Trainable parameters of that phase.
            groups: Norms by group, `total` among them.
            layers: Norms by `layer_<i>_<group>`.
        """
        order = [*(name for name in groups if name not in ("total", *_EXTRA)), "total"]
        order += [name for name in _EXTRA if name in groups]  # After the promised columns, where they are trained.
        place: dict[str, Cell] = {"step": step, "phase": phase}
        self._groups.append({**place, "active": active, **{name: groups[name] for name in order}})
        self._layers.append({**place, **layers})

    def read_groups(self) -> list[dict[str, Cell]]:
        """Return the rows of group_norms.csv: step, phase, active and norms, None where a cell is empty."""
        return self._groups.read()

    def read_layers(self) -> list[dict[str, Cell]]:
        """Return the rows of layer_norms.csv: step, phase and norms, None where a cell is empty."""
        return self._layers.read()

    def cut(self, step: int) -> None:
        """Drop the rows past `step` and a line torn by a kill, so that a resumed run continues a single curve."""
        self._groups.cut(step)
        self._layers.cut(step)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json, each statistic on a line."""
        write_text(self._summary, _render(summary) + "\n")


_EXTRA = ("norm", "other")


class _Table:
    """A CSV file of numbers, whose first line names its columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None

    def append(self, row: Mapping[str, Cell]) -> None:
        line = ",".join(_format(value) for value in row.values()) + "\n"
        if self._columns is None:
            line = self._open(list(row)) + line
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise describe_os_error(error, self.path) from error

    def _open(self, columns: list[str]) -> str:
        """Repair the end of an existing file; return the header that a new one needs."""
        self.cut(None)
        self._columns = columns
        found = self._lines()
        if found and found[0].split(",") != columns:
            raise DataError(
                f"{self.path} has other columns than this run measures. Move it away, or write to another folder."
            )
        return "" if found else ",".join(columns) + "\n"

    def read(self) -> list[dict[str, Cell]]:
        header, *lines = self._lines() or [""]
        columns = header.split(",")
        return [dict(zip(columns, map(_parse, line.split(",")), strict=True)) for line in lines]

    def cut(self, step: int | None) -> None:
        """Keep whole lines, up to `step` where it is given."""
        header, *lines = self._lines() or [""]
        kept = [line for line in lines if step is None or int(line.partition(",")[0]) <= step]
        text = "".join(f"{line}\n" for line in [header, *kept] if header)
        if self.path.is_file() and self.path.read_bytes() != text.encode():
            write_text(self.path, text)

    def _lines(self) -> list[str]:
        """Return the header and every line with as many numbers; a kill can only tear the last one."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        header, *lines = [line.rstrip("\r\n") for line in text.splitlines(keepends=True) if line.endswith("\n")] or [""]
        whole = [line for line in lines if line.count(",") == header.count(",") and line.partition(",")[0].isdigit()]
        return [header, *whole] if header else []


def _render(value: object, margin: str = "") -> str:
    """Return JSON in which an object of plain values stands on one line.

    >>> print(_render({"groups": {"mlp": {"count": 1, "mean": 0.5}}}))
    {
      "groups": {
        "mlp": {"count": 1, "mean": 0.5}
      }
    }
    """
    if not isinstance(value, Mapping) or not any(isinstance(inner, Mapping) for inner in value.values()):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = margin + "  "
    lines = [f"{deeper}{_render(name)}: {_render(inner, deeper)}" for name, inner in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def _format(value: Cell) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"  # Nine digits give a float32 back exactly.


def _parse(cell: str) -> Cell:
    if not cell:
        return None
    return int(cell) if cell.isdigit() else float(cell)
