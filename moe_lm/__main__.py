"""The command line: moe-lm COMMAND [key=value ...]."""

import difflib
import importlib
import os
import signal
import sys
import time

from moe_lm import __version__
from moe_lm.cli import NAMES
from moe_lm.errors import PeerLost, UserError, in_a_line, is_out_of_memory
from moe_lm.parallel.signals import launcher_gone

MISTAKE, FAILURE, BROKEN_PIPE = 2, 1, 141
_PATIENCE = 10
"""Seconds in which, on a busy machine too, the first process tells the same mistake and the launcher ends the rest."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one line and exit code 2, a failing machine in 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else MISTAKE
    name, *rest = arguments
    try:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            meant = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"no command {name!r}{meant}; there are {', '.join(NAMES)}")
        command = importlib.import_module(f"moe_lm.cli.{name}")
        if "-h" in rest or "--help" in rest:
            from moe_lm.cli.help import text

            print(text(name, command))
            return 0
        code = command.main(rest)
        sys.stdout.flush()
        return code
    except UserError as mistake:
        _tell(str(mistake))
        return MISTAKE
    except PeerLost as lost:
        _tell(str(lost), lost=True)
        return FAILURE
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python must not flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        print(f"moe-lm: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return FAILURE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"moe-lm: out of memory ({in_a_line(error)})", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("moe-lm: interrupted", file=sys.stderr)
        return 130


def _tell(line: str, lost: bool = False) -> None:
    """Print a mistake once, though several processes may have made it: the first one's word counts.

    Who lost another process waits longer: that one may have something to tell.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" or lost:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        until = time.monotonic() + (2 * _PATIENCE if lost else _PATIENCE)
        while time.monotonic() < until and not launcher_gone():
            time.sleep(0.1)
    if rank != "0":
        line = f"process {rank}: {line}"
    print(f"moe-lm: {line}", file=sys.stderr, flush=True)


def _usage() -> str:
    lines = ["moe-lm COMMAND [key=value ...]      moe-lm COMMAND --help lists the keys", ""]
    for name in NAMES:
        lines.append(f"  {name:<10}{importlib.import_module(f'moe_lm.cli.{name}').HELP}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
