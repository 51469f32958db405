"""Several processes on this machine, each running one function of a test's; what each returned comes back."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run_several(size: int, function: str, argument: object, folder: Path, timeout: float = 240) -> list:
    """Call `function` (module:name) with the argument in `size` processes that have met; return their results."""
    (folder / "argument").write_bytes(pickle.dumps(argument))
    meeting = folder / f"meeting-{size}"
    meeting.unlink(missing_ok=True)
    children = []
    for rank in range(size):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MEETING": str(meeting)}
        paths = os.pathsep.join([str(TESTS), str(TESTS / "distributed"), str(TESTS.parent)])
        env = os.environ | ranks | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", __file__, function, str(folder)]
        children.append(
            subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    texts = [child.communicate(timeout=timeout)[0].decode() for child in children]
    assert all(child.returncode == 0 for child in children), "\n".join(texts)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]


def _main(function: str, folder: Path) -> None:
    import importlib

    import torch

    from moe_lm.distributed import ALONE, begin, end

    torch.set_num_threads(1)
    module, name = function.split(":")
    argument = pickle.loads((folder / "argument").read_bytes())
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    processes = begin(torch.device("cpu"), f"file://{os.environ['MEETING']}") if size > 1 else ALONE
    result = getattr(importlib.import_module(module), name)(processes, argument)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    end()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
