"""What a report holds, for one run or several side by side: pictures, a table, a summary of each run in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from smolora.analysis.canvas import render_png
from smolora.analysis.plots import (
    plot_gradient_evolution,
    plot_gradient_norms,
    plot_layer_comparison,
    plot_layer_heatmap,
    plot_training_loss,
)
from smolora.analysis.run_record import RunRecord
from smolora.analysis.run_table import Table, compare_runs, label_runs, list_settings
from smolora.analysis.summary import Section, list_rules, summarise
from smolora.errors import DataError

_CAPTIONS = {
    "training_loss": "Loss over the steps; the ring is the lowest held-out loss.",
    "gradient_norms": "Gradient norm over the steps, before clipping; a gap is a frozen group.",
    "layer_heatmap": "Gradient norm of every layer at every step; hatched is frozen.",
    "layer_comparison": "Median gradient norm of each layer while it was trained; the shade is the middle 80 %.",
    "gradient_evolution": "Where the gradient was: shares of the squared norm by group and by layer.",
}


@dataclass(frozen=True)
class Picture:
    """A plot as a PNG, under the name of its file."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Report:
    """All that is written."""

    title: str
    table: Table
    pictures: list[Picture]
    summaries: dict[str, list[Section]]
    """By the run they are of."""
    rules: list[str]
    """What the summaries call a stall and a spike."""
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
    summaries = {label: summarise(record) for label, record in zip(label_runs(records), records, strict=True)}
    return Report(
        title=" and ".join(record.name for record in records) if len(records) < 3 else f"{len(records)} runs",
        table=compare_runs(records) if len(records) > 1 else list_settings(records[0]),
        pictures=pictures,
        summaries=summaries,
        rules=list_rules([section for sections in summaries.values() for section in sections]),
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
