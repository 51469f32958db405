"""Errors that are not bugs: mistakes of the user, lost processes, and too little memory."""

import re

_OUT_OF_MEMORY = r"out of memory|allocate memory|Storage size calculation overflowed"  # torch's wordings


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong and how to mend it (exit code 2, no traceback)."""


class PeerLost(Exception):
    """Another process or machine of the run is gone; repeating the same command may continue the run later."""


def in_a_line(error: BaseException, most: int = 160) -> str:
    """Return an error's message on one line, without the place in torch's sources where it was raised."""
    return re.sub(r"^\[\S+\] ", "", " ".join(str(error).split()))[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that torch or Python ran out of memory."""
    return isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, str(error)) is not None
