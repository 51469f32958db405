"""Comparison with the paper: which runs it covers, which figures are comparable, and what the page shows."""

import csv
import io

import pytest

from moe_lm.report.formats import to_csv
from moe_lm.report.paper_comparison import balance_tables, paper_tables
from moe_lm.report.plots import draw_figures, fixed_style
from moe_lm.report.runs import read_runs
from moe_lm.report.write import write_report

# The result of MoE-256 at the paper's size: 8.65, 272.9 and 1,086 million, on the paper's test text.
MOE_256 = {
    "preset": "moe_256",
    "operations_per_timestep": 8_650_752,
    "parameters_without_embedding_and_softmax": 272_891_904,
    "parameters_total": 1_086_207_999,
    "words": 7_989_499_120,
    "predicted_words": {"valid": 900, "test": 159_658},
    "perplexity": {"valid": 36.5, "test": 36.0},
}


def settings_of(preset: str, weights: tuple[float, float] = (0.1, 0.1), **changes) -> dict:
    """Return a made-up configuration of a preset with one layer; `changes` go into the model."""
    model = {"width": 512, "expert_hidden": 1024, "dropout": 0.1, "num_experts": 256} | changes
    layer = {"_target_": f"moe_lm.model.{preset}", "width": model["width"], "num_experts": model["num_experts"]}
    losses = dict(zip(("importance", "load"), ({"weight": weight} for weight in weights), strict=True))
    return {"model": model | {"layers": {"middle": layer}}, "balance": losses | {"global_batch": True}}


@pytest.fixture
def runs_of(tmp_path):
    """Read the runs written so far, each with the paper's model of its architecture."""
    return lambda: read_runs(tmp_path / "study", settings_of)


def shown(table):
    """Return the cells of a table as text, by row and column."""
    keys = [column.key for column in table.formats]
    return {row.name: dict(zip(keys, table.cells(row), strict=True)) for row in table.rows}


@pytest.fixture
def small(make_run):
    """Two runs of an eighth of the paper's width: the dense layer and 256 experts."""
    sizes = {"width": 64, "expert_hidden": 128}
    make_run("dense", experts=0, preset="moe_1_wide", words=4_000_000, settings=settings_of("moe_1_wide", **sizes))
    better = {"test": 40.5, "valid": 41.0}
    make_run("many", preset="moe_256", words=4_000_000, perplexity=better, settings=settings_of("moe_256", **sizes))


def test_a_run_at_the_papers_size_is_compared_with_its_figures(make_run, runs_of):
    make_run("moe_256", settings=settings_of("moe_256"), **MOE_256 | {"words": 3_994_749_560})
    (table,) = paper_tables(runs_of())
    assert table.name == "paper"
    row = shown(table)["moe_256"]
    assert (row["test_perplexity"], row["paper_perplexity"]) == ("36.0", "35.7")
    assert row["difference"] == "+0.8 %"  # 36.0 / 35.7 - 1
    assert row["words_share"] == "50.0 %"
    assert (row["operations_per_timestep"], row["paper_operations_millions"]) == ("8.7", "8.6")
    assert (row["parameters_without_embedding_and_softmax"], row["paper_parameters_millions"]) == ("272.9", "272.9")
    assert (row["parameters_total"], row["paper_total_billions"]) == ("1.1", "1.1")
    (line,) = csv.DictReader(io.StringIO(to_csv(table)))
    assert float(line["difference"]) == pytest.approx(36 / 35.7 - 1)


