"""Figures hold what the files hold: lines, gaps, shaded phases; and one column's width is enough to read them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from smolora.analysis.canvas import FONT_SIZE, RUN_STYLES, displayable, render_png
from smolora.analysis.plots import (
    plot_gradient_evolution,
    plot_gradient_norms,
    plot_layer_comparison,
    plot_layer_heatmap,
    plot_training_loss,
)
from smolora.analysis.run_record import RunRecord
from smolora.errors import DataError
from tests.run_folders import read_table, write_run

PLOTS = (
    plot_training_loss,
    plot_gradient_norms,
    plot_layer_heatmap,
    plot_layer_comparison,
    plot_gradient_evolution,
)
GRADIENT_PLOTS = PLOTS[1:]
EVAL_LOSSES = {0: 4.1, 6: 2.5, 12: 2.7}


@pytest.fixture
def run(tmp_path):
    phases = (("both", 4), ("mlp", 8), ("attention", 12))
    return write_run(tmp_path / "run", phases=phases, eval_losses=EVAL_LOSSES)


def line(panel, label):
    [found] = [line for line in panel.lines if line.get_label() == label]
    return found


def draw(figure):
    """Return the pixels [height, width, 3] at 200 dots an inch."""
    figure.set_dpi(200)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_the_lines_of_the_norms_are_the_columns_of_the_file(run):
    [panel] = plot_gradient_norms(run).axes
    table = read_table(run / "gradient_analysis.group_norms.csv")
    for name in ("attention", "mlp", "total"):
        np.testing.assert_array_equal(line(panel, name).get_xdata(), table["step"])
        np.testing.assert_allclose(line(panel, name).get_ydata(), table[name])


def test_frozen_groups_are_gaps(run):
    [panel] = plot_gradient_norms(run).axes
    attention = np.asarray(line(panel, "attention").get_ydata())
    assert np.flatnonzero(np.isnan(attention)).tolist() == [4, 5, 6, 7]


def test_a_value_between_two_gaps_is_drawn_as_a_dot(tmp_path):
    run = write_run(tmp_path / "run", phases=(("mlp", 4), ("both", 5), ("mlp", 9)))
    [panel] = plot_gradient_norms(run).axes
    assert line(panel, "attention").get_markevery() == [4]
    assert line(panel, "mlp").get_markevery() == []


def test_norms_over_decades_take_a_logarithmic_axis_and_others_start_at_zero(tmp_path):
    wide = write_run(tmp_path / "wide", phases=(("both", 50),))
    narrow = write_run(tmp_path / "narrow", phases=(("both", 2),))
    assert plot_gradient_norms(wide).axes[0].get_yscale() == "log"
    assert plot_gradient_norms(narrow).axes[0].get_yscale() == "linear"
    assert plot_gradient_norms(narrow).axes[0].get_ylim()[0] == 0


@pytest.mark.parametrize("plot", [plot_training_loss, plot_gradient_norms])
def test_phases_are_shaded_where_they_are(run, plot):
    [panel] = plot(run).axes
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches]
    assert spans == [(1.0, 4.5), (4.5, 8.5), (8.5, 12.0)]
    shades = [patch.get_facecolor() for patch in panel.patches]
    assert shades[0] == shades[2] != shades[1]


def test_phases_are_named_with_what_they_trained_as_far_as_there_is_room(tmp_path, run):
    assert {"phase 1", "phase 2: mlp", "3: attention", "phase 1: attention and mlp"} <= set(
        texts(plot_gradient_norms(run))
    )
    short = write_run(tmp_path / "short", phases=(("both", 2), ("mlp", 40)))
    assert {"1", "phase 2: mlp", "phase 1: attention and mlp"} <= set(texts(plot_gradient_norms(short)))
    narrow = write_run(tmp_path / "narrow", phases=(("attention", 2), ("mlp", 40)))
    assert {"1", "phase 2: mlp", "phase 1: attention"} <= set(texts(plot_gradient_norms(narrow)))


def test_a_run_of_one_phase_has_no_shade(tmp_path):
    [panel] = plot_gradient_norms(write_run(tmp_path / "run")).axes
    assert len(panel.patches) == 0


def test_layers_are_named_where_a_phase_trains_some(tmp_path):
    run = write_run(tmp_path / "run", phases=(("early", 10), ("late", 20)), num_layers=4)
    assert {
        "phase 1: attention and mlp, layers 0 to 1",
        "phase 2: attention and mlp, layers 2 to 3",
    } <= set(texts(plot_gradient_norms(run)))


def test_the_loss_is_the_logged_one_and_the_lowest_held_out_loss_is_marked(run):
    [panel] = plot_training_loss(run).axes
    steps, losses = RunRecord(run).curve("loss")
    np.testing.assert_array_equal(line(panel, "training").get_xydata(), np.stack([steps, losses], axis=1))
    assert line(panel, "held-out").get_xydata().tolist() == [[0, 4.1], [6, 2.5], [12, 2.7]]
    assert line(panel, "lowest").get_xydata().tolist() == [[6, 2.5]]
    assert "held-out\nlowest 2.500\nat step 6" in texts(panel.figure)


def test_a_held_out_loss_before_the_first_step_is_inside_the_axes(run):
    left, right = plot_training_loss(run).axes[0].get_xlim()
    assert (left, right) == (0, 12)


def test_a_band_is_named_where_it_is_high(run):
    panel = plot_gradient_evolution(run).axes[0]
    places = {text.get_text(): text.xy for text in panel.texts}
    assert 5 <= places["mlp"][0] <= 8
    assert 9 <= places["attention"][0] <= 12


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path):
    [panel] = plot_training_loss(
        write_run(tmp_path / "run", losses=[2.0, float("nan"), 1.0], phases=(("both", 3),))
    ).axes
    assert np.isnan(np.asarray(line(panel, "training").get_ydata())).tolist() == [False, True, False]


def test_the_heatmap_holds_the_norms_and_leaves_frozen_layers_out(run):
    panels = plot_layer_heatmap(run).axes[:2]
    layers = RunRecord(run).layer_norms.layers
    for panel, group in zip(panels, ("attention", "mlp"), strict=True):
        [mesh] = panel.collections
        shown = np.ma.filled(mesh.get_array(), np.nan).reshape(layers[group].shape)
        np.testing.assert_allclose(shown, layers[group])
        assert np.isnan(shown).any()
        assert panel.patch.get_hatch()


def test_columns_of_a_sparse_log_change_at_the_borders_of_phases_and_end_with_the_run(tmp_path):
    run = write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 12)))
    (run / "phase_report.json").write_text(json.dumps({"starts": [0, 4], "phases": []}))
    for file in (run / "gradient_analysis.layer_norms.csv", run / "metrics.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        head, rows = (lines[:1], lines[1:]) if file.suffix == ".csv" else ([], lines)
        file.write_text("".join([*head, rows[0], rows[1], rows[8], rows[11]]))
    [mesh] = plot_layer_heatmap(run).axes[0].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0.5, 1.5, 4.5, 10.5, 12.5]


def test_a_long_run_is_averaged_to_what_can_be_seen(tmp_path):
    run = write_run(tmp_path / "run", phases=(("both", 1000),), num_layers=1)
    [mesh] = plot_layer_heatmap(run).axes[0].collections
    assert mesh.get_array().size == 300
    assert mesh.get_coordinates()[0, [0, -1], 0].tolist() == [0.5, 1000.5], "all of the run"


def test_the_comparison_shows_each_layers_median_while_it_was_trained(run):
    [panel] = plot_layer_comparison(run).axes
    layers = RunRecord(run).layer_norms.layers
    for group, matrix in layers.items():
        np.testing.assert_allclose(line(panel, group).get_ydata(), np.nanmedian(matrix, axis=1))


def test_the_shares_are_those_of_the_squares_and_fill_the_height(run):
    bands = plot_gradient_evolution(run).axes[0].collections
    assert [band.get_label() for band in bands] == ["attention", "mlp"]
    tops = [float(band.get_paths()[0].vertices[:, 1].max()) for band in bands]
    assert tops == pytest.approx([1.0, 1.0])
    at_first_step = [vertex[1] for vertex in bands[0].get_paths()[0].vertices if vertex[0] == 0.5]
    table = read_table(run / "gradient_analysis.group_norms.csv")
    assert max(at_first_step) == pytest.approx((table["attention"][0] / table["total"][0]) ** 2)


def test_several_runs_are_overlaid_and_named_in_a_key(tmp_path, run):
    other = write_run(tmp_path / "other", eval_losses={0: 4.0, 20: 3.0})
    figure = plot_training_loss(run, other)
    assert len(figure.axes) == 2
    for panel, name in zip(figure.axes, ("loss", "eval_loss"), strict=True):
        for label, source in (("1", run), ("2", other)):
            steps, values = RunRecord(source).curve(name)
            np.testing.assert_array_equal(line(panel, label).get_xydata(), np.stack([steps, values], axis=1))
    assert {"1  run", "2  other"} <= set(texts(figure))


def test_runs_without_a_gradient_log_are_compared_by_their_total_norm(tmp_path, run):
    plain = write_run(tmp_path / "plain", has_gradients=False)
    [panel] = plot_gradient_norms(run, plain).axes
    np.testing.assert_allclose(line(panel, "2").get_ydata(), RunRecord(plain).curve("grad_norm")[1])


def test_layers_of_several_runs_have_one_scale_and_a_panel_per_group(tmp_path, run):
    attention_only = write_run(tmp_path / "other", phases=(("attention", 5),))
    panels = plot_layer_comparison(run, attention_only).axes
    assert [[found.get_label() for found in panel.lines] for panel in panels] == [["1", "2"], ["1"]]
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_a_phase_is_named_as_the_run_itself_said(run):
    report = {"starts": [0, 4, 8], "selects": ["*.down_proj", "early layers", "layer 2, B"], "phases": []}
    (run / "phase_report.json").write_text(json.dumps(report))
    found = " | ".join(texts(plot_gradient_norms(run)))
    assert all(f"{n}: {text}" in found for n, text in enumerate(report["selects"], 1))


def test_runs_differ_in_their_dashes_and_the_key_shows_them(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abc"]
    figure = plot_training_loss(*runs)
    shown = [(found.get_color(), found.get_linestyle()) for found in figure.artists[::-1]]
    assert shown == [(found.get_color(), found.get_linestyle()) for found in figure.axes[0].lines]
    assert len(shown) == 3
    assert all(a[1] != b[1] for a, b in itertools.pairwise(RUN_STYLES)), "the dashes of neighbours differ"
    assert len(set(RUN_STYLES)) == len(RUN_STYLES)


def test_labels_of_runs_that_stopped_at_one_step_do_not_overlap_and_stay_near_their_lines(tmp_path):
    runs = [write_run(tmp_path / str(n), losses=[3 + n / 1000] * 10, phases=(("both", 10),)) for n in range(4)]
    figure = plot_training_loss(*runs, write_run(tmp_path / "long", phases=(("both", 40),)))
    draw(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts if text.get_text() in "1234"]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    middle = figure.axes[0].transData.transform((10, 3))[1]
    assert min(box.y0 for box in boxes) < middle < max(box.y1 for box in boxes)


def test_layers_of_different_phases_are_not_joined(tmp_path):
    run = write_run(tmp_path / "run", phases=(("early", 10), ("late", 20)), num_layers=4)
    [panel] = plot_layer_comparison(run).axes
    x = np.asarray(line(panel, "mlp").get_xdata())
    np.testing.assert_array_equal(x, [0, 1, np.nan, 2, 3])
    assert "A line breaks where layers were trained in other steps." in texts(panel.figure)
    assert "median gradient norm; the band is the middle 80 %" in texts(panel.figure)


@pytest.mark.parametrize("plot", PLOTS)
def test_every_figure_is_one_column_wide_with_type_of_7_points(run, plot):
    figure = plot(run)
    render_png(figure, dpi=50)
    assert figure.get_figwidth() == 3.4
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= FONT_SIZE >= 7


@pytest.mark.parametrize("plot", PLOTS)
def test_nothing_is_cut_off_at_the_border(run, plot):
    pixels = draw(plot(run))
    border = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert (border == 255).all()
    assert (pixels < 128).any()


@pytest.mark.parametrize("plot", PLOTS)
def test_a_run_of_a_single_step_is_drawn(tmp_path, plot):
    run = write_run(tmp_path / "run", phases=(("both", 1),), num_layers=1)
    assert render_png(plot(run), dpi=50)


def test_labels_at_line_ends_do_not_overlap(tmp_path):
    run = write_run(tmp_path / "run", phases=(("mlp", 20),))
    figure = plot_gradient_norms(run)
    draw(figure)
    total, mlp = (next(t for t in figure.findobj(Text) if t.get_text() == name) for name in ("total", "mlp"))
    assert not Text.get_window_extent(total).overlaps(Text.get_window_extent(mlp)), (
        "without the lines that lead to them"
    )


def test_the_same_run_gives_the_same_picture(run):
    assert render_png(plot_layer_heatmap(run)) == render_png(plot_layer_heatmap(run))


@pytest.mark.parametrize("name", ["$x_{1}", r"$\frac$", "日本", "new\nline", "x" * 200])
def test_a_name_is_text_whatever_it_holds(tmp_path, name):
    runs = [write_run(tmp_path / folder / name) for folder in ("a", "b")]
    figure = plot_training_loss(*runs)
    assert render_png(figure, dpi=50)
    assert all("\n" not in text for text in texts(figure))


def test_letters_that_the_font_lacks_become_question_marks():
    assert displayable("日本 é") == "?? é"


@pytest.mark.parametrize("plot", GRADIENT_PLOTS)
def test_a_run_without_a_gradient_log_says_what_is_missing_and_what_to_do(tmp_path, plot):
    run = write_run(tmp_path / "run", has_gradients=False)
    with pytest.raises(DataError, match=r"gradient_analysis\.\w+\.csv: this run kept no gradient log.*train again"):
        plot(run)


def test_a_run_that_has_logged_no_step_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 4.1}\n')
    with pytest.raises(DataError, match="has no 'loss' as yet"):
        plot_training_loss(run)


def test_no_run_is_said():
    with pytest.raises(DataError, match="no run was named"):
        plot_training_loss()
