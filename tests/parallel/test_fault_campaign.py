"""scripts/fault_campaign.py with few cases: it passes, and it finds what is broken."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from faults import corruptions, intact  # noqa: E402
from faults.child import Child  # noqa: E402


def campaign(folder: Path, *options: str) -> tuple[int, dict, str]:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "fault_campaign.py", "--folder", folder, "--json", folder / "all.json", *options],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return done.returncode, json.loads((folder / "all.json").read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_some_of_each_kind(tmp_path):
    code, record, text = campaign(tmp_path, "--quick", "--kills", "2")
    kinds = {run["fault"] for run in record["runs"]}
    assert code == 0, text
    assert len(kinds) >= 5
    assert all(run["disturbed"] for run in record["runs"])
    assert {**record["sums"], "runs": 0, "times disturbed": 0} == dict.fromkeys(record["sums"], 0)


@pytest.mark.slow
def test_finds_a_product_that_checks_nothing(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("from moe_lm.checkpoint import checkpoint\ncheckpoint._check_file = lambda *a: None\n")
    code, record, text = campaign(tmp_path, "--only", "damaged checkpoint, bit of the model, 1", "--program", program)
    assert code == 1, text
    assert record["sums"]["wrong resumes"] > 0
    assert "resumed at step 19, not at 18" in text


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_every_damage_is_found_without_the_product(name, own_trained):
    run = own_trained / "runs/tiny"
    newest, before = (intact.folder_of(run, step) for step in reversed(intact.steps(run)[-2:]))
    assert intact.fault_of(newest) is None
    corruptions.corrupt(name, random.Random(1), newest, before)
    assert intact.fault_of(newest) is not None
    assert intact.fault_of(before) is None


def test_a_rank_is_found_by_its_mark(tmp_path):
    """The processes of another command are not taken for its own."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    one, other = (Child(sleep, tmp_path, tmp_path / name, "", "", False) for name in "ab")
    assert one.wait(20, until=lambda: set(one.processes()) == {one.pid})
    one.kill()
    assert one.wait(20)
    assert one.code == -9
    assert other.code is None
    other.end()
    with pytest.raises(ProcessLookupError):
        os.kill(other.pid, 0)
