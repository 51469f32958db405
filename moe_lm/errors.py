"""What is no fault of the program: the user's mistakes, and a machine that is too small."""

import re

_TOO_LARGE = r"out of memory|allocate memory|Storage size calculation overflowed"  # what torch says


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong and how to mend it (exit code 2, no traceback)."""


class PeerLost(Exception):
    """Something that the run needs has gone, by no mistake in the command: the same command may go on later."""


def in_a_line(error: BaseException, most: int = 160) -> str:
    """Return what an error says, in a line, without the place in torch's sources where it was found."""
    return re.sub(r"^\[\S+\] ", "", " ".join(str(error).split()))[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that memory is too small."""
    return isinstance(error, MemoryError) or re.search(_TOO_LARGE, str(error)) is not None
