"""What every plot shares: the numbers beside a logarithmic scale, and beside its colours."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import LogNorm

from smolora.analysis.canvas import LineEnd, add_shades, label_ends, locate_decades, new_figure


@pytest.mark.parametrize("low", [0.0021, 0.11, 1.0, 1.6, 2.1, 5.5, 73.0])
@pytest.mark.parametrize("ratio", [1.5, 2.1, 4.0, 9.9, 10.1, 31.0, 99.0, 301.0, 1e6])
def test_every_scale_has_two_numbers_at_least_and_no_crowd(low, ratio):
    high = low * ratio
    inside = [tick for tick in locate_decades(low, high).tick_values(low, high) if low <= tick <= high]
    assert 2 <= len(inside) <= 7, inside


def test_the_numbers_beside_a_colour_bar_stand_at_their_colours():
    shades, colors = LogNorm(0.5, 50), colormaps["cividis"]
    [panel] = new_figure([1.0])
    add_shades(panel, shades, colors)
    strips, ticks = panel.figure.artists
    values = [float(text.get_text()) for text in panel.texts]
    np.testing.assert_allclose(ticks.get_ydata(), shades(values), atol=1e-12)
    strips.update_scalarmappable()
    indices = (np.array(shades(values)) * colors.N).astype(int)
    np.testing.assert_allclose(strips.get_facecolor()[indices], colors(shades(values)))
    assert values == [1, 3, 10, 30]


def test_a_label_inside_the_axes_covers_no_axis():
    [panel] = new_figure([1.0])
    panel.plot([0, 1, 2], [1.0, 0.0, 1.0])
    panel.set_ylim(0, 1)
    label_ends(panel, [LineEnd((1.0, 0.0), "1", "black")])
    panel.figure.draw_without_rendering()
    [label] = panel.texts
    assert label.get_window_extent().y0 >= panel.bbox.y0
