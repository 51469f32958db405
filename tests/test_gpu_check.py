"""scripts/gpu_check.sh with a stub for Python: which commands it runs, and what it leaves behind."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"

# Appends its command to a file and writes what --json names, unless a word of the command is in SILENT or FAILING.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
for word in ${SILENT:-}; do [[ "$*" != *"$word"* ]] || exit 0; done
for word in ${FAILING:-}; do [[ "$*" != *"$word"* ]] || exit 7; done
while [ $# -gt 1 ]; do [ "$1" != --json ] || echo "{}" >"$2"; shift; done
"""


@pytest.fixture
def check(tmp_path):
    """Run the script in a tree of its own; a call returns exit code, standard error and the commands run."""
    tree = tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").write_text(STUB)
    (tree / ".venv/bin/python").chmod(0o755)
    text = tree / "build/gpu/text"
    text.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (text / f"news.{split}.txt").write_text("a\n")
    shutil.copy(SCRIPT, tree / "scripts")
    asked = tmp_path / "asked"

    def call(*arguments: str, **variables: str):
        asked.write_text("")
        environment = {**os.environ, "ASKED": str(asked), **variables}
        command = ["tree/scripts/gpu_check.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        return done.returncode, done.stderr, asked.read_text().splitlines()

    call.out, call.tree = tmp_path / "out", tree
    return call


def test_all_jobs_of_a_part(check):
    code, said, asked = check("bench", "out")
    assert code == 0, said
    names = {"layer", "layer_1024", "layer_4096", "training", "training_4096", "data", "evaluation"}
    assert {path.stem for path in check.out.iterdir()} == names
    assert "other implementations are left out" in said
    [large] = [line for line in asked if "training_4096.json" in line]
    assert "--words 307200" in large  # according to the stub the GPU is large
    assert "machine.recompute=false" in large


def test_a_part_ends_within_its_time():
    """The time limits of its jobs add up to no more than docs/gpu-checklist.md says."""
    parts, part = {}, None
    for line in SCRIPT.read_text().splitlines():
        if begun := re.fullmatch(r"(bench|profile)\(\) \{", line):
            part = begun[1]
        if part and (job := re.match(r" +run \w+ (\d+) ", line)):
            parts[part] = parts.get(part, 0) + int(job[1])
    rows = (SCRIPT.parent.parent / "docs/gpu-checklist.md").read_text()
    for name, seconds in parts.items():
        [minutes] = re.findall(rf"\| `{name}` \|.*\| (\d+) min \|", rows)
        assert seconds <= 60 * int(minutes), name
    assert parts.keys() == {"bench", "profile"}


def test_jobs_by_name(check):
    code, said, asked = check("bench", "out", "data", "layer_1024")
    assert code == 0, said
    assert len(asked) == 2
    assert {path.stem for path in check.out.iterdir()} == {"data", "layer_1024"}
    code, said, asked = check("bench", "out", "data", "nonesuch")
    assert (code, asked) == (2, [])
    assert "nonesuch" in said
    assert "layer_4096" in said
    assert check("study1", "out", "moe_256")[0] == 2
    assert check("profile", "out", "layer")[0] == 2
    for wrong in (["bench"], ["nonesuch", "out"], []):
        code, said, _ = check(*wrong)
        assert code == 2
        assert "PART OUTDIR" in said


def test_a_failure_stops_no_other_job_and_leaves_no_old_result(check):
    check("bench", "out")
    code, said, _ = check("bench", "out", FAILING="mem_get_info layer_4096 benchmark_data")
    assert code == 1
    assert "layer_4096 (7)" in said
    assert "data (7)" in said
    assert {path.stem for path in check.out.iterdir()} == {
        "layer",
        "layer_1024",
        "training",
        "training_4096",
        "evaluation",
    }
    code, said, _ = check("bench", "out", "layer", "data", SILENT="benchmark_layer")
    assert (code, "layer (nothing measured)" in said) == (1, True)
    for part, job in (("bench", "training_4096"), ("profile", "profile_4096_h")):
        assert "machine.recompute=false" in check(part, "out", job)[2][-1]
        asked = check(part, "out", job, FAILING="mem_get_info")[2]
        assert "--words 153600" in asked[-1]
        assert "machine.recompute=true" in asked[-1]


def test_a_study_keeps_no_old_result(check):
    check.out.mkdir()
    (check.out / "moe_4.result.json").write_text("{}")
    assert check("study1", "out", "moe_4", FAILING="moe_4")[0] == 1
    assert not list(check.out.iterdir())
    shutil.rmtree(check.tree / "build")
    code, said, asked = check("study1", "out")
    assert (code, asked) == (2, [])
    assert "pack" in said


def test_a_rehearsal_overwrites_nothing(check):
    check("bench", "out", "data")
    check("bench", "out", "data", REHEARSE="1")
    assert {path.name for path in check.out.iterdir()} == {"data.json", "rehearsal"}


def test_pack_without_text_changes_nothing(check):
    code, said, _ = check("pack", "nowhere", PYTHON=str(check.tree / ".venv/bin/python"))
    assert code == 2
    assert "nowhere" in said
    assert (check.tree / "build/gpu/text/news.train.txt").exists()


def test_without_an_environment(check):
    shutil.rmtree(check.tree / ".venv")
    for variables in ({}, {"PYTHON": "/nowhere"}):
        code, said, _ = check("bench", "out", **variables)
        assert code == 2
        assert said.splitlines()[-1].startswith("gpu_check.sh: there is neither .venv nor")
