"""The plot of a comparison: losses by seed, and differences to the first configuration with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from matplotlib.figure import Figure

from smolora.analysis.canvas import FAINT, RUN_STYLES, LineEnd, displayable, label_ends, name_panel, new_figure
from smolora.analysis.paired import PairedDifference


def plot_comparison(losses: Mapping[str, Sequence[float]], pairs: Mapping[str, PairedDifference]) -> Figure:
    """Plot the lowest held-out losses by seed, and the differences to the first configuration.

    Args:
        losses: By configuration, the first one first.
        pairs: The differences of the others, whose intervals are the shaded bands.
    """
    styles = dict(zip(losses, RUN_STYLES, strict=False))
    names = {name: displayable(name, longest=16) for name in losses}
    above, below = new_figure([1.3, 1.3], across="seed", labels=list(names.values()))
    for name, values in losses.items():
        color, dashes = styles[name]
        above.plot(range(len(values)), values, color=color, linestyle=dashes, marker="o", markersize=2.5, linewidth=0.8)
    for name, pair in pairs.items():
        color, dashes = styles[name]
        below.axhspan(pair.low, pair.high, color=color, alpha=0.15, linewidth=0)
        below.plot(
            range(len(pair.differences)), pair.differences, color=color, linestyle="", marker="o", markersize=2.5
        )
        below.axhline(pair.mean, color=color, linestyle=dashes, linewidth=0.8)
    below.axhline(0, color=FAINT, linewidth=0.5)
    name_panel(above, "lowest held-out loss, nats per token")
    name_panel(below, f"difference to {names[next(iter(losses))]}; the bands are intervals of the mean")
    label_ends(above, [LineEnd((len(v) - 1.0, v[-1]), names[name], styles[name][0]) for name, v in losses.items()])
    label_ends(below, [LineEnd((len(p.differences) - 1.0, p.mean), names[n], styles[n][0]) for n, p in pairs.items()])
    return cast("Figure", above.figure)
