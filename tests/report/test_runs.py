"""Reading run directories: their order, unfinished runs, and messages about damaged files."""

import json

import pytest

from moe_lm.errors import UserError
from moe_lm.report.runs import read_runs


def test_runs_come_by_operations_then_parameters_and_unfinished_last(make_run, tmp_path):
    make_run("a_unfinished", finished=False)
    make_run("b_large", operations_per_timestep=9e6)
    make_run("c_more", parameters_without_embedding_and_softmax=9e6)
    make_run("d_less", parameters_without_embedding_and_softmax=1e6)
    names = [run.name for run in read_runs(tmp_path / "study")]
    assert names == ["d_less", "c_more", "b_large", "a_unfinished"]


def test_a_run_is_read_whole(make_run, tmp_path):
    make_run("moe_4")
    make_run("lstm", experts=0)
    moe, lstm = sorted(read_runs(tmp_path / "study"), key=lambda run: not run.is_moe)
    assert (moe.name, moe.is_moe, lstm.is_moe) == ("moe_4", True, False)
    assert (len(moe.metrics), len(moe.evaluations)) == (20, 4)
    assert moe.config == "name: moe_4\nseed: 1\n"
    assert moe.perplexity("test") == 45.0


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("moe_4", "moe_4"),
        ("moe_4,seed=12", "moe_4"),
        ("moe_4,balance.exact=false,seed=2,softmax.num_sampled=9", "moe_4,balance.exact=false,softmax.num_sampled=9"),
        ("moe_4,other_seed=2", "moe_4,other_seed=2"),
    ],
)
def test_the_base_name_lacks_only_the_seed(make_run, tmp_path, name, base):
    make_run(name)
    assert read_runs(tmp_path / "study")[0].base_name == base


def test_the_folder_may_be_one_run(make_run):
    assert [run.name for run in read_runs(make_run("moe_4"))] == ["moe_4"]


def test_a_run_that_has_only_begun_is_unfinished(make_run, tmp_path):
    (make_run("moe_4", finished=False) / "metrics.jsonl").unlink()
    (run,) = read_runs(tmp_path / "study")
    assert (run.result, run.metrics, run.evaluations) == (None, (), ())


@pytest.mark.parametrize("tail", ['{"step": 21, "wor', '{"step": 21, "words": 1}', "17", "\n", "\xff"])
def test_a_half_written_last_line_is_left_out(make_run, tmp_path, tail):
    metrics = make_run("moe_4") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + tail.encode("latin-1"))
    assert len(read_runs(tmp_path / "study")[0].metrics) == 20


@pytest.mark.parametrize(
    "line", ["{half", "[1]", '{"words": "many", "nats_per_word": 1}', '{"words": 5, "split": "valid"}']
)
def test_a_damaged_line_is_named_by_file_and_number(make_run, tmp_path, line):
    metrics = make_run("moe_4") / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    metrics.write_text(f"{first}\n{line}\n{rest}")
    with pytest.raises(UserError, match=r"moe_4/metrics\.jsonl line 2 is damaged") as error:
        read_runs(tmp_path / "study")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"seed": True}), b"\xff\xfe".decode("latin-1")])
def test_a_damaged_result_is_named_by_path(make_run, tmp_path, text):
    (make_run("moe_4") / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"moe_4/result\.json is damaged"):
        read_runs(tmp_path / "study")


@pytest.mark.parametrize("perplexity", [None, 45.0, {"test": "low"}])
def test_a_result_needs_perplexities_by_split(make_run, tmp_path, perplexity):
    make_run("moe_4", perplexity=perplexity)
    with pytest.raises(UserError, match="perplexity is not a number for each split"):
        read_runs(tmp_path / "study")


def test_a_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere: give runs="):
        read_runs(tmp_path / "nowhere")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*train one first"):
        read_runs(tmp_path)


def test_a_folder_of_studies_names_one(make_run, tmp_path):
    make_run("moe_4")
    with pytest.raises(UserError, match=r"did you mean runs=.*study\?"):
        read_runs(tmp_path)
