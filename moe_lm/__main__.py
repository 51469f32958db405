"""The command line: moe-lm COMMAND [key=value ...]."""

import difflib
import importlib
import os
import signal
import sys
import time

from moe_lm import __version__
from moe_lm.cli import COMMANDS, help_text, usage
from moe_lm.compat import current_overrides
from moe_lm.errors import PeerLost, UserError, in_a_line, is_out_of_memory
from moe_lm.parallel.signals import launcher_gone

USER_ERROR, FAILURE, BROKEN_PIPE = 2, 1, 141
_PATIENCE = 10
"""Seconds that a process other than the first waits before it prints its error.

Even on a busy machine, this is enough for the first process to print the same error and the launcher to end the rest.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for a user's error, 1 for a machine's failure, each in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(*arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        _print_error(str(error))
        return USER_ERROR
    except PeerLost as lost:
        _print_error(str(lost), peer_lost=True)
        return FAILURE
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; Python must not flush the rest at exit.
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
    except Exception as error:
        if (line := _yaml_error(error)) is None:
            raise
        _print_error(line)
        return USER_ERROR


def _run(name: str | None = None, *arguments: str) -> int:
    if name == "--version":
        print(__version__)
        return 0
    if name in (None, "-h", "--help", "help"):
        print(usage())
        return 0 if name else USER_ERROR
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"no command {name!r}{meant}; there are {', '.join(COMMANDS)}")
    if "-h" in arguments or "--help" in arguments:
        print(help_text(name))
        return 0
    return importlib.import_module(f"moe_lm.cli.{name}").main(current_overrides([*arguments]))


def _yaml_error(error: Exception) -> str | None:
    """Return a syntax error in a file of `configs` as one line, None for any other error."""
    import yaml  # slow to import

    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return None
    return f"{mark.name}, line {mark.line + 1}, is no valid YAML ({error.problem}): correct it"


def _print_error(line: str, peer_lost: bool = False) -> None:
    """Print an error once, although all processes may raise it: every other process waits for the first to print it.

    A process that lost a peer waits longer, as the peer's own error explains more.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" or peer_lost:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        until = time.monotonic() + (2 * _PATIENCE if peer_lost else _PATIENCE)
        while time.monotonic() < until and not launcher_gone():
            time.sleep(0.1)
    if rank != "0":
        line = f"process {rank}: {line}"
    print(f"moe-lm: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
