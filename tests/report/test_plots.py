"""The plots: which there are, names that collide with nothing, plain ticks, the same bytes."""

import math
from itertools import combinations

import matplotlib
import pytest

from moe_lm.report.names import wrapped
from moe_lm.report.placement import Box, nearest, place_labels
from moe_lm.report.plots import draw_figures, draw_plots, fixed_style
from moe_lm.report.results import read_runs
from moe_lm.report.ticks import log_ticks, tick_label

POINTS = ("perplexity", "perplexity_operations", "perplexity_parameters", "perplexity_flops")
CURVES = ("curves", "training", "validation")
BALANCE = ("balance", "cv_importance", "cv_load", "max_over_mean_load", "max_over_mean_tokens")


def figures_of(folder):
    with fixed_style():
        return dict(draw_figures(read_runs(folder)))


@pytest.fixture(scope="module")
def drawn(study):
    return figures_of(study)


def boxes_of(figure):
    """For each pair of axes, its own box and those of the names in it."""
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        yield axes, axes.get_window_extent(renderer), [t.get_window_extent(renderer) for t in axes.texts]


@pytest.fixture(scope="module")
def crowded(crowd):
    return figures_of(crowd)


def test_every_plot_is_there(drawn):
    assert set(drawn) == {*POINTS, *CURVES, *BALANCE}
    assert [len(drawn[name].axes) for name in ("perplexity", "curves", "balance")] == [3, 2, 4]


@pytest.mark.parametrize("name", POINTS)
def test_names_overlap_nothing_and_stay_in_the_axes(drawn, name):
    for axes, area, boxes in boxes_of(drawn[name]):
        texts = {text.get_text() for text in axes.texts}
        assert texts == {"lstm_4x512", "moe_1_wide", "moe_4", "moe_32", "moe_256"}
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(area.x0 <= box.x0 and box.x1 <= area.x1 for box in boxes)
        assert all(area.y0 <= box.y0 and box.y1 <= area.y1 for box in boxes)
        markers = [
            axes.transData.transform(xy) for line in axes.lines if line.get_marker() in "os" for xy in line.get_xydata()
        ]
        assert not any(box.contains(*marker) for box in boxes for marker in markers)


def test_crowded_names_are_left_out_rather_than_overlap(crowded):
    for figure in crowded.values():
        for _, area, boxes in boxes_of(figure):
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
            assert all(area.x0 <= box.x0 and box.x1 <= area.x1 for box in boxes)


def test_legends_and_axis_labels_stay_on_the_figure(drawn, crowded):
    for figure in (*drawn.values(), *crowded.values()):
        tight = figure.get_tightbbox(figure.canvas.get_renderer())
        width, height = figure.get_size_inches()
        assert 0 <= tight.x0 < tight.x1 <= width
        assert 0 <= tight.y0 < tight.y1 <= height


def test_ticks_are_plain_at_nearly_equal_operations(drawn):
    axis = drawn["perplexity_operations"].axes[0].xaxis
    labels = [label.get_text() for label in axis.get_ticklabels()]
    assert labels == ["7.5", "8", "8.5", "9", "9.5"]
    assert axis.get_offset_text().get_text() == ""


def test_dense_and_moe_models_differ_in_marker_and_colour(drawn):
    lines = drawn["perplexity_parameters"].axes[0].lines
    looks = {(line.get_marker(), line.get_color()) for line in lines if line.get_marker() in "os"}
    assert {marker for marker, _ in looks} == {"s", "o"}
    assert len({colour for _, colour in looks}) == 2


def test_the_sweep_joins_moe_models_in_order_of_parameters(drawn):
    (line,) = [line for line in drawn["perplexity_parameters"].axes[0].lines if len(line.get_xdata()) == 3]
    assert line.get_xdata() == pytest.approx([8.4, 37.8, 272.9])
    assert line.get_ydata() == pytest.approx([45.0, 39.7, 35.5])  # moe_256 is the mean of 35.7 and 35.3


def test_hierarchical_mixtures_have_their_own_mark_and_line(make_run, tmp_path):
    for n, name in enumerate(("moe_4", "moe_32", "moe_256_h", "moe_1024_h")):
        gate = {"model": {"layers": {"middle": {"primary_gate": {"_partial_": True}}}}} if name.endswith("h") else {}
        make_run(name, settings=gate, parameters_without_embedding_and_softmax=8e6 * 4**n)
    lines = figures_of(tmp_path / "study")["perplexity_parameters"].axes[0].lines
    assert sorted(list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2) == [[8, 32], [128, 512]]
    assert {line.get_marker() for line in lines if len(line.get_xdata()) == 1} == {"o", "D"}


