"""The plots: which there are, legends that name every model, readable ticks, deterministic bytes."""

import math
from itertools import combinations

import matplotlib
import pytest
from matplotlib.figure import Figure

from moe_lm.report.axes import set_log_axis, tick_label
from moe_lm.report.plots import draw_figures, draw_plots, fixed_style, wrapped
from moe_lm.report.runs import read_runs

POINTS = ("perplexity", "perplexity_operations", "perplexity_parameters", "perplexity_flops")
CURVES = ("curves", "training", "validation")
BALANCE = ("balance", "cv_importance", "cv_load", "max_over_mean_load", "max_over_mean_tokens")


def figures_of(folder):
    with fixed_style():
        return dict(draw_figures(read_runs(folder)))


@pytest.fixture(scope="module")
def drawn(study):
    return figures_of(study)


def legend_of(figure):
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def markers_of(axes):
    """The filled markers of an axes, one for each model."""
    return [
        line for line in axes.lines if line.get_marker() in ("s", "o", "D") and line.get_markerfacecolor() != "none"
    ]


def look(line):
    return line.get_marker(), line.get_color(), line.get_fillstyle()


@pytest.fixture(scope="module")
def crowded(crowd):
    return figures_of(crowd)


def test_every_plot_is_there(drawn):
    assert set(drawn) == {*POINTS, *CURVES, *BALANCE}
    assert [len(drawn[name].axes) for name in ("perplexity", "curves", "balance")] == [3, 2, 4]


@pytest.mark.parametrize("name", POINTS)
def test_the_legend_names_every_model_by_its_marker(drawn, name):
    assert legend_of(drawn[name]) == ["lstm_4x512", "moe_1_wide", "moe_4", "moe_32", "moe_256"]
    handles = [look(handle) for handle in drawn[name].legends[0].legend_handles]
    assert len(set(handles)) == 5
    for axes in drawn[name].axes:
        assert [look(line) for line in markers_of(axes)] == handles


def test_many_models_still_have_different_markers(make_run, tmp_path):
    for n in range(20):
        make_run(f"moe_{n:02}", experts=4 * (n % 2), operations_per_timestep=1e6 + n)
    figure = figures_of(tmp_path / "study")["perplexity_operations"]
    assert len({look(handle) for handle in figure.legends[0].legend_handles}) == 20


def test_a_model_has_one_colour_in_all_plots(drawn):
    scatter, curves = drawn["perplexity_flops"].legends[0], drawn["training"].legends[0]
    colours = dict(zip(legend_of(drawn["training"]), (line.get_color() for line in curves.legend_handles), strict=True))
    for name, handle in zip(legend_of(drawn["perplexity_flops"]), scatter.legend_handles, strict=True):
        assert handle.get_color() == colours[name]


def test_no_text_overlaps_another(drawn, crowded):
    for figure in (*drawn.values(), *crowded.values()):
        renderer = figure.canvas.get_renderer()
        figure.draw_without_rendering()
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            texts += [axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_legends_and_axis_labels_stay_on_the_figure(drawn, crowded):
    for figure in (*drawn.values(), *crowded.values()):
        tight = figure.get_tightbbox(figure.canvas.get_renderer())
        width, height = figure.get_size_inches()
        assert 0 <= tight.x0 < tight.x1 <= width
        assert 0 <= tight.y0 < tight.y1 <= height


def test_ticks_are_plain_at_nearly_equal_operations(drawn):
    axis = drawn["perplexity_operations"].axes[0].xaxis
    low, high = axis.get_view_interval()
    labels = [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert labels == ["7.5", "8", "8.5", "9", "9.5"]
    assert axis.get_offset_text().get_text() == ""


def test_dense_and_moe_models_differ_in_their_marker(drawn):
    markers = [line.get_marker() for line in markers_of(drawn["perplexity_parameters"].axes[0])]
    assert markers == ["s", "s", "o", "o", "o"]


def test_the_sweep_joins_moe_models_in_order_of_parameters(drawn):
    (line,) = [line for line in drawn["perplexity_parameters"].axes[0].lines if len(line.get_xdata()) == 3]
    assert line.get_xdata() == pytest.approx([8.4, 37.8, 272.9])
    assert line.get_ydata() == pytest.approx([45.0, 39.7, 35.5])  # moe_256 is the mean of 35.7 and 35.3


def test_hierarchical_models_have_their_own_marker_and_line(make_run, tmp_path):
    for n, name in enumerate(("moe_4", "moe_32", "moe_256_h", "moe_1024_h")):
        gate = {"model": {"layers": {"middle": {"primary_gate": {"_partial_": True}}}}} if name.endswith("h") else {}
        make_run(name, settings=gate, parameters_without_embedding_and_softmax=8e6 * 4**n)
    lines = figures_of(tmp_path / "study")["perplexity_parameters"].axes[0].lines
    assert sorted(list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2) == [[8, 32], [128, 512]]
    assert {line.get_marker() for line in lines if len(line.get_xdata()) == 1} == {"o", "D"}


def test_models_of_equal_parameters_are_joined_by_cost(make_run, tmp_path):
    """As the paper's MoE models of about 4.3 billion parameters; the smallest may have slightly more of them."""
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
    assert legend_of(figure).count("moe_1024_h (unfinished)") == 1
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
    assert legend_of(figure) == ["moe_4"]


def test_a_model_with_one_seed_left_has_that_runs_name(make_run, tmp_path):
    make_run("moe_4", perplexity={"test": math.inf, "valid": math.nan})
    make_run("moe_4,seed=2", seed=2)
    assert legend_of(figures_of(tmp_path / "study")["perplexity_flops"]) == ["moe_4,seed=2"]


def test_odd_names_are_plain_text(make_run, tmp_path):
    make_run("_a$x^2$<&é")
    figures = figures_of(tmp_path / "study")
    assert legend_of(figures["perplexity_flops"]) == legend_of(figures["training"]) == ["_a$x^2$<&é"]


def test_the_users_own_settings_change_nothing_and_stay(make_run, tmp_path):
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
        (2.5, 10, [3, 5, 7, 10]),
        (33, 48, [35, 40, 45]),
        (7.3, 9.9, [7.5, 8, 8.5, 9, 9.5]),
        (0.02, 0.3, [0.02, 0.05, 0.1, 0.2]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    axis = Figure().subplots().xaxis
    set_log_axis(axis, [low, high], pad=0, least=1)
    assert [tick for tick in axis.get_majorticklocs() if low <= tick <= high] == pytest.approx(ticks)


def test_tick_labels_are_plain_numbers():
    assert [tick_label(value) for value in (0.3, 8.4, 4300.0, 137577.6)] == ["0.3", "8.4", "4,300", "137,577.6"]
    assert [tick_label(value) for value in (1.6e12, 1.25e12, 2e18)] == ["1.6e12", "1.25e12", "2e18"]


def test_long_names_break_after_commas_and_else_anywhere():
    assert wrapped("moe_4,seed=2", 20) == "moe_4,seed=2"
    assert wrapped("moe_4,seed=2", 8) == "moe_4,\nseed=2"
    assert wrapped("abcdefgh", 3) == "abc\ndef\ngh"
