"""A map of the layers: a number for every module, layers from bottom to top, kinds of module from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smolora.analysis.canvas import (
    BAR_ROOM,
    add_shades,
    name_panel,
    new_figure,
    positive_range,
)
from smolora.errors import DataError

_COLORS = "cividis"


def plot_layer_map(densities: Mapping[str, tuple[int | None, float]]) -> Figure:
    """Plot the gradient per parameter of every module over its mean; white where there is no module, or no gradient.

    Args:
        densities: Layer and gradient per parameter by path of the module; those outside of the layers aren't shown.

    Raises:
        DataError: No module is in a layer.
    """
    inside = {path: (layer, value) for path, (layer, value) in densities.items() if layer is not None}
    if not inside:
        raise DataError("no module is in a layer: there is nothing to map.")
    kinds = list(dict.fromkeys(_kind(path, layer) for path, (layer, _) in inside.items()))
    matrix = np.full((1 + max(layer for layer, _ in inside.values()), len(kinds)), np.nan)
    mean = np.mean([value for _, value in inside.values()])
    for path, (layer, value) in inside.items():
        matrix[layer, kinds.index(_kind(path, layer))] = value / mean
    low, high = positive_range([matrix])
    low = max(low, high / 1000)
    shades = LogNorm(low / 1.2, high * 1.2)
    [panel] = new_figure([min(3.0, max(0.9, 0.1 * len(matrix)))], across="module", labels=[BAR_ROOM])
    shown = np.ma.masked_where(~(matrix > 0), matrix)
    panel.pcolormesh(np.arange(len(kinds) + 1), np.arange(len(matrix) + 1) - 0.5, shown, norm=shades, cmap=_COLORS)
    panel.set_xticks(np.arange(len(kinds)) + 0.5, _shorten(kinds))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    name_panel(panel, "gradient per parameter by layer, over its mean")
    add_shades(panel, shades, colormaps[_COLORS])
    return cast("Figure", panel.figure)


def _kind(path: str, layer: int) -> str:
    """Return a module's path inside its layer.

    >>> _kind("model.layers.3.mlp.down_proj", 3)
    'mlp.down_proj'
    """
    return path.partition(f".{layer}.")[2]


def _shorten(kinds: Sequence[str]) -> list[str]:
    """Return the last part of each path, without what is always there; the whole paths where those are alike.

    >>> _shorten(["self_attn.q_proj", "mlp.up_proj"]), _shorten(["attn.c_proj", "mlp.c_proj"])
    (['q', 'up'], ['attn.c_proj', 'mlp.c_proj'])
    """
    short = [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds]
    return short if len(set(short)) == len(short) else list(kinds)