def test_models_of_equal_parameters_are_joined_by_cost(make_run, tmp_path):
    """As the paper's mixtures of about 4.3 thousand million parameters; the smallest may have a few more of them."""
    for name, operations, parameters in (("small", 9e6, 4303e6), ("medium", 34e6, 4302e6), ("high", 143e6, 4371e6)):
        make_run(name, operations_per_timestep=operations, parameters_without_embedding_and_softmax=parameters)
    figures = figures_of(tmp_path / "study")
    (line,) = [line for line in figures["perplexity_operations"].axes[0].lines if len(line.get_xdata()) == 3]
    assert list(line.get_xdata()) == [9, 34, 143]
    assert not [line for line in figures["perplexity_parameters"].axes[0].lines if len(line.get_xdata()) == 3]


def test_an_ablation_at_equal_parameters_is_not_joined(crowded):
    axes = crowded["perplexity_parameters"].axes[0]
    assert not any(line.get_linestyle() == "-" and line.get_linewidth() > 1 for line in axes.lines)


def test_validation_is_drawn_unsmoothed_for_unfinished_runs_too(drawn):
    figure = drawn["validation"]
    assert [text.get_text() for text in figure.legends[0].get_texts()].count("moe_1024_h (unfinished)") == 1
    assert len(figure.axes[0].lines) == 7
    assert list(figure.axes[0].lines[0].get_ydata()) == [100.0, 50.0, 500 / 15, 25.0]


def test_dense_models_alone_have_no_balance(make_run, tmp_path):
    make_run("lstm", experts=0)
    assert set(figures_of(tmp_path / "study")) == {*POINTS, *CURVES}


def test_an_unfinished_run_alone_has_curves(make_run, tmp_path):
    make_run("moe_4", finished=False)
    assert set(figures_of(tmp_path / "study")) == {*CURVES, *BALANCE}


def test_diverged_runs_leave_the_others_their_plots(make_run, tmp_path):
    make_run("moe_4")
    metrics = make_run("moe_32", perplexity={"test": math.inf, "valid": math.nan}) / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"words": 11000000, "nats_per_word": NaN}\n')
    figure = figures_of(tmp_path / "study")["perplexity_operations"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["moe_4"]


def test_odd_names_are_plain_text(make_run, tmp_path):
    make_run("_a$x^2$<&é")
    figures = figures_of(tmp_path / "study")
    assert figures["perplexity_flops"].axes[0].texts[0].get_text() == "_a$x^2$<&é"
    assert figures["training"].legends[0].get_texts()[0].get_text() == "_a$x^2$<&é"


def test_the_readers_own_settings_change_nothing_and_stay(make_run, tmp_path):
    make_run("lstm", experts=0, finished=False)
    runs = read_runs(tmp_path / "study")
    first = draw_plots(runs)
    with matplotlib.rc_context({"font.size": 30, "axes.linewidth": 9}):
        assert draw_plots(runs) == first
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.linewidth"]) == (30, 9)
    assert all(formats["png"].startswith(b"\x89PNG") for formats in first.values())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 1000, [1, 10, 100, 1000]),
        (6, 400, [10, 30, 100, 300]),
        (33, 48, [35, 40, 45]),
        (7.3, 9.9, [7.5, 8, 8.5, 9, 9.5]),
        (0.02, 0.3, [0.03, 0.1, 0.3]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert log_ticks(low, high) == ticks


def test_tick_labels_are_written_out():
    assert [tick_label(value) for value in (0.3, 8.4, 4300.0, 137577.6)] == ["0.3", "8.4", "4,300", "137,577.6"]


def test_long_names_break_at_commas_and_else_anywhere():
    assert wrapped("moe_4,seed=2", 20) == "moe_4,seed=2"
    assert wrapped("moe_4,seed=2", 8) == "moe_4,\nseed=2"
    assert wrapped("abcdefgh", 3) == "abc\ndef\ngh"


def test_names_of_points_upon_each_other_stand_at_their_own():
    """Two points that nearly meet, near the left edge, a line from the upper one: no name beside the other point."""
    upper, lower, area = (20.0, 103.0), (20.0, 100.0), Box(0, 0, 300, 200)
    boxes = place_labels([lower, upper], [(60, 10), (36, 10)], area, [lower, upper], [(upper, (86.0, 95.0))])
    for own, other, box in zip((lower, upper), (upper, lower), boxes, strict=True):
        assert math.dist(own, nearest(box, own)) <= math.dist(other, nearest(box, other))


def test_a_name_without_room_has_no_place():
    area = Box(0, 0, 30, 30)
    assert place_labels([(15, 15)], [(40, 10)], area, [(15, 15)], []) == [None]
