"""Leverage and the fit over experts, at numbers worked by hand."""

import math

import pytest
from conftest import write_run

from moe_lm.report.plots import ExpertsPanel, draw_figure, fixed_style
from moe_lm.report.runs import read_runs
from moe_lm.report.scaling import families, fit_law, leverage, scaling_tables

DENSE = [(1.0, 100.0), (4.0, 80.0), (16.0, 70.0)]


def mixture(experts, k=4):
    layer = {"width": 64, "hidden": 128, "num_experts": experts, "k": k, "gate": {"_target_": "moe_lm.gate.top_k.TopK"}}
    return {"model": {"order": ["middle"], "layers": {"middle": layer}}}


def test_leverage_is_read_off_the_dense_curve():
    """Half-way in log perplexity from 100 to 80 is half-way in log cost from 1 to 4: a dense model of cost 2."""
    assert leverage((1.0, (100 * 80) ** 0.5), DENSE) == (pytest.approx(2.0), "")
    assert leverage((2.0, 80.0), DENSE) == (pytest.approx(2.0), "")
    assert leverage((0.5, 100.0), DENSE) == (2.0, "")
    assert leverage((2.0, 69.0), DENSE) == (8.0, ">")  # no dense model is as good
    assert leverage((2.0, 120.0), DENSE) == (0.5, "<")  # the smallest one is better
    # A larger dense model that is worse does not count: the first that is as good does.
    assert leverage((1.0, 85.0), [*DENSE[:2], (8.0, 90.0)]) == (
        pytest.approx(4 ** (math.log(100 / 85) / math.log(100 / 80))),
        "",
    )


def test_a_law_is_found_again_and_scatter_has_none():
    """60 + 40 E^-0.5 at 4, 16, 64, 256 experts: 80, 70, 65, 62.5; three counts have no floor: 100 E^-0.25."""
    law = fit_law([(4, 80.0), (16, 70.0), (64, 65.0), (256, 62.5)])
    assert (law.floor, law.factor, law.exponent) == pytest.approx((60, 40, 0.5), rel=0.01)
    assert law(1024) == pytest.approx(61.25, rel=1e-3)
    small = fit_law([(16, 81.2), (64, 80.2), (256, 78.7)])
    assert small.exponent == pytest.approx(math.log(81.2 / 78.7) / math.log(16), rel=1e-3)  # symmetric in log E
    assert fit_law([(1, 100.0), (2, 10.0), (4, 9.0), (8, 9.0)]) is None  # steeper than any that is searched
    assert fit_law([(1, 80.0), (2, 75.0), (4, 70.0), (8, 65.0)]).floor == 0  # straight in log E
    law = fit_law([(1, 100.0), (16, 50.0), (256, 25.0)])
    assert (law.floor, law.factor, law.exponent) == (0, pytest.approx(100), pytest.approx(0.25))
    assert fit_law([(4, 80.0), (16, 70.0)]) is None
    assert fit_law([(4, 80.0), (16, 70.0), (64, 82.0), (256, 69.0)]) is None
    assert fit_law([(4, 60.0), (16, 65.0), (64, 70.0), (256, 75.0)]) is None  # rises
    assert fit_law([(4, 60.0), (16, 60.0), (64, 60.0), (256, 60.0)]) is None


def test_tables_of_a_study(tmp_path):
    """Two seeds of a mixture against three widths of a dense layer with the same seeds; means, and the single seeds."""
    for seed, shift in ((1, 1.0), (2, 1.1)):
        for operations, loss in DENSE:
            figures = {"operations_per_timestep": operations * 1e6, "perplexity": {"test": loss * shift}}
            name = f"dense_{operations},seed={seed}"
            write_run(tmp_path, name, experts=0, preset="moe_1_wide", seed=seed, **figures)
        for experts, loss in ((4, 100.0), (16, 89.442719), (64, 80.0), (256, 69.0)):
            figures = {"operations_per_timestep": 1e6, "perplexity": {"test": loss * shift}}
            write_run(tmp_path, f"moe_{experts},seed={seed}", seed=seed, settings=mixture(experts), **figures)
    runs = read_runs(tmp_path)
    found, fit = scaling_tables(runs)
    texts = {row.name: row.figures["leverage_operations_per_timestep"] for row in found.rows}
    assert texts == {
        "moe_4": "1 × (1 × to 1 ×)",
        "moe_16": "2 × (2 × to 2 ×)",
        "moe_64": "4 × (4 × to 4 ×)",
        "moe_256": "> 16 × (> 16 × to > 16 ×)",
    }
    assert [row.name for row in fit.rows] == ["4 experts", "16 experts", "64 experts", "256 experts"]
    [family] = families(runs)
    assert [experts for experts, _ in family.points] == [4, 16, 64, 256]
    assert family.points[0][1] == pytest.approx(105.0)
    assert all(abs(row.figures["residual"]) < 3 for row in fit.rows)


