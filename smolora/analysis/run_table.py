"""Runs as tables: the settings of one, or the results of several and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolora.analysis.findings import find_lowest
from smolora.analysis.run_record import RunRecord, RunSource, open_runs
from smolora.analysis.summary import render_rules, render_summary, summarise


@dataclass(frozen=True)
class Table:
    """Text in rows, the first column and the head naming what is in them."""

    title: str
    head: list[str]
    rows: list[list[str]]


def label_runs(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of runs, numbered where there are several."""
    if len(records) == 1:
        return [records[0].name]
    return [f"{number}  {record.name}" for number, record in enumerate(records, start=1)]


def list_settings(record: RunRecord) -> Table:
    """Return all settings of a run."""
    return Table("Settings", ["setting", "value"], [[path, str(value)] for path, value in record.settings.items()])


def compare_runs(records: Sequence[RunRecord]) -> Table:
    """Return the results of the runs, and the settings in which they differ."""
    results = [_describe_results(record) for record in records]
    rows = [[name, *(each[name] for each in results)] for name in results[0]]
    paths = list(dict.fromkeys(path for record in records for path in record.settings))
    for path in paths:
        values = [_describe_setting(record, path) for record in records]
        if len(set(values)) > 1:
            rows.append([path, *values])
    return Table("Results, and the settings that differ", ["", *label_runs(records)], rows)


def _describe_setting(record: RunRecord, path: str) -> str:
    value = record.settings.get(path)
    if path == "phases.strategy" and value is None:
        return "a table" if record.settings.get("phases.table") else "no phases"
    if path == "phases.table" and isinstance(value, list):
        return f"{len(value)} phases" if value else "-"
    return "-" if value is None else str(value)


def _describe_results(record: RunRecord) -> dict[str, str]:
    losses = record.curve("loss")[1] if record.has_curve("loss") else np.array([])
    best = find_lowest(*record.curve("eval_loss")) if record.has_curve("eval_loss") else None
    speeds = record.curve("tokens_per_second")[1] if record.has_curve("tokens_per_second") else np.array([])
    speeds = speeds[np.isfinite(speeds)]
    return {
        "last step": f"{record.last_step:,}" if record.last_step else "-",
        "last training loss": f"{losses[-1]:.4f}" if len(losses) else "-",
        "lowest held-out loss": f"{best[1]:.4f} at step {best[0]:,.0f}" if best else "-",
        "input tokens per second, median": f"{np.median(speeds):,.0f}" if len(speeds) else "-",
    }


def describe_runs(runs: Sequence[RunSource]) -> str:
    """Return several runs as text: the table of `compare_runs`, the summary of each, and once what their words mean.

    Raises:
        DataError: A run is missing.
    """
    records = open_runs(runs)
    summaries = {label: summarise(record) for label, record in zip(label_runs(records), records, strict=True)}
    rules = render_rules([section for sections in summaries.values() for section in sections])
    return (
        "\n".join([_render_table(compare_runs(records)), *map(render_summary, summaries, summaries.values())]) + rules
    )


def _render_table(table: Table) -> str:
    rows = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([table.title, "", *lines]) + "\n"
