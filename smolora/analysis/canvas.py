"""A figure one column wide (3.4 inches), and what every plot shares: colours, shaded phases, labels at line ends.

Figures are made without pyplot, so nothing global is touched and nothing has to be closed. Text is never read as
mathematics: a run's name may hold a dollar sign.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.markers import TICKRIGHT
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from smolora.analysis.run_record import Array, PhaseSpan

FONT_SIZE = 7.0
"""In points; nothing is printed smaller."""

INK, FAINT, SHADE = "#222222", "#595959", "#e9e9e9"

Dashes = str | tuple[int, tuple[float, ...]]
Style = tuple[str, Dashes]

GROUP_STYLES: dict[str, tuple[str, Dashes]] = {
    "attention": ("#0072B2", "-"),
    "mlp": ("#D55E00", (0, (4, 1.2))),
    "embed": ("#009E73", (0, (4, 1, 1, 1))),
    "lm_head": ("#AA4499", (0, (1, 1))),
    "norm": ("#56B4E9", (0, (6, 2))),
    "other": ("#B87800", (0, (2, 2))),
    "total": (INK, "-"),
}
"""Colours that colour-blind people tell apart (Okabe and Ito's, one darkened), and a dash pattern each for the rest."""

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#B87800", INK)
_DASHES: tuple[Dashes, ...] = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (6, 1.2, 1, 1.2)))
RUN_STYLES: list[tuple[str, Dashes]] = [
    (_COLORS[number % len(_COLORS)], _DASHES[number % len(_DASHES)]) for number in range(len(_COLORS) * len(_DASHES))
]
"""Neighbours differ in both; 7 and 4 have no common factor, so that all of them differ."""

_WIDTH = 3.4
_LEFT, _TOP, _BOTTOM = 0.4, 0.32, 0.33
_GAP = 0.36
_LINE = 0.13
_CHARACTER = 0.056
"""About the width of a letter, in inches, as all lengths here."""

_VEIL = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.3}

_COLUMNS = 10
"""Stacks of labels that a panel is divided into."""

_TICKS = [1, 2, 5, 10]

_BAR = (1.03, 1.065)
"""Where a colour bar begins and ends, in widths of its panel."""

BAR_ROOM = "0" * 8
"""A label as wide as a colour bar with its ticks."""


def new_figure(
    heights: Sequence[float],
    *,
    across: str = "step",
    labels: Sequence[str] = (),
    key: Mapping[str, Style | None] | None = None,
) -> list[Axes]:
    """Return axes one under another that share what runs across them.

    Args:
        heights: The height of each, in inches.
        across: What that is.
        labels: What will stand to the right of them: it decides their width.
        key: Lines of text under them, each after a sample of the line that it is about.
    """
    key = key or {}
    width = _measure_across(labels)
    total = _TOP + sum(heights) + _GAP * (len(heights) - 1) + _BOTTOM + _LINE * len(key)
    figure = Figure(figsize=(_WIDTH, total), facecolor="white")
    panels: list[Axes] = []
    top = total - _TOP
    for height in heights:
        box = (_LEFT / _WIDTH, (top - height) / total, width / _WIDTH, height / total)
        panels.append(figure.add_axes(box, sharex=panels[0] if panels else None))
        _style(panels[-1], across if len(panels) == len(heights) else None)
        top -= height + _GAP
    for number, (line, style) in enumerate(reversed(list(key.items()))):
        height = 3 + number * _LINE * 72
        _write(panels[-1], line, (24 if style else 3, height), at=(0, 0), coordinates="figure fraction")
        if style:
            at = (height + 2.5) / 72 / total
            sample = Line2D([3 / 72 / _WIDTH, 20 / 72 / _WIDTH], [at, at])
            figure.add_artist(sample).set(color=style[0], linestyle=style[1], linewidth=1.1)
    return panels


def count_letters(labels: Sequence[str]) -> float:
    """Return how many letters have room above axes with `labels` to the right of them."""
    return _measure_across(labels) / _CHARACTER


def _measure_across(labels: Sequence[str]) -> float:
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    return _WIDTH - _LEFT - 0.12 - _CHARACTER * longest


def _style(panel: Axes, across: str | None) -> None:
    panel.tick_params(which="both", labelsize=FONT_SIZE, color=FAINT, labelcolor=INK, length=2, width=0.5, pad=1.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set(linewidth=0.5, color=FAINT)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=_TICKS))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=_TICKS))
    panel.margins(x=0.02)
    if across:
        panel.set_xlabel(across, fontsize=FONT_SIZE, color=INK, labelpad=1)
    else:
        panel.tick_params(axis="x", which="both", labelbottom=False)


