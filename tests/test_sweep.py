"""Sweeps: what they enumerate, what they skip, and what a failing run does to the others."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_training import call

from moe_lm.cli import sweep
from moe_lm.cli.sweep import Study, jobs_of
from moe_lm.errors import UserError


def names(arguments):
    return [job.folder.as_posix() for job in jobs_of(arguments)]


def test_grid_is_the_product_of_its_lists():
    """Two presets and two seeds are four runs, named by what varies."""
    assert names(["model=moe_4,moe_32", "seed=1,2", "runs=r"]) == [
        "r/moe_4,seed=1",
        "r/moe_4,seed=2",
        "r/moe_32,seed=1",
        "r/moe_32,seed=2",
    ]


def test_command_line_replaces_the_study(monkeypatch, tmp_path):
    """An override of the sweep replaces the study's value; a list of values multiplies the runs."""
    jobs = jobs_of(["study=quickstart", "training.num_words=1000", "model.dropout=0.5"])
    assert all("training.num_words=1000" in job.arguments for job in jobs)
    assert not any(a.startswith("training.num_words=4") for job in jobs for a in job.arguments)
    assert {a for job in jobs for a in job.arguments if a.startswith("model.dropout=")} == {"model.dropout=0.5"}
    once = names(["study=quickstart"])
    assert "runs/quickstart/moe_16" in once
    twice = names(["study=quickstart", "seed=1,2"])
    assert set(twice) == {f"{name},seed={seed}" for name in once for seed in (1, 2)}


@pytest.mark.parametrize(
    "grid",
    [
        ["model=moe_4", "training.num_words=500,1000"],
        ["model=moe_4,moe_1_wide", "name=x"],
        ["study=quickstart", "name=x"],
        ["model=moe_4", "machine.threads=1,2"],
    ],
    ids=" ".join,
)
def test_runs_of_one_name_are_refused(grid):
    """A grid whose runs would share a directory trains none of them."""
    with pytest.raises(UserError, match="two runs of the grid would be called"):
        jobs_of(grid)


def test_training_does_not_outlive_the_sweep(workspace, training):
    """The sweep's reader goes away (`| head -1`); its children are stopped, not left running."""
    grid = [a for a in training if not a.startswith(("name=", "runs=", "training.num_words="))]
    command = [sys.executable, "-m", "moe_lm", "sweep", *grid, "seed=1,2", "training.num_words=50_000_000", "runs=s"]
    sweep = subprocess.Popen([*command, "parallel=2"], stderr=subprocess.PIPE)
    assert sweep.stderr.readline().startswith(b"[1/2]")
    until(lambda: len(list(workspace.glob("s/*/metrics.jsonl"))) == 2)
    sweep.send_signal(signal.SIGHUP)
    sweep.wait(60)
    sweep.stderr.close()
    sizes = [path.stat().st_size for path in workspace.glob("s/*/metrics.jsonl")]
    time.sleep(1)
    assert [path.stat().st_size for path in workspace.glob("s/*/metrics.jsonl")] == sizes
    assert len(list(workspace.glob("s/*/checkpoints/*/state.json"))) >= 2


def until(condition, seconds=60):
    """Wait until a condition holds."""
    for _ in range(seconds * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


def test_second_sweep_on_a_folder_is_refused(tmp_path, monkeypatch, capfd):
    """While one sweep holds the folder's lock, another says so in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s/.sweep.lock"):
        assert call("sweep", "model=moe_4", "seed=1,2", "runs=s") == 2
    assert capfd.readouterr().err.startswith("moe-lm: another sweep is at work in s")


def test_failed_run_is_named_and_the_others_finish(workspace, training, capfd, jobs_in_this_process):
    """k=4 of 3 experts cannot be built; the other run is trained, the exit code is 1, a repeat skips it."""
    varied = ("name=", "runs=", "model.num_experts=", "model.k=")
    grid = [argument for argument in training if not argument.startswith(varied)]
    arguments = ["sweep", "-m", *grid, "model.k=4", "model.num_experts=3,5", "runs=runs/s"]
    assert call(*arguments) == 1
    error = capfd.readouterr().err
    assert "failed (exit code 2)" in error
    assert "k must be at least 1 and at most num_experts" in error
    [finished] = (workspace / "runs/s").glob("*/result.json")
    assert json.loads(finished.read_text())["model"]["num_experts"] == 5
    before = finished.stat().st_mtime_ns
    assert call(*arguments) == 1
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
def test_an_error_is_one_line_before_anything_runs(arguments, words, tmp_path, monkeypatch, capfd):
    """Nothing is trained, nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert call("sweep", *arguments) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("study", "given"),
    [("balance", "balance.importance.weight=0.5"), ("capacity", "model=moe_4")],
    ids=["loss", "model"],
)
def test_what_a_study_varies_cannot_be_set(workspace, moe_lm, study, given):
    """The runs' names would contradict their values."""
    outcome = moe_lm("sweep", f"study={study}", given)
    assert outcome.code == 2
    assert f"{given.partition('=')[0]} is what the runs of this study differ in" in outcome.err
    assert not Path("runs").exists()


def test_a_study_that_audits_does_so_once_for_each_run(workspace, moe_lm, training, monkeypatch, jobs_in_this_process):
    """Each finished run has an audit of its last step; repeated, nothing is trained or audited again."""
    shared = [a for a in training if not a.startswith(("name=", "model"))] + ["model.width=8"]
    runs = ["model=moe_4 model.expert_hidden=8 name=a", "model=lstm_4x512 name=b"]
    own = Study("own", None, [], 1, shared, runs, audit=True)
    monkeypatch.setattr(sweep, "study_of", lambda name, scale: own)
    outcome = moe_lm("sweep", "study=own")
    assert outcome.code == 0, outcome.err
    files = [Path("runs/own") / name / "audit.json" for name in ("a", "b")]
    steps = {path: json.loads(path.read_text())["step"] for path in files}
    assert set(steps.values()) == {json.loads(Path("runs/own/a/result.json").read_text())["steps"]}
    assert outcome.err.count("audit of runs/own/") == 2
    for path in files:
        leak = json.loads(path.read_text())["training"]["mean_bits"]
        assert f"{path.parent} is causal; training's choice leaks {leak:.4f} bits a token" in outcome.err
    before = [path.stat().st_mtime_ns for path in files]
    again = moe_lm("sweep", "study=own")
    assert again.code == 0
    assert "audit of" not in again.err
    assert [path.stat().st_mtime_ns for path in files] == before
    files[0].write_text('{"step":')
    found = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(found | {"causal": False}))
    mended = moe_lm("sweep", "study=own")
    assert mended.code == 0, "a damaged audit stops nobody, and one that failed is asked again"
    assert mended.err.count("audit of runs/own/") == 2
    assert json.loads(files[1].read_text()) == found
