"""One function on many tasks, in this process or in several: results as they come, and no process left behind.

Unlike in `concurrent.futures`, tasks report their progress, and workers end with their parent even if it is killed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from moe_lm.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
Report = Callable[[int], None]
"""Called with the amount of work done since its last call."""


def map_unordered(
    work: Callable[[Task, Report], Result], tasks: Sequence[Task], *, num_processes: int, report: Report
) -> Iterator[tuple[int, Result]]:
    """Yield `(index, work(task, report))` in the order in which tasks end; `work` and tasks are pickled.

    Every worker ends when this iterator ends, for whatever reason, or when this process ends, even if it is killed.
    Raises `UserError` if a worker is killed, and whatever `work` raises.
    """
    if min(num_processes, len(tasks)) <= 1:
        for index, task in enumerate(tasks):
            yield index, work(task, report)
        return
    waiting, busy = iter(enumerate(tasks)), {}
    with _workers(min(num_processes, len(tasks)), work) as connections:
        for connection in connections:
            busy[connection] = _send_next(connection, waiting)
        while busy:
            for connection in wait(list(busy)):
                kind, content = _receive(connection)
                if kind == "progress":
                    report(content)
                elif kind == "error":
                    raise content
                else:
                    yield busy.pop(connection), content
                    if (index := _send_next(connection, waiting)) is not None:
                        busy[connection] = index


@contextmanager
def _workers(number: int, work: Callable[[Task, Report], Result]) -> Iterator[list[Connection]]:
    """Start processes that wait for tasks, and end them in any case."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with running threads may hang
    workers, connections = [], []
    try:
        with _interrupts_ignored():
            for _ in range(number):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_serve, args=(theirs, work), daemon=True)
                worker.start()
                theirs.close()
                workers.append(worker)
                connections.append(ours)
        yield connections
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        for connection in connections:
            connection.close()


def _send_next(connection: Connection, waiting: Iterator[tuple[int, Task]]) -> int | None:
    """Send the next task and return its index; None where there is none left."""
    index, task = next(waiting, (None, None))
    if index is not None:
        try:
            connection.send(task)
        except BrokenPipeError:
            raise _worker_killed() from None
    return index


def _receive(connection: Connection) -> tuple[str, object]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise _worker_killed() from None


def _worker_killed() -> UserError:
    return UserError(
        "a worker process was killed, most likely for lack of memory; repeat the command to resume, or run moe-lm "
        "prepare with processes=1 and the same corpus and vocabulary, which needs less"
    )


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Make processes that are started here ignore Ctrl-C from the beginning, as their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, work: Callable[[Task, Report], Result]) -> None:
    """Run tasks in a worker process: receive a task, send its progress and its result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            message = ("result", work(task, lambda amount: connection.send(("progress", amount))))
        except Exception as error:  # of any class: the parent raises it
            message = ("error", _picklable(error))
        connection.send(message)


def _picklable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its traceback: many errors of other packages cannot be unpickled."""
    if type(error) is UserError:
        return error
    if type(error).__module__ == "builtins":
        error.add_note(traceback.format_exc())
        return error
    return RuntimeError(traceback.format_exc())


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
