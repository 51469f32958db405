"""The GPUs of a machine are lent to the runs of a sweep: which run gets which, waits or is refused. Needs no GPU."""

import json
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moe_lm.cli import job_runner as running
from moe_lm.cli import sweep
from moe_lm.cli.job_runner import Clock, Devices, Job, audit_of, run_all, visible
from moe_lm.cli.sweep import with_gpus
from moe_lm.errors import UserError

# Records its GPUs and when it began and ended; its arguments set how it ends.
PROGRAM = textwrap.dedent("""
    import json, os, sys, time
    name, seconds, code = sys.argv[2:5]
    line = {"name": name, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": time.monotonic()}
    time.sleep(float(seconds))
    with open("record.jsonl", "a") as stream:
        stream.write(json.dumps(line | {"ended": time.monotonic()}) + "\\n")
    print("done")
    sys.exit(int(code))
""")


@pytest.fixture
def run_jobs(tmp_path, monkeypatch):
    """Run jobs (name, GPUs, exit code) that take 0.4 s on GPUs of these names; return the code and what each saw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(running, "program", lambda: (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(running.signal, "signal", lambda number, handler: None)
    begun = time.monotonic()

    def status(text):
        assert time.monotonic() < begun + 20, "a run waits for what nobody gives back"

    monkeypatch.setattr(running, "_status", status)

    def run(names, *wanted, parallel=None):
        jobs = [Job(Path(name), (name, "0.4", str(code)), num_gpus=number) for name, number, code in wanted]
        ended = run_all(jobs, Path(), parallel=parallel, audit=False, devices=Devices(names))
        lines = [json.loads(line) for line in Path("record.jsonl").read_text().splitlines()]
        return ended, {line["name"]: line for line in lines}

    return run


def overlap(one, other):
    return one["began"] < other["ended"] and other["began"] < one["ended"]


@pytest.mark.parametrize("names", [["0"], ["0", "1"], ["0", "1", "2", "3"]], ids=len)
def test_no_gpu_has_two_runs(names, run_jobs):
    """As many of four one-GPU runs train at a time as there are GPUs, each on a different GPU."""
    code, runs = run_jobs(names, *((name, 1, 0) for name in "abcd"))
    assert code == 0
    assert {run["gpus"] for run in runs.values()} == set(names)
    pairs = [(one, other) for one in runs.values() for other in runs.values() if one["name"] < other["name"]]
    assert all(one["gpus"] != other["gpus"] for one, other in pairs if overlap(one, other))
    assert any(overlap(*pair) for pair in pairs) == (len(names) > 1), "with a second GPU nothing waits for the first"


def test_run_of_two_processes_waits_for_two(run_jobs):
    """The smaller run behind it does not overtake it, although a GPU is free."""
    code, runs = run_jobs(["4", "5"], ("a", 1, 0), ("b", 2, 0), ("c", 1, 0))
    assert code == 0
    assert runs["b"]["gpus"] == "4,5"
    assert runs["a"]["ended"] < runs["b"]["began"] < runs["b"]["ended"] < runs["c"]["began"]


def test_failed_run_gives_its_gpus_back(run_jobs):
    """The next run gets the GPUs of the failed one."""
    code, runs = run_jobs(["7"], ("a", 1, 3), ("b", 1, 0))
    assert code == 1
    assert runs["a"]["gpus"] == runs["b"]["gpus"] == "7"


def test_parallel_limits_what_gpus_allow(run_jobs):
    _, runs = run_jobs(["0", "1"], ("a", 1, 0), ("b", 1, 0), parallel=1)
    assert not overlap(runs["a"], runs["b"])


@pytest.mark.parametrize("names", [[], ["0", "1"]], ids=["no GPU", "machine.device=cpu"])
def test_runs_on_the_cpu_run_one_at_a_time_with_the_environment_of_the_sweep(names, run_jobs):
    """parallel=auto means one run at a time, with the sweep's CUDA_VISIBLE_DEVICES."""
    _, runs = run_jobs(names, ("a", 0, 0), ("b", 0, 0))
    assert not overlap(runs["a"], runs["b"])
    assert runs["a"]["gpus"] is None