def test_the_final_perplexity_is_shown_where_the_paper_has_no_other(make_run, runs_of):
    counts = {"operations_per_timestep": 2_359_296, "parameters_without_embedding_and_softmax": 2_359_296}
    more = counts | {"preset": "lstm_512_512", "parameters_total": 815_700_000}
    make_run("lstm", experts=0, settings=settings_of("lstm_512_512"), **MOE_256 | more)
    row = shown(paper_tables(runs_of())[0])["lstm"]
    assert [row[f"paper_{key}perplexity"] for key in ("", "later_")] == ["", "54.1"]
    assert row["difference"] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"predicted_words": {"test": 159_657}},  # another text
        {"predicted_words": {}},
        {"operations_per_timestep": 8_500_000},
        {"parameters_without_embedding_and_softmax": 272_000_000},
        {"parameters_total": 375_000_000},  # a vocabulary of 100,000
    ],
    ids=str,
)
def test_other_sizes_or_another_text_are_not_comparable(make_run, runs_of, change):
    make_run("moe_256", settings=settings_of("moe_256"), **MOE_256 | change)
    (table,) = paper_tables(runs_of())
    assert table.name == "imitated"
    assert shown(table)["moe_256"]["paper_times_width"] == "1 ×"


def test_the_papers_own_rounding_is_tolerated(make_run, runs_of):
    """MoE-34M: 5.94 billion parameters are printed as 6.0."""
    counts = {"operations_per_timestep": 33_751_040, "parameters_without_embedding_and_softmax": 4_313_907_200}
    more = counts | {"preset": "moe_34m", "parameters_total": 5_939_769_343}
    make_run("moe_34m", settings=settings_of("moe_34m"), **MOE_256 | more)
    assert [table.name for table in paper_tables(runs_of())] == ["paper"]


@pytest.mark.parametrize(
    "settings",
    [
        settings_of("moe_256", num_experts=64),
        settings_of("moe_1_wide"),  # another layer
        settings_of("moe_256", weights=(0.1, 0)),
        {"model": {}},
        None,
    ],
    ids=["experts", "layer", "weights", "empty", "none"],
)
def test_a_run_that_changes_more_than_sizes_is_no_model_of_the_paper(make_run, runs_of, settings):
    make_run("moe_256", settings=settings, **MOE_256)
    assert paper_tables(runs_of()) == []


def test_a_run_of_an_earlier_version_has_its_model_too(make_run, tmp_path):
    """Its configuration names the layer's class by its former module."""
    settings, current = settings_of("moe_256"), settings_of("moe_256")
    settings["model"]["layers"]["middle"]["_target_"] = "moe_lm.layer.moe.MoE"
    current["model"]["layers"]["middle"]["_target_"] = "moe_lm.model.moe.MoE"
    make_run("moe_256", settings=settings, **MOE_256)
    assert len(paper_tables(read_runs(tmp_path / "study", lambda _: current))) == 1


def test_models_of_the_other_corpus_are_never_compared(make_run, runs_of):
    more = {"preset": "news100b_moe_256_h", "operations_per_timestep": 8.4e6, "parameters_total": 0.4e9}
    make_run("news", settings=settings_of("news100b_moe_256_h"), **MOE_256 | more)
    (table,) = paper_tables(runs_of())
    assert (table.name, shown(table)["news"]["paper_perplexity"]) == ("imitated", "35.3")


def test_the_change_relative_to_the_dense_model_is_shown_for_both(small, runs_of):
    (table,) = paper_tables(runs_of())
    assert {"change vs dense", "paper: change vs MoE-1-Wide"} <= {column.heading for column in table.formats}
    rows = shown(table)
    assert rows["many"]["change"] == "−10.0 %"  # 40.5 / 45.0 - 1
    assert rows["many"]["paper_change"] == "−22.6 %"  # 35.7 / 46.1 - 1
    assert (rows["many"]["paper_times_width"], rows["many"]["paper_times_words"]) == ("8 ×", "1,997 ×")
    assert (rows["dense"]["change"], rows["dense"]["paper_change"]) == ("", "")
    assert "not comparable" in next(c.heading for c in table.formats if c.key == "paper_perplexity")


