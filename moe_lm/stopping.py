"""Signals: the first lets the step end and saves, on every process; what the exit code then tells a scheduler."""

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130
"""Somebody pressed Ctrl-C."""
REQUEUE = 75
"""EX_TEMPFAIL: a machine is wanted back, or the time is up; the same command goes on later."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def code_of(number: int) -> int:
    """Return the exit code of a run that stopped and saved because of this signal."""
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


def stop_on_signals(stop: Callable[[int], None]) -> None:
    """Call `stop` with the first signal's number; a second one of the same kind kills as usual."""

    def handle(number, frame):  # noqa: ARG001
        stop(number)
        signal.signal(number, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, handle)


def forget_signals() -> None:
    """Let signals do again what they do by default: what comes now can be broken off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def end_with_parent() -> None:
    """Be told by SIGTERM when the launcher has gone, so that no process lives on and holds the run's lock."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
