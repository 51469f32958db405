"""Sweeps: what they enumerate, what they skip, and what a failing run does to the others."""

import json

import pytest

from moe_lm.__main__ import main
from moe_lm.commands.sweep import jobs_of


def names(arguments):
    return [job.folder.as_posix() for job in jobs_of(arguments)]


def test_grid_is_the_product_of_its_lists():
    """Two presets and two seeds are four runs, called after what varies."""
    assert names(["model=moe_4,moe_32", "seed=1,2", "runs=r"]) == [
        "r/moe_4,seed=1",
        "r/moe_4,seed=2",
        "r/moe_32,seed=1",
        "r/moe_32,seed=2",
    ]


def test_command_line_replaces_the_study(monkeypatch, tmp_path):
    """A key given to the sweep takes the place of the study's own; a list of values multiplies its runs."""
    jobs = jobs_of(["study=quickstart", "training.num_words=1000", "model=moe_4"])
    assert all("training.num_words=1000" in job.arguments for job in jobs)
    assert not any(a.startswith("training.num_words=4") for job in jobs for a in job.arguments)
    assert {a for job in jobs for a in job.arguments if a.startswith("model=")} == {"model=moe_4"}
    once = names(["study=quickstart"])
    assert "runs/quickstart/moe_16" in once
    twice = names(["study=quickstart", "seed=1,2"])
    assert set(twice) == {f"{name},seed={seed}" for name in once for seed in (1, 2)}


def test_failed_run_is_named_and_the_others_finish(workspace, training, capfd):
    """k=4 of 3 experts cannot be built; the other run is trained, the exit code is 1, a repeat skips it."""
    varied = ("name=", "runs=", "model.num_experts=", "model.k=")
    grid = [argument for argument in training if not argument.startswith(varied)]
    arguments = ["sweep", "-m", *grid, "model.k=4", "model.num_experts=3,5", "runs=runs/s"]
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert "failed (exit code 2)" in error
    assert "k must be at least 1 and at most num_experts" in error
    [finished] = (workspace / "runs/s").glob("*/result.json")
    assert json.loads(finished.read_text())["model"]["num_experts"] == 5
    before = finished.stat().st_mtime_ns
    assert main(arguments) == 1
    assert finished.stat().st_mtime_ns == before
    assert "is finished" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs study=... or a grid"),
        (["study=nope"], "there are"),
        (["model=moe_4,moe_32", "model.num_exprts=3"], "did you mean model.num_experts"),
    ],
)
def test_mistake_is_one_line_before_anything_runs(arguments, words, tmp_path, monkeypatch, capfd):
    """Nothing is trained, nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
