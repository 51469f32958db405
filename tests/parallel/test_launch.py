"""How many processes, and what their exit codes become."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import moe_lm
from moe_lm.analysis.memory import StepSizes
from moe_lm.errors import UserError
from moe_lm.parallel import launch
from moe_lm.parallel.context import expert_parallel_size
from moe_lm.parallel.group import Group, shard_rows
from moe_lm.parallel.launch import _outcome, check_num_processes

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: 2, 1: -15}, 2, None),  # a mistake: the launcher ended the others
        ({0: 75, 1: 75}, 75, None),  # asked to stop
        ({0: 130}, 130, None),
        ({0: 1, 1: 2}, 2, None),  # one made the mistake, the other lost it
        ({0: 1, 1: 75}, 75, None),
        ({1: -9}, 1, "process 1 was killed by SIGKILL"),
        ({0: -15, 1: -9}, 1, "process 1 was killed by SIGKILL"),
        ({0: 1, 2: -9}, 1, "process 2 was killed by SIGKILL"),
        ({0: -15}, 1, "process 0 was killed by SIGTERM"),
    ],
)
def test_one_exit_code_of_several(capsys, codes, code, said):
    assert _outcome(codes, []) == code
    err = capsys.readouterr().err
    assert (said in err and len(err.splitlines()) == 1) if said else err == ""


@pytest.mark.parametrize(
    ("codes", "received", "code"),
    [
        ({0: 75, 1: 75}, [TERM], 75),
        ({0: 143, 1: -15}, [TERM], 75),  # before there was anything to save
        ({0: -10, 1: -10}, [USR1], 75),
        ({0: 130, 1: 130}, [INT], 130),
        ({0: 75, 1: 143}, [INT], 130),
        ({0: 2, 1: 143}, [TERM], 2),  # one could not save
        ({0: 2, 1: 2}, [TERM], 2),
        ({0: 75, 1: -9}, [TERM], 1),
        ({0: -10, 1: -10}, [TERM], 1),
        ({0: 143, 1: 143}, [], 143),  # somebody else ended them
    ],
)
def test_a_signal_counts_only_where_all_stopped_for_it(codes, received, code):
    assert _outcome(codes, received) == code


CHILD = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(1)
    sys.exit(%d)
signal.signal(%d, stop)
pathlib.Path(f"ready-{time.monotonic_ns()}").touch()
time.sleep(60)
"""


@pytest.fixture
def no_other_children(ranks):
    """Fork servers and multiprocessing's tracker, begun by other tests in this process, would get the signals too."""
    ranks.stop()
    resource_tracker._resource_tracker._stop()


@pytest.mark.usefixtures("no_other_children")
@pytest.mark.parametrize(
    ("number", "ends_with", "code"), [(TERM, 75, 75), (USR1, 75, 75), (INT, 130, 130), (TERM, 2, 2)]
)
def test_signals_are_passed_on_and_the_processes_say_what_came_of_it(tmp_path, monkeypatch, number, ends_with, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "program", lambda: (sys.executable, "-c", CHILD % (ends_with, number)))

    def send():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert launch.launch([], 2) == code
    thread.join()


def test_processes_do_not_import_what_lies_in_the_working_directory(tmp_path, monkeypatch):
    """Unless the package itself lies there, as in a tree that is not installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moe_lm").mkdir()
    (tmp_path / "moe_lm" / "__main__.py").write_text("raise SystemExit('a stranger')")
    done = subprocess.run([*launch.program(), "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == moe_lm.__version__, done.stderr
    monkeypatch.chdir(Path(moe_lm.__file__).parent.parent)
    assert "-P" not in launch.program()


def test_no_more_processes_than_memory_holds(monkeypatch):
    monkeypatch.setattr(launch, "free_memory", lambda: 4 << 30)
    check_num_processes(13, None)
    with pytest.raises(UserError, match=r"num_processes=14: .* 4.0 GiB of memory are free"):
        check_num_processes(14, None)


def test_as_many_processes_as_gpus():
    check_num_processes(8, 8)
    check_num_processes(3, None)
    for number, gpus, words in [(0, None, "at least 1"), (-2, 4, "at least 1"), (9, 8, "8 GPUs"), (2, 1, "1 GPU")]:
        with pytest.raises(UserError, match=words):
            check_num_processes(number, gpus)


@pytest.mark.parametrize(
    ("total", "size", "together", "sizes"),
    [
        (6, 4, 1, (2, 2, 1, 1)),
        (2, 3, 1, (1, 1, 0)),
        (793_471, 8, 1, (99_184,) * 7 + (99_183,)),
        (15, 4, 3, (6, 3, 3, 3)),  # 5 groups of 3: whole
        (12, 2, 3, (6, 6)),
        (6, 3, 3, (2, 2, 2)),  # 2 groups, 3 processes: cut
    ],
)
def test_rows_are_divided_evenly_and_in_order(total, size, together, sizes):
    shares = [shard_rows(total, Group(rank, size), together) for rank in range(size)]
    assert all(share.sizes == sizes and share.total == total for share in shares)
    assert [number for share in shares for number in share.rows] == list(range(total))


def test_as_many_share_the_experts_as_find_one_each():
    assert [expert_parallel_size(8, experts) for experts in (0, 1, 2, 3, 4, 7, 8, 256)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [expert_parallel_size(6, experts) for experts in (1, 2, 3, 5, 6)] == [1, 2, 3, 3, 6]
    assert expert_parallel_size(8, 256, 2) == 2
    assert StepSizes(words=90, micro_words=9, num_processes=6).expert_processes(4) == 3