def test_without_what_they_need_there_are_no_tables(tmp_path):
    """Two dense costs and two numbers of experts carry nothing; an unfinished run and a damaged model are no matter."""
    for operations in (1e6, 2e6):
        write_run(tmp_path, f"dense_{operations}", experts=0, operations_per_timestep=operations)
    for experts in (4, 16):
        write_run(tmp_path, f"moe_{experts}", settings=mixture(experts))
    write_run(tmp_path, "unfinished", finished=False, settings=mixture(64))
    write_run(tmp_path, "strange", settings={"model": {"order": 3, "layers": [1]}})
    write_run(tmp_path, "none", settings=mixture(256), perplexity={"valid": 3.0})
    assert scaling_tables(read_runs(tmp_path)) == []


def test_figures_that_have_no_place_are_left_out(tmp_path):
    """A mixture without a test perplexity, with a zero cost or none expert, and another text: no row, no traceback."""
    for operations, loss in DENSE:
        write_run(tmp_path, f"d{operations}", experts=0, operations_per_timestep=operations, perplexity={"test": loss})
    write_run(tmp_path, "good", settings=mixture(16), operations_per_timestep=1.0, perplexity={"test": 80.0})
    write_run(tmp_path, "none", settings=mixture(4), perplexity={"valid": 3.0})
    write_run(tmp_path, "null", settings=mixture(8), perplexity={"test": None})
    write_run(tmp_path, "infinite", settings=mixture(32), perplexity={"test": math.inf})
    write_run(tmp_path, "free", settings=mixture(64), operations_per_timestep=0)
    write_run(tmp_path, "empty", settings=mixture(0), words=3_000_000)
    write_run(tmp_path, "other_text", settings={**mixture(128), "corpus": {"name": "other"}}, perplexity={"test": 60.0})
    [table] = scaling_tables(read_runs(tmp_path))
    assert [row.name for row in table.rows] == ["good"]
    assert table.rows[0].figures["leverage_operations_per_timestep"] == "4 ×"


def test_runs_that_differ_in_more_than_experts_are_families_of_their_own(tmp_path):
    """4, 16, 64 experts at two learning rates: two fits, told apart by a letter, not one of their means."""
    for rate, shift in ((0.01, 0.0), (0.1, 100.0)):
        for experts, loss in ((4, 90.0), (16, 80.0), (64, 75.0)):
            settings = {**mixture(experts), "optimizer": {"learning_rate": rate}}
            write_run(tmp_path, f"moe_{experts}_{rate}", settings=settings, perplexity={"test": loss + shift})
    found = families(read_runs(tmp_path))
    assert [family.label for family in found] == ["mixtures A", "mixtures B"]
    assert {family.points[0][1] for family in found} == {90.0, 190.0}
    [table] = scaling_tables(read_runs(tmp_path))
    assert {row.name for row in table.rows} == {f"{n} experts (mixtures {x})" for n in (4, 16, 64) for x in "AB"}


def test_the_figure_has_points_a_law_and_the_dense_level(tmp_path):
    """Four counts on 60 + 40 E^-0.5: the line passes through the points, and the dense model is a horizontal line."""
    write_run(tmp_path, "dense", experts=0, perplexity={"test": 82.0})
    for experts, loss in ((4, 80.0), (16, 70.0), (64, 65.0), (256, 62.5)):
        write_run(tmp_path, f"moe_{experts}", settings=mixture(experts), perplexity={"test": loss})
    runs = read_runs(tmp_path)
    with fixed_style():
        figure = draw_figure([ExpertsPanel()], runs)
    points, law, dense = figure.axes[0].lines
    assert points.get_xydata().tolist() == [[4, 80], [16, 70], [64, 65], [256, 62.5]]
    line = dict(map(tuple, law.get_xydata()))
    assert {x: line[x] for x in (4, 16, 64, 256)} == pytest.approx({4: 80, 16: 70, 64: 65, 256: 62.5}, rel=1e-3)
    assert set(dense.get_ydata()) == {82.0}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["mixtures", "perplexity = 60.0 + 40.0 · E^−0.5", "dense"]
    assert draw_figure([ExpertsPanel()], runs[:2]) is None
