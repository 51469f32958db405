"""Work in several processes: every result once, errors and deaths reported, and nobody left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_lm.data.workers import each
from moe_lm.errors import UserError


def square(task, watch):
    watch(1)
    watch(task)
    return task * task, os.getpid()


def refuse(task, watch):
    if task == 3:
        raise UserError("task 3 is no good")
    return task


class ForeignError(Exception):
    """Cannot be put together again from its arguments, as many of HTTP libraries cannot."""

    def __init__(self, *, needed):
        super().__init__(f"needed {needed}")


def fail(task, watch):
    if task == "foreign":
        raise ForeignError(needed=1)
    return 1 // task


def die(task, watch):
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_long(folder, watch):
    Path(folder, str(os.getpid())).write_text("")
    time.sleep(60)


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_every_task_is_done_once_and_its_progress_told(num_processes):
    amounts = []
    results = dict(each([5, 6, 7], square, num_processes=num_processes, watch=amounts.append))
    assert {index: value for index, (value, _) in results.items()} == {0: 25, 1: 36, 2: 49}
    assert sorted(amounts) == [1, 1, 1, 5, 6, 7]
    pids = {pid for _, pid in results.values()}
    assert pids == {os.getpid()} if num_processes == 1 else os.getpid() not in pids


def test_no_task_is_no_work():
    assert list(each([], square, num_processes=3, watch=print)) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_mistake_reaches_the_user(num_processes):
    with pytest.raises(UserError, match=r"^task 3 is no good$"):
        list(each([1, 2, 3, 4], refuse, num_processes=num_processes, watch=print))


def test_other_errors_come_with_what_happened():
    with pytest.raises(ZeroDivisionError) as caught:
        list(each([1, 0], fail, num_processes=2, watch=print))
    assert "1 // task" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"needed 1"):
        list(each([1, "foreign"], fail, num_processes=2, watch=print))


def test_a_killed_worker_is_one_line_and_no_waiting():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"a worker process was killed.*processes=1"):
        list(each([0, 1], die, num_processes=2, watch=print))
    assert time.monotonic() - began < 50


def test_what_is_not_asked_for_any_more_ends(tmp_path):
    results = each([2, 3, 4], square, num_processes=2, watch=print)
    (_, (_, pid)) = next(results)
    results.close()
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, number):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_workers import each, wait_long
        if __name__ == "__main__":
            list(each([{str(tmp_path)!r}] * 2, wait_long, num_processes=2, watch=print))
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
