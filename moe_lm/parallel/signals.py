"""Signals: the first one lets every process finish its step and save; the exit code tells a scheduler what happened."""

import contextlib
import ctypes
import os
import signal
import sys

from moe_lm.errors import PeerLost

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
REQUEUE = 75
"""Exit code (EX_TEMPFAIL) of a preempted run: the same command continues it later."""

STOPPED_EARLY = 128 + signal.SIGTERM
"""Exit code of one of several processes after SIGTERM outside training, which another process's error may cause."""

LAUNCHER = "MOE_LM_LAUNCHER"
"""Environment variable with the process id of the launcher."""

_FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def exit_code_of(number: int) -> int:
    """Return the exit code of a run that this signal ended."""
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


class SignalHandler:
    """Records signals while it is `collecting` them; at other times a signal ends the program at once with its code.

    A second SIGINT kills as usual; a second SIGTERM, SIGUSR1 or SIGHUP changes nothing, because batch systems repeat
    them. With `several` processes a SIGTERM before or after training is no request to requeue: batch systems send it
    to a process whose peer failed.
    """

    def __init__(self, several: bool = False):
        self.received: list[int] = []
        self._collecting, self._several = False, several
        for number in _FROM_SCHEDULERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Return whether a signal has been received."""
        return bool(self.received)

    @contextlib.contextmanager
    def collecting(self):
        """Record signals inside this context, for the caller to read `requested`."""
        self._collecting = True
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._collecting = False

    def _handle(self, number, frame) -> None:  # noqa: ARG002
        self.received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self._collecting:
            leave_in_peace()
            sys.exit(STOPPED_EARLY if self._several and number == signal.SIGTERM else exit_code_of(number))


def launcher_gone() -> bool:
    """Return whether the launcher of this process has died."""
    return os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid())


def leave_in_peace() -> None:
    """Ignore the launcher's signals from now on, so that each process ends by itself with its own exit code."""
    for number in _FROM_SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Receive SIGTERM when the launcher dies, so that no orphan keeps the run's lock.

    Raises `PeerLost` where it has died already.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher_gone():
        raise PeerLost("the process that started this one has gone: repeat the command")
