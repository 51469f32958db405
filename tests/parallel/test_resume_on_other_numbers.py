"""A run of four processes, stopped in the middle, ends on one, two, three and four as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shards import assert_safetensors_or_json, whole
from tiny_training import TRAINING, call, with_overrides, working_in, write_corpus

from moe_lm.checkpoint import checkpoint

TIMES = ("seconds", "words_per_second")
HALF, WHOLE = 1600, 2700
# Four micro-batches a step, noise and dropout on; 6 experts on 4 processes are 2, 2, 1, 1.
SIZES = ["batch.words=240", "batch.micro_words=60", "model.num_experts=6", "model.dropout=0.2"]
HIERARCHY = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=15", "model.num_groups=5"]
CASES = {
    "flat": ["parallel.vocab=true"],
    "hierarchical": [*HIERARCHY, "optimizer.experts=factored", "optimizer.average_decay=0.7"],
}


def arguments(case: str, name: str, num_words: int) -> list[str]:
    overrides = [*SIZES, *CASES[case], "optimizer.learning_rate=0.002", f"training.num_words={num_words}"]
    overrides += ["checkpoint.every_seconds=1000"]  # one at each validation that is the best, one at the end
    return ["train", *with_overrides(TRAINING, *overrides, f"name={name}")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranks) -> Path:
    """The folder of the runs: CASE is never interrupted, CASE-N went on with N processes after 4 had stopped."""
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "text")
    with working_in(folder):  # so that none of the processes has to prepare the text
        assert call("train", *with_overrides(TRAINING, "training.num_words=1", "name=first")) == 0
    on_four = []
    for case in CASES:
        on_four += [arguments(case, case, WHOLE), arguments(case, f"{case}-half", HALF)]
        on_four += [["copy", f"runs/{case}-half", f"runs/{case}-{size}"] for size in (1, 2, 3, 4)]
        on_four += [arguments(case, f"{case}-4", WHOLE)]
    on_three = [arguments(case, f"{case}-3", WHOLE) for case in CASES]
    on_two = [arguments("hierarchical", "hierarchical-2", WHOLE)]
    ranks.run(4, "resuming:run_commands", on_four, folder, meet=False)
    damage(folder / "runs" / "flat-3")
    ranks.run(3, "resuming:run_commands", on_three, folder, meet=False)
    ranks.run(2, "resuming:run_commands", on_two, folder, meet=False)
    # As a user would start it.
    command = [sys.executable, "-m", "moe_lm", *arguments("flat", "flat-2", WHOLE), "num_processes=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flat-2: resumed at step ") == 1
    with working_in(folder):
        for case in CASES:
            assert call(*arguments(case, f"{case}-1", WHOLE)) == 0
    return folder / "runs"


def damage(run: Path) -> None:
    """Change one bit of one of the four files of the model in the last checkpoint."""
    file = sorted((last(run) / "model").iterdir())[1]
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def last(run: Path) -> Path:
    return checkpoint.path_of(run / "checkpoints", checkpoint.steps(run / "checkpoints")[-1])


on_each_number = pytest.mark.parametrize("size", [4, 3, 2, 1])
of_each_case = pytest.mark.parametrize("case", CASES)


@of_each_case
def test_it_was_stopped_in_the_middle(runs, case):
    """Between two lines of the metrics and two validations, so that a part of an interval is taken up."""
    at, end = (int(last(runs / name).name) for name in (f"{case}-half", case))
    assert 3 < at < end - 3
    assert at % 3
    assert at % 5
    assert checkpoint.load_state(last(runs / f"{case}-half"))["num_processes"] == 4


@of_each_case
@on_each_number
def test_the_metrics_are_those_of_a_run_never_interrupted(runs, case, size):
    ours, theirs = metrics(runs / f"{case}-{size}"), metrics(runs / case)
    assert len(theirs) > 5
    if size == 4:
        assert ours == theirs
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for key, value in their.items():
            assert our[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)), key


@of_each_case
@on_each_number
def test_the_final_test_perplexity_is_the_same(runs, case, size):
    ours, theirs = (json.loads((runs / name / "result.json").read_text()) for name in (f"{case}-{size}", case))
    for key in ("steps", "words", "flops", "predicted_words"):
        assert ours[key] == theirs[key]
    if size == 4:
        assert ours["perplexity"] == theirs["perplexity"]
    assert ours["perplexity"]["test"] == pytest.approx(theirs["perplexity"]["test"], rel=1e-5)


@of_each_case
@on_each_number
@pytest.mark.parametrize("part", checkpoint.PARTS)
def test_the_final_checkpoint_holds_the_same_tensors(runs, case, size, part):
    ours, theirs = (whole(last(runs / name) / part) for name in (f"{case}-{size}", case))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if size == 4:
            assert torch.equal(ours[name], tensor), name
        else:
            assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name


@of_each_case
def test_the_comparison_says_something(runs, case):
    """Every tensor moved after the stop, experts' moments too; factored ones are there where they are asked for."""
    for part in checkpoint.PARTS:
        before, after = whole(last(runs / f"{case}-half") / part), whole(last(runs / case) / part)
        for name, tensor in after.items():
            assert (tensor - before[name]).norm() > 3e-4 * tensor.norm(), name
    kinds = {key.partition("/")[0] for key in after if key.endswith("w1_EDH")}
    factored, plain = {"step", "row_mean", "column_mean", "weight", "updates"}, {"step", "exp_avg", "exp_avg_sq"}
    assert kinds == (factored if case == "hierarchical" else plain)


@of_each_case
@on_each_number
def test_every_process_wrote_its_part_and_every_file_is_safetensors(runs, case, size):
    path = last(runs / f"{case}-{size}")
    assert checkpoint.load_state(path)["num_processes"] == size
    assert assert_safetensors_or_json(path) == 2 * size
    assert assert_safetensors_or_json(runs / f"{case}-{size}" / "checkpoints") > 2 * size


@of_each_case
def test_divided_tensors_are_in_several_files(runs, case):
    """Experts in each of the four, rows of the vocabulary where they are divided: nobody holds the whole."""
    from safetensors import safe_open

    rows = {}
    for file in (last(runs / case) / "model").iterdir():
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                rows.setdefault(name, []).append(len(opened.get_tensor(name)))
    of_experts = {"flat": [1, 1, 2, 2], "hierarchical": [3, 3, 3, 6]}[case]
    for name, parts in rows.items():
        if "experts." in name:
            assert sorted(parts) == of_experts, name
        else:
            assert len(parts) == (4 if name.endswith(("_VD", "_V")) and case == "flat" else 1), name


def test_one_process_evaluates_what_four_wrote(runs, moe_lm, monkeypatch):
    monkeypatch.chdir(runs.parent)
    for case in CASES:
        outcome = moe_lm("evaluate", f"run=runs/{case}", "machine.device=cpu", "split=test")
        assert outcome.code == 0, outcome.err
        result = json.loads((runs / case / "result.json").read_text())
        assert f"perplexity {result['perplexity']['test']:.4f} " in outcome.out


def test_three_processes_set_a_damaged_checkpoint_aside(runs):
    """Found by whichever of them reads the file, acted on by all; the one before, of the validation, was taken."""
    half = checkpoint.steps(runs / "flat-half" / "checkpoints")
    assert half[0] == 5 < half[-1]
    [aside] = (runs / "flat-3" / "checkpoints").glob("damaged-*")
    assert aside.name == f"damaged-{half[-1]:010d}"
    assert checkpoint.load_state(aside)["num_processes"] == 4
