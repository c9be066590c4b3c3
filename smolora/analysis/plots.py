"""The plots of a run: read its files, return a figure; the caller saves it (`figure.savefig("loss.png", dpi=220)`).

A run is a folder. Frozen groups and layers are gaps. Norms are L2, before clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from smolora.analysis.canvas import (
    BAR_ROOM,
    GROUP_STYLES,
    RUN_STYLES,
    LineEnd,
    Style,
    add_color_bar,
    add_shades,
    count_letters,
    label_ends,
    name_panel,
    new_figure,
    part_phases,
    positive_range,
    scale_values,
    shade_phases,
    write_inside,
)
from smolora.analysis.findings import find_lowest, layer_totals, measure_shares
from smolora.analysis.phases import describe_phases
from smolora.analysis.run_record import Array, NormTable, PhaseSpan, RunRecord, RunSource, open_runs
from smolora.errors import DataError

Color = str | tuple[float, float, float, float]

_MOST_COLUMNS = 300
"""Steps that areas one column wide can show; more are averaged."""

_LAYER_COLORS = "cividis"

_NAMED_SHARE = 0.14
"""A band of this height has room for its name."""


def plot_training_loss(*runs: RunSource) -> Figure:
    """Plot the loss of the logged steps and on held-out rows, the lowest marked; several runs are overlaid.

    Raises:
        DataError: A run is missing, or has logged no step.
    """
    records = open_runs(runs)
    if len(records) > 1:
        return _overlay(
            records, {"training loss, nats per token": "loss", "held-out loss, nats per token": "eval_loss"}
        )
    [record] = records
    steps, losses = record.curve("loss")
    held_out = record.curve("eval_loss") if record.has_curve("eval_loss") else None
    best = find_lowest(*held_out) if held_out else None
    ends = [_end(steps, losses, "training", RUN_STYLES[0])]
    if held_out and best:
        lowest = f"held-out\nlowest {best[1]:.3f}\nat step {best[0]:,.0f}"
        ends.append(_end(*held_out, lowest, RUN_STYLES[1]))
    labels = [end.text for end in ends]
    texts, key = _name_phases(record, labels)
    [panel] = new_figure([1.5], labels=labels, key=key)
    shade_phases(panel, record.phases)
    _draw(panel, steps, losses, RUN_STYLES[0], label="training", linewidth=0.8)
    if held_out and best:
        _draw(panel, *held_out, RUN_STYLES[1], label="held-out", marker="o")
        [ring] = panel.plot(*best, marker="o", markersize=7, color=RUN_STYLES[1][0], label="lowest")
        ring.set(markerfacecolor="none", clip_on=False)
    name_panel(panel, "loss, nats per token", record.phases, texts)
    label_ends(panel, ends)
    return _figure_of(panel)


def plot_gradient_norms(*runs: RunSource) -> Figure:
    """Plot the gradient norm of each group over the steps; of several runs, their total norms.

    Raises:
        DataError: A run is missing, or kept no gradient log.
    """
    records = open_runs(runs)
    if len(records) > 1:
        return _overlay(records, {"total gradient norm (L2, before clipping)": "grad_norm"}, fits_scale=True)
    [record] = records
    table = record.group_norms
    curves = {name: table.columns[name] for name in ("total", *table.groups) if name in table.columns}
    texts, key = _name_phases(record, list(curves))
    [panel] = new_figure([1.6], labels=list(curves), key=key)
    shade_phases(panel, record.phases)
    for name, values in curves.items():
        _draw(panel, table.steps, values, GROUP_STYLES[name], label=name, linewidth=0.8 if name == "total" else 1.1)
    name_panel(panel, "gradient norm (L2, before clipping)", record.phases, texts)
    scale_values([panel], list(curves.values()))
    label_ends(panel, [_end(table.steps, values, name, GROUP_STYLES[name]) for name, values in curves.items()])
    return _figure_of(panel)


def plot_layer_heatmap(run: RunSource) -> Figure:
    """Plot the gradient norm of every layer at every step, a panel per group; hatched where it was frozen.

    Raises:
        DataError: The run is missing, or kept no gradient log.
    """
    [record] = open_runs([run])
    table = record.layer_norms
    matrices = _layers_of(record, table)
    shades = LogNorm(*_widen(*positive_range(list(matrices.values()))))
    count = len(next(iter(matrices.values())))
    texts, key = _name_phases(record, [BAR_ROOM])
    panels = new_figure([min(1.6, max(0.7, 0.055 * count))] * len(matrices), labels=[BAR_ROOM], key=key)
    for panel, (group, matrix) in zip(panels, matrices.items(), strict=True):
        panel.patch.set(facecolor="white", edgecolor="#b0b0b0", hatch="//////", linewidth=0)
        columns = _thin(table.steps, matrix, record.phases)
        panel.pcolormesh(columns.edges, np.arange(count + 1) - 0.5, columns.values, norm=shades, cmap=_LAYER_COLORS)
        part_phases(panel, record.phases)
        frozen = " (hatched: frozen)" if np.isnan(matrix).any() else ""
        name_panel(panel, f"{group}: gradient norm by layer{frozen}", record.phases, texts)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        add_shades(panel, shades, colormaps[_LAYER_COLORS])
    return _figure_of(panels[0])


def plot_layer_comparison(*runs: RunSource) -> Figure:
    """Plot each layer's median gradient norm by group, the middle 80 % shaded; of several runs, a panel per group.

    Steps at which a layer was frozen don't count.

    Raises:
        DataError: A run is missing, or kept no gradient log.
    """
    records = open_runs(runs)
    matrices = [_layers_of(record, record.layer_norms) for record in records]
    if len(records) == 1:
        profiles = {"": [(group, GROUP_STYLES[group], matrix) for group, matrix in matrices[0].items()]}
    else:
        groups = dict.fromkeys(group for each in matrices for group in each)
        profiles = {
            f", {group}": [(str(n + 1), _run_style(n), each[group]) for n, each in enumerate(matrices) if group in each]
            for group in groups
        }
    labels = [label for lines in profiles.values() for label, _, _ in lines]
    heights = [1.4 if len(records) == 1 else 1.1] * len(profiles)
    key = _key(records)
    if any(len(_find_gaps(matrix)) for each in matrices for matrix in each.values()):
        key["A line breaks where layers were trained in other steps."] = None
    panels = new_figure(heights, across="layer", labels=labels, key=key)
    lows_and_highs = []
    ends: list[list[LineEnd]] = []
    for panel, (title, lines) in zip(panels, profiles.items(), strict=True):
        band = "; the band is the middle 80 %" if len(records) == 1 else ""
        name_panel(panel, f"median gradient norm{title}{band}")
        ends.append([])
        for label, style, matrix in lines:
            low, middle, high = _percentiles(matrix, (10, 50, 90))
            layers = np.arange(len(matrix), dtype=np.float64)
            gaps = _find_gaps(matrix)
            across = np.insert(layers, gaps, np.nan)
            _draw(panel, across, np.insert(middle, gaps, np.nan), style, label=label, marker="o")
            if len(records) == 1:
                band_low, band_high = np.insert(low, gaps, np.nan), np.insert(high, gaps, np.nan)
                panel.fill_between(across, band_low, band_high, color=style[0], alpha=0.15, linewidth=0)
            lows_and_highs += [low, high] if len(records) == 1 else [middle]
            ends[-1].append(_end(layers, middle, label, style))
    scale_values(panels, lows_and_highs)
    for panel, of_panel in zip(panels, ends, strict=True):
        label_ends(panel, of_panel)
    return _figure_of(panels[0])


def plot_gradient_evolution(run: RunSource) -> Figure:
    """Plot where the gradient was over the steps: the share of each group, and of each layer, in its squared norm.

    Raises:
        DataError: The run is missing, or kept no gradient log.
    """
    [record] = open_runs([run])
    table, layers = record.group_norms, record.layer_norms
    by_layer = measure_shares(layer_totals(_layers_of(record, layers)))
    by_group = measure_shares(np.stack(list(table.groups.values())))
    texts, key = _name_phases(record, [BAR_ROOM])
    panels = new_figure([0.95, 1.25], labels=[BAR_ROOM], key=key)
    _stack_groups(panels[0], _thin(table.steps, by_group, record.phases), list(table.groups), record.phases)
    count = len(by_layer)
    shades = colormaps[_LAYER_COLORS].resampled(count)
    columns = _thin(layers.steps, by_layer, record.phases)
    for band in _stack(panels[1], columns, [shades(layer) for layer in range(count)]):
        band.set_antialiased(False)  # Else the background shows between neighbours.
    for panel, title in zip(panels, ("share of the squared gradient norm, by group", "by layer"), strict=True):
        name_panel(panel, title, record.phases, texts)
        part_phases(panel, record.phases)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    shown = sorted({0, count // 2, count - 1})
    add_color_bar(panels[1], shades, {(layer + 0.5) / count: str(layer) for layer in shown}, title="layer")
    return _figure_of(panels[0])


def _overlay(records: Sequence[RunRecord], curves: Mapping[str, str], *, fits_scale: bool = False) -> Figure:
    """Draw a panel for each curve that any run has, and a line per run that has it."""
    shown = {title: name for title, name in curves.items() if any(record.has_curve(name) for record in records)}
    if not shown:
        records[0].curve(next(iter(curves.values())))
    labels = [str(number) for number in range(1, len(records) + 1)]
    panels = new_figure([1.25] * len(shown), labels=labels, key=_key(records))
    for panel, (title, name) in zip(panels, shown.items(), strict=True):
        ends = []
        for number, record in enumerate(records):
            if record.has_curve(name):
                steps, values = record.curve(name)
                marker = "o" if name == "eval_loss" else ""
                _draw(panel, steps, values, _run_style(number), label=labels[number], linewidth=0.8, marker=marker)
                ends.append(_end(steps, values, labels[number], _run_style(number)))
        if fits_scale:
            scale_values([panel], [record.curve(name)[1] for record in records if record.has_curve(name)])
        name_panel(panel, title)
        label_ends(panel, ends)
    return _figure_of(panels[0])


def _name_phases(record: RunRecord, labels: Sequence[str]) -> tuple[dict[str, str], dict[str, Style | None]]:
    """Return what the phases trained: above axes with `labels` beside them where there is room, else in lines below."""
    texts, phases = describe_phases(record), record.phases
    letters = count_letters(labels) / (phases[-1].end - phases[0].start) if phases else 0.0
    rooms = {phase.name: (phase.end - phase.start) * letters for phase in phases}
    above = {name: text for name, text in texts.items() if len(f"{name}: {text}") <= rooms[name]}
    return above, {f"phase {name}: {text}": None for name, text in texts.items() if name not in above}


def _key(records: Sequence[RunRecord]) -> dict[str, Style | None]:
    if len(records) == 1:
        return {}
    return {f"{number + 1}  {record.name}": _run_style(number) for number, record in enumerate(records)}


def _find_gaps(matrix: Array) -> NDArray[np.int64]:
    """Return the layers of a group [layers, steps] that were trained in other steps than the layer before."""
    is_trained = np.isfinite(matrix)
    return np.flatnonzero((is_trained[1:] != is_trained[:-1]).any(axis=1)) + 1


def _run_style(number: int) -> Style:
    return RUN_STYLES[number % len(RUN_STYLES)]


def _draw(
    panel: Axes, x: Array, y: Array, style: Style, *, label: str, marker: str = "", linewidth: float = 1.1
) -> None:
    """Draw a line that breaks where there is no number; a value alone between two gaps becomes a dot."""
    known = np.isfinite(y)
    alone = known & ~np.roll(known, 1) & ~np.roll(known, -1) if len(y) > 1 else known
    dots = {"marker": marker} if marker else {"marker": "o", "markevery": np.flatnonzero(alone).tolist()}
    color, dashes = style
    panel.plot(x, y, color=color, linestyle=dashes, linewidth=linewidth, markersize=2.2, label=label, **dots)
    panel.lines[-1].set_clip_on(not marker)  # A dot on the border is shown whole.


def _stack(panel: Axes, columns: _Columns, colors: Sequence[Color]) -> list[PolyCollection]:
    edges, shares = columns.edges, columns.values
    panel.set_xlim(edges[0], edges[-1])
    return panel.stackplot(edges, np.append(shares, shares[:, -1:], axis=1), colors=colors, step="post", linewidth=0)


def _stack_groups(panel: Axes, columns: _Columns, names: Sequence[str], phases: Sequence[PhaseSpan]) -> None:
    """Stack the groups, each named inside its band, or beside it where the band is thin."""
    steps, edges, shares = columns
    bands = _stack(panel, columns, [GROUP_STYLES[name][0] for name in names])
    beside = []
    for band, name, base, share in zip(bands, names, np.cumsum(shares, axis=0) - shares, shares, strict=True):
        band.set(alpha=0.45, label=name)
        is_high = share > max(_NAMED_SHARE, 0.8 * share.max())
        is_high[np.searchsorted(steps, [phase.start for phase in phases[1:]])] = False  # A border crosses no name.
        middle = _middle_of_longest(steps, is_high)
        if middle is not None:
            write_inside(panel, name, (float(steps[middle]), float(base[middle] + share[middle] / 2)))
        elif share[-1] > 0:
            beside.append(LineEnd((float(edges[-1]), float(base[-1] + share[-1] / 2)), name, GROUP_STYLES[name][0]))
    label_ends(panel, beside)


def _middle_of_longest(steps: Array, mask: Array) -> int | None:
    """Return the index in the middle of the longest stretch where `mask` holds, if that is a fifth of the steps."""
    stretches = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))).reshape(-1, 2)
    if not len(stretches):
        return None
    start, end = stretches[np.argmax(stretches[:, 1] - stretches[:, 0])]
    return int(start + end - 1) // 2 if (end - start) * 5 >= len(steps) else None


def _layers_of(record: RunRecord, table: NormTable) -> dict[str, Array]:
    if not table.layers:
        raise DataError(f"{record.run.layer_norms} has no norm of any layer: nothing in the layers was trained.")
    return table.layers


class _Columns(NamedTuple):
    """What is drawn of a matrix [rows, steps]."""

    steps: Array
    """[columns] middle of each."""
    edges: Array
    """[columns + 1] borders: those of the phases, else halfway to the neighbours; from the first step to the last."""
    values: Array
    """[rows, columns]"""


def _thin(steps: Array, matrix: Array, phases: Sequence[PhaseSpan]) -> _Columns:
    """Return no more columns than can be seen, each the mean of its steps."""
    middles, values = steps, matrix
    if len(steps) > _MOST_COLUMNS:
        parts = np.array_split(np.arange(len(steps)), _MOST_COLUMNS)
        means = [np.ma.masked_invalid(matrix[:, part]).mean(axis=1).filled(np.nan) for part in parts]
        middles, values = np.array([steps[part].mean() for part in parts]), np.stack(means, axis=1)
    edges = np.concatenate([[steps[0] - 0.5], (middles[1:] + middles[:-1]) / 2, [steps[-1] + 0.5]])
    for phase in phases[1:]:
        edges[np.searchsorted(middles, phase.start)] = phase.start
    return _Columns(middles, edges, values)


def _percentiles(matrix: Array, percents: Sequence[float]) -> Array:
    """Return percentiles of each row over the steps at which it has a number [percents, rows]."""
    rows = [row[np.isfinite(row)] for row in matrix]
    return np.array([np.percentile(row, percents) if len(row) else [np.nan] * len(percents) for row in rows]).T


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > 1.5 * low else (low / 1.5, high * 1.5)


def _end(x: Array, y: Array, text: str, style: Style) -> LineEnd:
    known = np.flatnonzero(np.isfinite(y))
    last = known[-1] if len(known) else -1
    return LineEnd((float(x[last]), float(y[last])), text, style[0])


def _figure_of(panel: Axes) -> Figure:
    return cast("Figure", panel.figure)