def name_panel(
    panel: Axes, title: str, phases: Sequence[PhaseSpan] = (), texts: Mapping[str, str] | None = None
) -> None:
    """Write above the axes what its values are, and each phase's name, with what it trains where `texts` has it.

    Call it when all is drawn. Beside the axes the words would cost a tenth of the width.
    """
    _write(panel, title, (2 - _LEFT * 72, 12 if phases else 5), at=(0, 1), va="bottom", weight="bold")
    if phases:
        _name_phases(panel, phases, texts or {})


def shade_phases(panel: Axes, phases: Sequence[PhaseSpan]) -> None:
    """Shade every other phase."""
    for number, phase in enumerate(phases):
        panel.axvspan(phase.start, phase.end, facecolor=SHADE if number % 2 else "white", linewidth=0, zorder=0)


def part_phases(panel: Axes, phases: Sequence[PhaseSpan]) -> None:
    """Draw a border between phases where areas leave no place for a shade."""
    for phase in phases[1:]:
        panel.axvline(phase.start, color="white", linewidth=1.2)
        panel.axvline(phase.start, color=INK, linewidth=0.5)


def _name_phases(panel: Axes, phases: Sequence[PhaseSpan], texts: Mapping[str, str]) -> None:
    left = min(phases[0].start, panel.dataLim.x0)  # What was measured before the first step is left of all phases.
    right = max(phases[-1].end, panel.dataLim.x1)
    panel.set_xlim(left, right)
    length = right - left
    letters = panel.get_position().width * _WIDTH / _CHARACTER
    for phase in phases:
        about = texts.get(phase.name)
        short = f"{phase.name}: {about}" if about else phase.name
        room = (phase.end - phase.start) / length * letters
        text = f"phase {short}" if len(f"phase {short}") <= room else short
        middle = ((phase.start + phase.end) / 2 - left) / length
        _write(panel, text, (0, 2), at=(middle, 1), ha="center", va="bottom", color=FAINT)


@dataclass(frozen=True)
class LineEnd:
    """The last point of a line, and its label."""

    at: tuple[float, float]
    text: str
    color: str


def label_ends(panel: Axes, ends: Sequence[LineEnd]) -> None:
    """Label lines where they end, each as near as the others let it; a thin line leads to a label that had to move."""
    panel.get_xlim()  # Settles the scale of both axes, which until now waits for all lines.
    to_fraction = panel.transData + panel.transAxes.inverted()
    stacks: dict[int, list[tuple[float, float, LineEnd]]] = {}
    for end in ends:
        x, y = map(float, to_fraction.transform(end.at))
        stacks.setdefault(_column(x), []).append((x, y, end))
    for column, stack in stacks.items():
        _label_stack(panel, sorted(stack, key=lambda place: place[1]), is_beside=column == _COLUMNS)


def _label_stack(panel: Axes, stack: Sequence[tuple[float, float, LineEnd]], *, is_beside: bool) -> None:
    """Label line ends at (x, y) of the axes, lowest first: beside the axes, or at the ends themselves."""
    box = panel.get_position()
    width, height = box.width * _WIDTH * 72, box.height * panel.figure.get_figheight() * 72  # type: ignore[union-attr]
    sizes = [(end.text.count("\n") + 1) * FONT_SIZE * 1.25 / height for _, _, end in stack]
    lowest = 0.0 if is_beside else sizes[0] / 2  # A label inside would cover the axis.
    for at, (x, y, end) in zip(_spread([y for _, y, _ in stack], sizes, lowest), stack, strict=True):
        shift = ((1 - x) * width + 6 if is_beside else 4, (at - y) * height)
        style: dict[str, object] = {} if is_beside else {"bbox": _VEIL}
        if abs(shift[1]) > FONT_SIZE / 2:
            leader = {"arrowstyle": "-", "color": end.color, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1}
            style["arrowprops"] = {**leader, "relpos": (0, 0.5)}
        _write(panel, end.text, shift, at=(x, y), coordinates="axes fraction", va="center", color=end.color, **style)


def _column(x: float) -> int:
    """Return which labels stand over one another: those of lines that end near each other, the last beside the axes."""
    return _COLUMNS if x >= 0.97 else int(x * _COLUMNS)


def _spread(wanted: Sequence[float], sizes: Sequence[float], lowest: float = 0.0) -> list[float]:
    """Return the positions in order, moved by as little as lets none overlap, from `lowest` to 1 if there is room.

    Less the room below each, positions must only not fall: the nearest such (isotonic regression) is a maximum of
    minima of means.

    >>> _spread([0.5, 0.5], [0.25, 0.25]), _spread([0.25, 0.25], [0.5, 0.5])
    ([0.375, 0.625], [0.0, 0.5])
    """
    room = np.concatenate([[0.0], np.cumsum([(a + b) / 2 for a, b in itertools.pairwise(sizes)])])
    free = np.array(wanted) - room[: len(wanted)]
    highest = 1 - room[-1]
    nearest = [
        max(min(free[low : high + 1].mean() for high in range(index, len(free))) for low in range(index + 1))
        for index in range(len(free))
    ]
    return [float(np.clip(at, min(lowest, highest), highest) + below) for at, below in zip(nearest, room, strict=False)]


