"""Several processes on this machine, each running one function of a test's; what each returned comes back."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run_several(size: int, function: str, argument: object, folder: Path, timeout: float = 900) -> list:
    """Call `function` (module:name) with the argument in `size` processes that have met; return their results."""
    (folder / "argument").write_bytes(pickle.dumps(argument))
    meeting = folder / f"meeting-{size}"
    meeting.unlink(missing_ok=True)
    children, logs = [], [folder / f"log-{rank}" for rank in range(size)]
    paths = os.pathsep.join([str(TESTS), str(TESTS / "parallel"), str(TESTS.parent)])
    for rank, path in enumerate(logs):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MEETING": str(meeting)}
        env = os.environ | ranks | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", __file__, function, str(folder)]
        with path.open("wb") as log:
            children.append(subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT))
    _wait(children, timeout)
    assert all(child.returncode == 0 for child in children), "\n".join(path.read_text() for path in logs)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]


def _wait(children: list[subprocess.Popen], timeout: float) -> None:
    """Wait for all; when one fails, the others, who wait for it, have a little time to say so."""
    deadline = time.monotonic() + timeout
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        if any(child.returncode for child in children):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.wait()


def _main(function: str, folder: Path) -> None:
    import importlib

    import torch

    from moe_lm.parallel.context import SINGLE_PROCESS, destroy_parallel, init_parallel

    torch.set_num_threads(1)
    module, name = function.split(":")
    argument = pickle.loads((folder / "argument").read_bytes())
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    parallel = init_parallel(torch.device("cpu"), f"file://{os.environ['MEETING']}") if size > 1 else SINGLE_PROCESS
    result = getattr(importlib.import_module(module), name)(parallel, argument)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    destroy_parallel()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
