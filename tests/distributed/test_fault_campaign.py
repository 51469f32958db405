"""What scripts/fault_campaign.py judges by sees every damage, and its processes are found again."""

import os
import random
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from faults import cases, intact  # noqa: E402
from faults.child import Child  # noqa: E402


@pytest.mark.parametrize("name", cases.CORRUPTIONS)
def test_every_damage_is_seen_without_the_product(name, own_trained):
    run = own_trained / "runs/tiny"
    newest, before = (intact.folder_of(run, step) for step in reversed(intact.steps(run)[-2:]))
    assert intact.fault_of(newest) is None
    cases.CORRUPTIONS[name](random.Random(1), newest, before)
    assert intact.fault_of(newest) is not None
    assert intact.fault_of(before) is None


def test_a_rank_is_found_by_its_mark(tmp_path):
    """Of another command's processes none is taken for its own."""
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
