"""The main table: figures computed by hand, seeds, unfinished runs, and a CSV that parses back."""

import csv
import io

import pytest

from moe_lm.report.formats import change, millions, perplexity, times, to_csv, to_markdown
from moe_lm.report.runs import read_runs
from moe_lm.report.tables import main_table, unfinished_runs


def table_of(folder):
    return main_table(read_runs(folder / "study"))


def cells_of(folder):
    table = table_of(folder)
    return [table.cells(row) for row in table.rows]


def test_the_cells_of_a_run(make_run, tmp_path):
    make_run("moe_4")
    (shown,) = cells_of(tmp_path)
    # The last five training lines are steps 16 to 20: CV(importance) 1/step, CV(load) 2/step, max/mean 1 + 1/step of
    # the load and 1 + 2/step of the tokens, and (1/16 + 1/17 + 1/18 + 1/19 + 1/20) / 5 = 0.0559.
    assert shown == [
        *("45.0", "46.0", "8.4", "8.4", "821.4", "10.0", "1.23e+15", "10,000", "1,000"),
        *("0.06", "0.11", "1.06", "1.11"),
    ]


def test_a_dense_model_has_no_balance(make_run, tmp_path):
    make_run("lstm", experts=0)
    (shown,) = cells_of(tmp_path)
    assert shown[-3:] == ["", "", ""]


@pytest.mark.parametrize(("value", "shown"), [(9.994, "9.99"), (10, "10.0"), (1234.56, "1,234.6")])
def test_perplexity_has_one_decimal_from_ten_on(value, shown):
    assert perplexity(value) == shown


def test_small_models_still_show_their_size(make_run, tmp_path):
    make_run("tiny", operations_per_timestep=12_345, words=0)
    (shown,) = cells_of(tmp_path)
    assert (shown[2], shown[5]) == ("0.012", "0")


def test_changes_and_factors_are_signed_and_rounded():
    assert [change(value) for value in (0.0123, -0.261, -0.0001, 0)] == ["+1.2 %", "−26.1 %", "0.0 %", "0.0 %"]
    assert [times(value) for value in (1, 2.5, 16, 1997.4)] == ["1 ×", "2.5 ×", "16 ×", "1,997 ×"]
    assert millions(4_303_372_288) == "4,303.4"


def test_seeds_have_a_mean_and_a_standard_deviation(make_run, tmp_path):
    for seed, test in ((1, 39.0), (2, 40.0), (3, 44.0)):
        name = f"moe_4,seed={seed}" if seed > 1 else "moe_4"
        make_run(name, seed=seed, perplexity={"test": test, "valid": 50.0})
    table = table_of(tmp_path)
    rows = table.rows
    assert [(row.kind, row.name) for row in rows[2:]] == [
        ("run", "moe_4,seed=3"),
        ("mean", "moe_4"),
        ("deviation", "moe_4"),
    ]
    mean, deviation = rows[3].figures, rows[4].figures
    assert mean["test_perplexity"] == pytest.approx(41)
    assert deviation["test_perplexity"] == pytest.approx(7**0.5)  # (4 + 1 + 9) / (3 - 1)
    assert (mean["parameters_total"], deviation["parameters_total"]) == (821_400_000, None)
    assert "| `moe_4` standard deviation (3 seeds) |" in to_markdown([table], [])


def test_other_presets_and_repeated_seeds_are_no_sample(make_run, tmp_path):
    make_run("moe_4")
    make_run("moe_4,seed=1")
    make_run("moe_4,seed=2", seed=2, preset="moe_32")
    assert {row.kind for row in table_of(tmp_path).rows} == {"run"}


def test_a_missing_test_perplexity_leaves_its_cells_empty(make_run, tmp_path):
    make_run("moe_4", perplexity={"valid": 46.0, "test": None})
    make_run("moe_4,seed=2", seed=2)
    assert [shown[0] for shown in cells_of(tmp_path)] == ["", "45.0", "", ""]


def test_unfinished_runs_stand_below_the_table(study):
    runs = read_runs(study)
    markdown = to_markdown([main_table(runs)], unfinished_runs(runs))
    # 20 lines of half a million words; the last validation perplexity is 500 / 20.
    assert markdown.endswith("Unfinished:\n\n- `moe_1024_h`: 10.0 M words so far, validation perplexity 25.0\n")


def test_a_study_without_results_says_so(make_run, tmp_path):
    (make_run("moe_4", finished=False) / "metrics.jsonl").write_text("")
    runs = read_runs(tmp_path / "study")
    markdown = to_markdown([main_table(runs)], unfinished_runs(runs))
    assert markdown == "No run has finished yet.\n\nUnfinished:\n\n- `moe_4`: nothing logged yet\n"


def test_every_markdown_line_has_the_same_columns(make_run, tmp_path):
    make_run("a|b`c")
    make_run("moe_4")
    lines = to_markdown([table_of(tmp_path)], []).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "`` a\\|b`c ``" in lines[2]


def test_the_csv_parses_back_to_the_exact_figures(make_run, tmp_path):
    make_run('odd "name",with=commas', flops=1.23456789e15)
    (row,) = csv.DictReader(io.StringIO(to_csv(table_of(tmp_path))))
    assert (row["model"], row["kind"], row["seeds"]) == ('odd "name",with=commas', "run", "1")
    assert float(row["flops"]) == 1.23456789e15
    assert float(row["cv_load"]) == pytest.approx(2 * sum(1 / step for step in range(16, 21)) / 5)