@pytest.mark.parametrize("changes", [{"words": 8_000_000}, {"settings": settings_of("moe_4", width=32)}], ids=str)
def test_a_change_needs_equal_words_and_equal_scale(small, make_run, runs_of, changes):
    same = {"words": 4_000_000, "settings": settings_of("moe_4", width=64)}
    make_run("other", preset="moe_4", **same | changes)
    row = shown(paper_tables(runs_of())[0])["other"]
    assert (row["change"], row["paper_change"], row["paper_perplexity"]) == ("", "", "45.0")


def test_without_one_dense_model_there_is_no_change(make_run, runs_of):
    make_run("many", preset="moe_256", settings=settings_of("moe_256", width=64))
    (table,) = paper_tables(runs_of())
    assert not [column for column in table.formats if column.key.endswith("change")]


def test_seeds_are_one_row(small, make_run, runs_of):
    worse = {"test": 42.3, "valid": 43.0}
    settings = settings_of("moe_256", width=64)
    make_run("many,seed=2", preset="moe_256", seed=2, words=4_000_000, perplexity=worse, settings=settings)
    (table,) = paper_tables(runs_of())
    assert [(row.kind, row.name, row.num_seeds) for row in table.rows if row.name != "dense"] == [("mean", "many", 2)]
    assert shown(table)["many"]["change"] == "−8.0 %"  # (40.5 + 42.3) / 2 / 45 - 1


def test_only_comparable_figures_are_drawn(small, make_run, runs_of):
    make_run("moe_256", settings=settings_of("moe_256"), **MOE_256)
    with fixed_style():
        figures = dict(draw_figures(runs_of()))
    for name, x in (("perplexity_operations", 8.6), ("perplexity_parameters", 272.9)):
        hollow = [line for line in figures[name].axes[0].lines if line.get_markerfacecolor() == "none"]
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in hollow] == [([x], [35.7])]
        assert "result of the paper" in [text.get_text() for text in figures[name].legends[0].get_texts()]
    assert not [line for line in figures["perplexity_flops"].axes[0].lines if line.get_markerfacecolor() == "none"]


def test_balance_loss_weights_are_compared_with_table_6(make_run, runs_of):
    for pair in ((0, 0), (0.2, 0), (0.3, 0)):
        make_run(f"importance={pair[0]}", preset="moe_256", settings=settings_of("moe_256", pair, num_experts=64))
    make_run("dense", experts=0, preset="moe_1_wide", settings=settings_of("moe_1_wide"))
    (table,) = balance_tables(runs_of())
    rows = shown(table)
    assert list(rows) == ["importance=0", "importance=0.2", "importance=0.3"]
    # The mean of CV(load) 2/step over the last five training lines, steps 16 to 20, is 0.1118.
    assert rows["importance=0.2"] == {
        "test_perplexity": "45.0",
        "w_importance": "0.2",
        "w_load": "0",
        "cv_importance": "0.06",
        "cv_load": "0.11",
        "max_over_mean_load": "1.06",
        "paper_perplexity": "35.6",
        "paper_cv_importance": "0.06",
        "paper_cv_load": "0.17",
        "paper_max_over_mean_load": "1.47",
    }
    assert rows["importance=0"]["paper_max_over_mean_load"] == "17.80"
    assert rows["importance=0.3"]["paper_perplexity"] == ""


def test_one_pair_of_weights_is_no_ablation(make_run, runs_of):
    make_run("moe_4", settings=settings_of("moe_4"))
    make_run("moe_256", settings=settings_of("moe_256"))
    assert balance_tables(runs_of()) == []


def test_the_page_marks_the_papers_columns(small, tmp_path):
    report = write_report(tmp_path / "study", settings_of, ["A note."], "study capacity, scale small")
    html = (report.folder / "index.html").read_text(encoding="utf-8")
    assert "<h2>Models of the paper at other sizes</h2>" in html
    assert '<td class="paper">46.1</td>' in html
    assert "2 finished runs; study capacity, scale small" in html
    assert "## Models of the paper at other sizes" in report.markdown
    assert "| `many`  |            40.5 |         −10.0 % |       MoE-256 |" in report.markdown
    assert (report.folder / "imitated.csv").is_file()
