"""A run that is interrupted anywhere and started again by the same command ends with the same result."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TRAINING, call, with_overrides

from moe_lm.run import Run

TIMES = ("seconds", "words_per_second")


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bits; the files' headers come in any order."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def results(folder: Path = Path("runs/tiny")) -> dict:
    """Everything in a run's directory that must not depend on interruptions."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = sorted(last.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"model", "optimizer"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {
        "step": last.name,
        "tensors": {f"{p.parent.name}/{name}": digest(x) for p in files for name, x in load_file(p).items()},
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "result": {key: result[key] for key in ("perplexity", "predicted_words", "steps", "words", "flops")},
        "vocabulary": (folder / "vocabulary" / "vocabulary.txt").read_bytes(),
    }


@pytest.fixture(scope="module")
def undisturbed(trained_once) -> dict:
    return results(trained_once / "runs/tiny")


def start(*overrides: str, program: str = "") -> subprocess.Popen:
    """Train in a new process, which runs `program` first."""
    program += f"\nimport sys\nfrom moe_lm.__main__ import main\nsys.exit(main({['train', *TRAINING, *overrides]!r}))"
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)


# Each step of the child sleeps, so that a parent on a busy machine can kill it in the middle of a step.
SLOWLY = """
import time
from moe_lm.data.batching import Batches
step = Batches.step
Batches.step = lambda *a, **k: (time.sleep(0.2), step(*a, **k))[1]
"""
KILL_WHILE_WRITING = """
import os, signal
from moe_lm.checkpoint import sharded_safetensors
write = sharded_safetensors.write
def write_or_die(folder, tensors, group):
    if "0000000006" in str(folder) and folder.name == "optimizer":
        folder.mkdir()
        (folder / "half.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, tensors, group)
sharded_safetensors.write = write_or_die
"""


def wait_until(condition: Callable[[], bool], child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_lines(count: int, child: subprocess.Popen) -> None:
    metrics = Path("runs/tiny/metrics.jsonl")
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) >= count, child)


def test_killed_three_times_and_repeated(workspace, undisturbed):
    child = start(program=SLOWLY)
    wait_for_lines(1, child)
    child.kill()
    child.communicate()
    child = start(program=KILL_WHILE_WRITING)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert Path("runs/tiny/checkpoints/.0000000006.partial/optimizer/half.safetensors").read_bytes() == b"half"
    child = start(program=SLOWLY)
    wait_for_lines(4, child)
    child.kill()
    child.communicate()
    assert not Path("runs/tiny/result.json").exists()
    assert call("train", *TRAINING) == 0
    assert results() == undisturbed
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir() if path.name.startswith(".")] == []


def test_killed_before_the_first_checkpoint_starts_from_the_beginning(workspace, undisturbed):
    child = start("checkpoint.every_seconds=1000", "training.valid_every=100", program=SLOWLY)
    wait_for_lines(2, child)
    child.kill()
    child.communicate()
    assert not Path("runs/tiny/checkpoints").exists()
    assert call("train", *with_overrides(list(TRAINING), "checkpoint.every_seconds=1000")) == 0
    assert results() == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(workspace, undisturbed, moe_lm, number, code):
    child = start("checkpoint.every_seconds=1000", program=SLOWLY)
    wait_for_lines(1, child)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == code
    assert "repeat the command" in err.splitlines()[-1]
    assert "Traceback" not in err
    outcome = moe_lm("train", *TRAINING)
    assert "resumed at step" in outcome.err
    assert results() == undisturbed


def test_a_signal_after_all_is_done_changes_nothing(workspace):
    late = "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    child = start("training.num_words=200", program=late)
    _, err = child.communicate()
    assert (child.returncode, "SystemExit" in err) == (0, False)


def test_a_second_process_on_the_same_run_is_refused(workspace, moe_lm):
    child = start(program=SLOWLY.replace("0.2", "60"))
    wait_until(Path("runs/tiny/config.yaml").exists, child)
    outcome = moe_lm("train", *TRAINING)
    child.kill()
    child.communicate()
    assert (outcome.code, outcome.err) == (
        2,
        "moe-lm: runs/tiny is in use by another process: wait for it or choose another name\n",
    )


def test_a_finished_run_repeated_changes_nothing(own_trained, moe_lm):
    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path("runs/tiny").rglob("*.*") if p.is_file()}

    before = state()
    outcome = moe_lm("train", *TRAINING)
    assert outcome.code == 0
    assert "is finished" in outcome.out
    after = state()
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"config.yaml", ".lock"}


# The first run ends between two log lines, at a log line, and at a validation.
@pytest.mark.parametrize("first", [1500, 2300, 1900])
def test_more_words_continue_a_finished_run_exactly(workspace, undisturbed, moe_lm, first):
    shorter = with_overrides(list(TRAINING), f"training.num_words={first}")
    assert moe_lm("train", *shorter, "name=other").code == 0
    longer = with_overrides(list(TRAINING), "training.num_words=2900")
    assert moe_lm("train", *longer, "name=other").code == 0
    assert moe_lm("train", *longer).code == 0
    continued, run_parallel = results(Path("runs/other")), results()
    assert continued["step"] > undisturbed["step"]
    assert continued == run_parallel


def test_a_line_that_a_crash_left_unfinished_is_dropped(own_trained):
    run = Run(Path("runs/tiny"))
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines) + '{"step": 13, "wor')
    run.cut_metrics(9)
    kept = [line for line in lines if json.loads(line)["step"] <= 9]
    assert run.metrics_file.read_text() == "".join(kept)


def test_the_lock_goes_with_the_process(workspace):
    child = start(program=SLOWLY)
    wait_for_lines(1, child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    run = Run(Path("runs/tiny"))
    run.claim(run.config())