def write_inside(panel: Axes, text: str, at: tuple[float, float]) -> None:
    """Write text at a place given in the units of the axes."""
    _write(panel, text, (0, 0), at=at, coordinates="data", ha="center", va="center")


def add_color_bar(panel: Axes, colors: Colormap, numbers: Mapping[float, str], *, title: str = "") -> None:
    """Draw all colours in a bar to the right of the axes, with numbers of up to about 5 characters beside it.

    It is drawn piece by piece: as axes of its own it would take longer than the rest of the panel.

    Args:
        panel: The axes.
        colors: From the bottom to the top.
        numbers: By their height, from 0 to 1.
        title: Written above it.
    """
    corners = np.stack(np.meshgrid(_BAR, np.linspace(0, 1, colors.N + 1)), axis=-1)
    strips = QuadMesh(corners, array=np.arange(colors.N)[:, None], cmap=colors, transform=panel.transAxes)
    ticks = Line2D([_BAR[1]] * len(numbers), list(numbers), transform=panel.transAxes)
    ticks.set(color=FAINT, linestyle="", marker=TICKRIGHT, markersize=2, markeredgewidth=0.5)
    for artist in (strips, ticks):
        cast("Figure", panel.figure).add_artist(artist)
    for height, number in numbers.items():
        _write(panel, number, (3.5, 0), at=(_BAR[1], height), va="center_baseline")
    if title:
        _write(panel, title, (0, 3), at=(_BAR[0], 1), va="bottom")


def add_shades(panel: Axes, shades: LogNorm, colors: Colormap) -> None:
    """Draw the colour bar of numbers on a logarithmic scale."""
    low, high = cast("float", shades.vmin), cast("float", shades.vmax)
    inside = [value for value in locate_decades(low, high).tick_values(low, high) if low <= value <= high]
    add_color_bar(panel, colors, {float(shades(value)): f"{value:g}" for value in inside})


def scale_values(panels: Sequence[Axes], values: Sequence[Array]) -> None:
    """Give all panels one scale: logarithmic where the values span more than a factor of 20, else from 0."""
    low, high = positive_range(values)
    for panel in panels:
        if high <= 20 * low:
            panel.set_ylim(0, 1.08 * high)
            continue
        panel.set_yscale("log", nonpositive="mask")
        panel.set_ylim(low / 1.3, high * 1.3)
        panel.yaxis.set_major_locator(locate_decades(low, high))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def locate_decades(low: float, high: float) -> Locator:
    """Return the places of a logarithmic axis' numbers: powers of ten, and numbers between them where those are few."""
    if high < 10 * low:  # Which may hold no power of ten, and one of 1, 2 and 5 times it.
        return MaxNLocator(nbins=5, steps=_TICKS)
    between = (1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)
    return LogLocator(subs=between, numticks=6)


def positive_range(values: Sequence[Array]) -> tuple[float, float]:
    """Return the least and the largest positive number of all; (1, 1) where there is none."""
    everything = np.concatenate([np.ravel(array) for array in values])
    positive = everything[np.isfinite(everything) & (everything > 0)]
    return (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)


def displayable(text: str, *, longest: int = 60) -> str:
    """Return text that the font can draw: what it lacks becomes a question mark, and a long text loses its middle.

    >>> displayable("a run with a long name", longest=12)
    'a run …g name'
    """
    font = get_font(findfont("DejaVu Sans"))
    drawn = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)
    return drawn if len(drawn) <= longest else f"{drawn[: longest // 2]}…{drawn[-(longest // 2) :]}"


def render_png(figure: Figure, *, dpi: int = 220) -> bytes:
    """Return a figure as the bytes of a PNG, compressed in half of the usual time to a tenth more bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def _write(
    panel: Axes,
    text: str,
    offset: tuple[float, float],
    *,
    at: tuple[float, float],
    coordinates: str = "axes fraction",
    **style: object,
) -> None:
    """Put text at `offset` points from a place."""
    settings = {"fontsize": FONT_SIZE, "color": INK, "parse_math": False, "annotation_clip": False, **style}
    lines = "\n".join(map(displayable, text.split("\n")))
    panel.annotate(lines, at, xytext=offset, xycoords=coordinates, textcoords="offset points", **settings)  # type: ignore[arg-type]
