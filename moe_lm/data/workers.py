"""The same work on many tasks, in this process or in several: results as they come, and no process left behind."""

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
Watch = Callable[[int], None]
"""Told how much has been done since it was last called."""


def each(
    tasks: Sequence[Task], work: Callable[[Task, Watch], Result], *, num_processes: int, watch: Watch
) -> Iterator[tuple[int, Result]]:
    """Yield `(index, work(task, watch))` in the order in which they end; `work` and tasks are pickled.

    Every process ends with this iterator, however it ends, and with this process, even if that is killed. Raises
    `UserError` where a process is killed, and whatever `work` raises.
    """
    if min(num_processes, len(tasks)) <= 1:
        for index, task in enumerate(tasks):
            yield index, work(task, watch)
        return
    waiting, busy = iter(enumerate(tasks)), {}
    with _started(min(num_processes, len(tasks)), work) as connections:
        for connection in connections:
            busy[connection] = _give(connection, waiting)
        while busy:
            for connection in wait(list(busy)):
                kind, content = _receive(connection)
                if kind == "progress":
                    watch(content)
                elif kind == "error":
                    raise content
                else:
                    yield busy.pop(connection), content
                    if (index := _give(connection, waiting)) is not None:
                        busy[connection] = index


@contextmanager
def _started(number: int, work: Callable[[Task, Watch], Result]) -> Iterator[list[Connection]]:
    """Start processes that wait for tasks, and end them in any case."""
    context = multiprocessing.get_context("spawn")  # a copy of a process that runs threads may hang
    parallel, connections = [], []
    try:
        with _interrupts_ignored():
            for _ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
                parallel.append(process)
                connections.append(ours)
        yield connections
    finally:
        for process in parallel:
            process.terminate()
        for process in parallel:
            process.join()
        for connection in connections:
            connection.close()


def _give(connection: Connection, waiting: Iterator[tuple[int, Task]]) -> int | None:
    """Send the next task and return its index; None where there is none left."""
    index, task = next(waiting, (None, None))
    if index is not None:
        try:
            connection.send(task)
        except BrokenPipeError:
            raise _killed() from None
    return index


def _receive(connection: Connection) -> tuple[str, object]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise _killed() from None


def _killed() -> UserError:
    return UserError(
        "a worker process was killed, most likely for want of memory; repeat the command to go on, or moe-lm "
        "prepare with processes=1 and the same corpus and vocabulary, which needs less"
    )


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let processes started here inherit that Ctrl-C is none of their business; their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, work: Callable[[Task, Watch], Result]) -> None:
    """What a worker process does: a task comes in, its progress and its result go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", work(task, lambda amount: connection.send(("progress", amount))))
        except Exception as error:  # every kind: the parent is to raise it
            answer = ("error", _sendable(error))
        connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """Return the error, or one that can be pickled: many of other packages cannot be put together again."""
    if type(error) is UserError:
        return error
    if type(error).__module__ == "builtins":
        error.add_note(traceback.format_exc())
        return error
    return RuntimeError(traceback.format_exc())


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
