"""What a report holds, for one run or several side by side: pictures, a table, a summary of each run in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from smolora.analysis.canvas import render_png
from smolora.analysis.findings import find_lowest
from smolora.analysis.plots import (
    plot_gradient_evolution,
    plot_gradient_norms,
    plot_layer_comparison,
    plot_layer_heatmap,
    plot_training_loss,
)
from smolora.analysis.run_record import RunRecord
from smolora.analysis.summary import Section, summarise
from smolora.errors import DataError

_CAPTIONS = {
    "training_loss": "Loss over the steps; the ring is the lowest held-out loss.",
    "gradient_norms": "Gradient norm over the steps, before clipping; a gap is a frozen group.",
    "layer_heatmap": "Gradient norm of every layer at every step; hatched is frozen.",
    "layer_comparison": "Median gradient norm of each layer while it was trained; the shade is the middle 80%.",
    "gradient_evolution": "Where the gradient was: shares of the squared norm by group and by layer.",
}


@dataclass(frozen=True)
class Picture:
    """A plot as a PNG, under the name of its file."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Text in rows, the first column and the head naming what is in them."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Report:
    """All that is written."""

    title: str
    table: Table
    pictures: list[Picture]
    summaries: dict[str, list[Section]]
    """By the run they are of."""
    notes: list[str]
    """What could not be drawn, and why."""


def build_report(records: Sequence[RunRecord]) -> Report:
    """Read the runs and draw them; a plot whose file is missing becomes a note."""
    pictures, notes = [], []
    for name, caption, draw in _choose_plots(records):
        try:
            pictures.append(Picture(name, caption, render_png(draw())))
        except DataError as error:
            notes.append(str(error))
    labels = _labels(records)
    return Report(
        title=" and ".join(record.name for record in records) if len(records) < 3 else f"{len(records)} runs",
        table=_compare(records, labels) if len(records) > 1 else _list_settings(records[0]),
        pictures=pictures,
        summaries={label: summarise(record) for label, record in zip(labels, records, strict=True)},
        notes=list(dict.fromkeys(notes)),
    )


def _choose_plots(records: Sequence[RunRecord]) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Yield name, caption and how it is drawn: of one run everything, of several what can be laid over each other."""
    for plot in (plot_training_loss, plot_gradient_norms, plot_layer_comparison):
        name = plot.__name__.removeprefix("plot_")
        caption = _CAPTIONS[name] if len(records) == 1 else f"{_CAPTIONS[name].split(';')[0]}, of each run."
        yield name, caption, partial(plot, *records)
    for number, record in enumerate(records, start=1):
        for plot_one in (plot_layer_heatmap, plot_gradient_evolution):
            name = plot_one.__name__.removeprefix("plot_")
            suffix, of_run = (f"_{number}", f"Run {number}: ") if len(records) > 1 else ("", "")
            yield f"{name}{suffix}", of_run + _CAPTIONS[name], partial(plot_one, record)


def _labels(records: Sequence[RunRecord]) -> list[str]:
    if len(records) == 1:
        return [records[0].name]
    return [f"{number}  {record.name}" for number, record in enumerate(records, start=1)]


def _list_settings(record: RunRecord) -> Table:
    return Table("Settings", ["setting", "value"], [[path, str(value)] for path, value in record.settings.items()])


def _compare(records: Sequence[RunRecord], labels: Sequence[str]) -> Table:
    """Return the results of the runs, and the settings in which they differ."""
    results = [_describe_results(record) for record in records]
    rows = [[name, *(each[name] for each in results)] for name in results[0]]
    paths = list(dict.fromkeys(path for record in records for path in record.settings))
    for path in paths:
        values = [str(record.settings.get(path, "-")) for record in records]
        if len(set(values)) > 1:
            rows.append([path, *values])
    return Table("Results, and the settings that differ", ["", *labels], rows)


def _describe_results(record: RunRecord) -> dict[str, str]:
    steps, losses = record.curve("loss") if record.has_curve("loss") else (np.array([]), np.array([]))
    best = find_lowest(*record.curve("eval_loss")) if record.has_curve("eval_loss") else None
    speeds = record.curve("tokens_per_second")[1] if record.has_curve("tokens_per_second") else np.array([])
    speeds = speeds[np.isfinite(speeds)]
    return {
        "last step": f"{steps[-1]:,.0f}" if len(steps) else "-",
        "last training loss": f"{losses[-1]:.4f}" if len(losses) else "-",
        "lowest held-out loss": f"{best[1]:.4f} at step {best[0]:,.0f}" if best else "-",
        "input tokens per second, median": f"{np.median(speeds):,.0f}" if len(speeds) else "-",
    }
