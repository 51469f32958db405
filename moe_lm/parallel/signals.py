"""Signals: the first lets the step end and saves, on every process; what the exit code then tells a scheduler."""

import contextlib
import ctypes
import os
import signal
import sys

from moe_lm.errors import PeerLost

INTERRUPTED = 130
"""Somebody pressed Ctrl-C."""
REQUEUE = 75
"""EX_TEMPFAIL: a machine is wanted back, or the time is up; the same command goes on later."""

STOPPED_EARLY = 128 + signal.SIGTERM
"""What SIGTERM makes of one process of several outside training: a mistake of another one may have sent it."""

LAUNCHER = "MOE_LM_LAUNCHER"
"""The variable that tells processes the number of the one that started them."""

_FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def code_of(number: int) -> int:
    """Return the exit code of a run that ended because of this signal."""
    return INTERRUPTED if number == signal.SIGINT else REQUEUE


class SignalHandler:
    """What signals have asked for; while it is not `collecting` them, they end the program at once, with their code.

    A second SIGINT kills as usual, a second SIGTERM, SIGUSR1 or SIGHUP changes nothing: batch systems send several, and
    more than once. Of `several` processes SIGTERM before and after training ends one as it would without this: a batch
    system sends it where another one made a mistake, which must not look like a wish to go on later.
    """

    def __init__(self, several: bool = False):
        self.received: list[int] = []
        self._collecting, self._several = False, several
        for number in _FROM_SCHEDULERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Whether there was a signal."""
        return bool(self.received)

    @contextlib.contextmanager
    def collecting(self):
        """Let signals wait, as long as this lasts, for somebody to look at `requested`."""
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
            sys.exit(STOPPED_EARLY if self._several and number == signal.SIGTERM else code_of(number))


def launcher_gone() -> bool:
    """Whether what started this process as one of several is there no more."""
    return os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid())


def leave_in_peace() -> None:
    """Ignore that the launcher now ends what is left of the processes: each ends by itself, with the code it has."""
    for number in _FROM_SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Be told by SIGTERM when the launcher has gone, so that no process lives on and holds the run's lock.

    Raises `PeerLost` where it has gone already.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher_gone():
        raise PeerLost("the process that started this one has gone: repeat the command")