@pytest.mark.parametrize("code", [os.EX_TEMPFAIL, 130])
def test_a_run_that_was_asked_to_stop_ends_the_sweep(code, run_jobs, capfd):
    ended, runs = run_jobs(["0"], ("a", 1, code), ("b", 1, 0))
    assert ended == 130
    assert list(runs) == ["a"]
    assert "interrupted; repeat the command" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        ("2, 3", 2, ["2", "3"]),
        ("GPU-8f1c,GPU-77aa", 2, ["GPU-8f1c", "GPU-77aa"]),
        ("MIG-8f1c", 1, ["MIG-8f1c"]),
        ("1,9,0", 1, ["1"]),
        ("", 0, []),
        ("-1", 0, []),
        (None, 0, []),
    ],
)
def test_the_sweep_passes_on_the_names_it_was_given(given, count, names):
    """CUDA counts the names before the first unknown one."""
    assert visible({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, count) == names
    first = Devices(names).take("run", 1)
    assert first == ({"CUDA_VISIBLE_DEVICES": names[0]} if names else None)


def configured(monkeypatch, **keys):
    config = OmegaConf.create({"machine": {"device": "auto"}, "num_processes": 1} | keys)
    OmegaConf.set_struct(config, True)
    monkeypatch.setattr(sweep, "composed", lambda command, arguments: config)
    return Job(Path("runs/a"), ())


@pytest.mark.parametrize(("keys", "number"), [({}, 1), ({"num_processes": 2}, 2)], ids=str)
def test_a_run_takes_a_gpu_for_each_process(monkeypatch, keys, number):
    """Its audit takes one GPU; without GPUs and on the CPU neither takes one."""
    job = configured(monkeypatch, **keys)
    assert with_gpus(job, 2).num_gpus == number
    assert audit_of(with_gpus(job, 2)).num_gpus == 1
    assert with_gpus(job, 0) == job
    job = configured(monkeypatch, **keys, machine={"device": "cpu"})
    assert with_gpus(job, 2) == job
    assert audit_of(job).num_gpus == 0


def test_more_processes_than_gpus_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"^runs/a: num_processes=4 needs a GPU .* sees 2: choose fewer"):
        with_gpus(configured(monkeypatch, num_processes=4), 2)


def test_more_processes_than_gpus_are_refused_before_anything_starts(tmp_path, monkeypatch, moe_lm):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "visible", lambda: ["0"])
    configured(monkeypatch, num_processes=2)
    outcome = moe_lm("sweep", "-m", "model=moe_4", "seed=1,2")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sweep_on_gpus(workspace, moe_lm, training, monkeypatch, jobs_in_this_process):
    """Whole sweeps: each training gets one of two visible GPUs, and none with machine.device=cpu."""
    started = []
    start = running._start
    monkeypatch.setattr(
        running, "_start", lambda job, environment: started.append(environment) or start(job, environment)
    )
    monkeypatch.setattr(sweep, "visible", lambda: ["GPU-a", "GPU-b"])
    grid = [a for a in training if not a.startswith(("name=", "machine.device="))]
    assert moe_lm("sweep", *grid, "seed=1,2", "parallel=auto", "runs=s").code == 0
    assert started == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]
    started.clear()
    assert moe_lm("sweep", *grid, "seed=1,2", "parallel=2", "machine.device=cpu", "runs=s").code == 0
    assert started == [{}, {}]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_parallel_is_a_number_or_auto(value, tmp_path, monkeypatch, moe_lm):
    monkeypatch.chdir(tmp_path)
    outcome = moe_lm("sweep", "model=moe_4,moe_32", f"parallel={value}")
    assert outcome.code == 2
    assert f"parallel={value}: needs a whole number of at least 1, or auto" in outcome.err


def test_the_live_line_tells_what_runs_how_far_and_how_much_longer():
    """Two at a time: one run took 100 s; two have run 60 s and need 30 and 90 s more; two wait.

    A run takes (100 + 90 + 150) / 3 = 113 s: one waiting run ends after 30 + 113 s, the other after 90 + 113 s, which
    is four minutes. A run that failed, or was finished before, counts for no duration.
    """
    now = [0.0]
    clock = Clock(5, 2, now=lambda: now[0])
    first, second, third = (Job(Path("runs") / name, ()) for name in "abc")
    clock.start(first)
    clock.line({first: "a:  10%|#  | 0.4M/4.0M [00:10<01:30, 44kword/s]"}, 4)
    now[0] = 100.0
    clock.end(first, 0)
    clock.start(second)
    clock.start(third)
    assert clock.line({second: "starting", third: "b:   0%|   | 0/4M"}, 2) == "1 of 5 runs done | b begins | c begins"
    now[0] = 160.0
    bars = ("b:  66%|###   | 2.6M/4.0M [01:00<00:30, 44kword/s]", "c:  40%|##    | 1.6M/4.0M [01:00<01:30, 26kword/s]")
    assert clock.line({second: bars[0], third: bars[1]}, 2) == ("1 of 5 runs done | b 66 % | c 40 % | about 4 min left")
    assert clock.line({second: bars[0]}, 0).endswith("about 1 min left")
    clock.end(third, 1)
    clock.start(failed := Job(Path("runs/d"), ()))
    clock.end(failed, 0)  # had been finished before
    assert clock.line({second: bars[0]}, 1).startswith("2 of 5 runs done | b 66 % | about 2 min left")
    assert clock.line({second: bars[0].replace("00:30", "1:00:00")}, 0).endswith("about 60 min left")
