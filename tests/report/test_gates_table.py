"""The table of gates: its figures, where they come from, and when there is no table."""

import json
import re

import pytest

from moe_lm.errors import UserError
from moe_lm.report.paper_comparison import balance_tables, gate_names
from moe_lm.report.runs import read_runs
from moe_lm.report.tables import gate_tables, main_table

AUDIT = {
    "step": 100,
    "training": {"mean_bits": 0.0512},
    "later_words": {"mean_bits": 0.00001},
    "causal": True,
    "by_evaluation": {"perplexity": 80.0, "experts_per_token": 1.0, "unrouted_fraction": 0.015},
    "by_training": {"perplexity": 78.0, "experts_per_token": 0.75, "unrouted_fraction": 0.25},
}


def settings(*names, balance=("load",)):
    """A configuration whose only gated layer has these gates, the first of two being the primary one."""
    parts = ("primary_gate", "gate")[2 - len(names) :]
    middle = {part: {"_target_": f"moe_lm.gate.{name}.X"} for part, name in zip(parts, names, strict=True)}
    losses = {name: {"weight": 0.1} for name in balance}
    return {"model": {"layers": {"lower": {"_target_": "x.lstm.Lstm"}, "middle": middle}}, "balance": losses}


def write_audit(run, **changes):
    (run / "audit.json").write_text(json.dumps(AUDIT | changes))


@pytest.fixture
def two(make_run, tmp_path):
    """A dense run and two kinds of gates, one of them audited and dropping a quarter."""
    make_run("dense", experts=0, settings={"balance": {"global_batch": True}})
    make_run("plain", settings=settings("noisy_top_k"))
    run = make_run("switch", settings=settings("switch", balance=("switch", "z_loss")))
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    lines = [line if "split" in line else line | {"dropped_fraction": 0.25} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_audit(run)
    return tmp_path / "study"


def shown(folder):
    [table] = gate_tables(read_runs(folder))
    heads = [column.key for column in table.formats]
    return {row.name: dict(zip(heads, table.cells(row), strict=True)) for row in table.rows}


def test_a_row_for_each_run(two):
    rows = shown(two)
    assert list(rows) == ["dense", "plain", "switch"]
    assert [rows[name]["gates"] for name in rows] == ["none", "noisy_top_k", "switch"]
    assert [rows[name]["losses"] for name in rows] == ["", "load", "switch, z_loss"]
    assert (
        rows["switch"]
        | {
            "dropped_fraction": "25.0 %",
            "leak_bits": "0.0512",
            "audited": "causal",
            "audited_unrouted_fraction": "1.5 %",
            "perplexity_shift": "97.5 %",
        }
        == rows["switch"]
    )
    assert rows["switch"]["leak_of_later_words_bits"] == "0.0000"
    assert rows["plain"]["leak_bits"] == rows["dense"]["cv_load"] == ""


def test_the_main_table_shows_dropped_choices_only_where_there_are_any(two, make_run, tmp_path):
    heads = [column.key for column in main_table(read_runs(two)).formats]
    assert heads[-1] == "dropped_fraction"
    (two / "switch" / "config.yaml").unlink()
    assert "dropped_fraction" not in [column.key for column in main_table(read_runs(two)).formats]


def test_metrics_of_earlier_versions_are_read(two):
    """They called these fractions `dropped` and `unserved`."""
    rows = shown(two)
    run = two / "switch"
    for name in ("metrics.jsonl", "audit.json"):
        text = (run / name).read_text()
        earlier = text.replace('"dropped_fraction"', '"dropped"').replace('"unrouted_fraction"', '"unserved"')
        assert earlier != text
        (run / name).write_text(earlier)
    assert shown(two) == rows


def test_a_gate_without_a_class_name_is_left_out(make_run, tmp_path):
    make_run("odd", settings={"model": {"layers": {"middle": {"gate": {"_partial_": True}}}}})
    assert [gate_names(run) for run in read_runs(tmp_path / "study")] == [""]


def test_gates_of_both_levels_are_named(make_run, tmp_path):
    make_run("h", settings=settings("noisy_top_k", "switch"))
    make_run("same", settings=settings("loss_free", "loss_free"))
    assert [gate_names(run) for run in read_runs(tmp_path / "study")] == ["noisy_top_k, switch", "loss_free"]


def test_runs_of_one_gate_have_no_such_table(make_run, tmp_path):
    """Runs of several gates have no table of balance loss weights."""
    for weight in (0.1, 0.2):
        config = settings("noisy_top_k")
        config["balance"]["load"]["weight"] = weight
        make_run(f"load={weight}", settings=config)
    runs = read_runs(tmp_path / "study")
    assert not gate_tables(runs)
    assert len(balance_tables(runs)) == 1
    make_run("switch", settings=settings("switch", balance=()))
    runs = read_runs(tmp_path / "study")
    assert len(gate_tables(runs)) == 1
    assert not balance_tables(runs)


def test_an_audit_of_another_step_is_not_read(two):
    write_audit(two / "switch", step=50)
    assert shown(two)["switch"]["leak_bits"] == ""
    assert shown(two)["switch"]["audited"] == "not audited"


def test_a_run_that_is_not_causal_is_marked(two):
    write_audit(two / "switch", causal=False)
    assert shown(two)["switch"]["audited"] == "NOT CAUSAL"


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(AUDIT | {"causal": 1})], ids=str)
def test_a_damaged_audit_is_refused(two, text):
    (two / "switch" / "audit.json").write_text(text)
    with pytest.raises(UserError, match=re.escape("audit.json is damaged")):
        read_runs(two)
