"""Tasks in several processes: every result once, errors and killed workers reported, and no process left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_lm.data.workers import map_unordered
from moe_lm.errors import UserError


def square(task, report):
    report(1)
    report(task)
    return task * task, os.getpid()


def refuse(task, report):
    if task == 3:
        raise UserError("task 3 is no good")
    return task


class ForeignError(Exception):
    """Cannot be put together again from its arguments, as many of HTTP libraries cannot."""

    def __init__(self, *, needed):
        super().__init__(f"needed {needed}")


def fail(task, report):
    if task == "foreign":
        raise ForeignError(needed=1)
    return 1 // task


def die(task, report):
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_long(folder, report):
    Path(folder, str(os.getpid())).write_text("")
    time.sleep(60)


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_every_task_is_done_once_and_its_progress_reported(num_processes):
    amounts = []
    results = dict(map_unordered(square, [5, 6, 7], num_processes=num_processes, report=amounts.append))
    assert {index: value for index, (value, _) in results.items()} == {0: 25, 1: 36, 2: 49}
    assert sorted(amounts) == [1, 1, 1, 5, 6, 7]
    pids = {pid for _, pid in results.values()}
    assert pids == {os.getpid()} if num_processes == 1 else os.getpid() not in pids


def test_no_tasks_give_no_results():
    assert list(map_unordered(square, [], num_processes=3, report=print)) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_user_error_is_raised_as_it_is(num_processes):
    with pytest.raises(UserError, match=r"^task 3 is no good$"):
        list(map_unordered(refuse, [1, 2, 3, 4], num_processes=num_processes, report=print))


def test_other_errors_come_with_their_traceback():
    with pytest.raises(ZeroDivisionError) as caught:
        list(map_unordered(fail, [1, 0], num_processes=2, report=print))
    assert "1 // task" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"needed 1"):
        list(map_unordered(fail, [1, "foreign"], num_processes=2, report=print))


def test_a_killed_worker_ends_with_one_line_at_once():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"a worker process was killed.*processes=1"):
        list(map_unordered(die, [0, 1], num_processes=2, report=print))
    assert time.monotonic() - began < 50


def test_workers_end_with_an_iterator_that_is_closed(tmp_path):
    results = map_unordered(square, [2, 3, 4], num_processes=2, report=print)
    (_, (_, pid)) = next(results)
    results.close()
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, number):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_workers import map_unordered, wait_long
        if __name__ == "__main__":
            list(map_unordered(wait_long, [{str(tmp_path)!r}] * 2, num_processes=2, report=print))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    # A group of its own, as a terminal gives one to a command: Ctrl-C reaches every process in it.
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(parent.pid, number) if number == signal.SIGINT else parent.kill()
        errors = parent.stderr.read()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert all(gone(pid) for pid in pids)
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the parent's own, none of a worker


def gone(pid):
    """Whether a process ends within some seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
