"""A map holds what it was given, where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.analysis.layer_map import plot_layer_map
from smolora.errors import DataError


def test_the_cells_are_the_gradients_over_their_mean_and_what_is_not_there_is_white():
    densities = {
        "model.layers.0.mlp.up_proj": (0, 1.0),
        "model.layers.0.mlp.down_proj": (0, 3.0),
        "model.layers.1.mlp.up_proj": (1, 2.0),
        "lm_adapter": (None, 9.0),
    }
    panel = plot_layer_map(densities).axes[0]
    cells = panel.collections[0].get_array()
    np.testing.assert_allclose(cells.filled(np.nan), [[0.5, 1.5], [1.0, np.nan]])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["up", "down"]


def test_without_layers_there_is_no_map():
    with pytest.raises(DataError, match="no module is in a layer"):
        plot_layer_map({"lm_adapter": (None, 1.0)})
