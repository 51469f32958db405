"""Several commands of moe-lm one after another in processes that meet anew for each, as a launcher's would."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from several import TESTS


def run_commands(size: int, commands: list[list[str]], folder: Path, timeout: float = 240) -> None:
    """Run each command (or ["copy", from, to]) in `size` processes in a folder; all must end with 0."""
    children = []
    for rank in range(size):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        paths = os.pathsep.join([str(TESTS), str(TESTS / "parallel"), str(TESTS.parent)])
        env = os.environ | ranks | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-W", "error", __file__, repr(commands)]
        children.append(
            subprocess.Popen(program, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    texts = [child.communicate(timeout=timeout)[0].decode() for child in children]
    assert all(child.returncode == 0 for child in children), "\n".join(texts)


def _main(commands: list[list[str]]) -> int:
    from tiny_training import call

    from moe_lm.cli import train
    from moe_lm.parallel.context import init_parallel

    size, first = os.environ["WORLD_SIZE"], os.environ["RANK"] == "0"
    for number, (name, *arguments) in enumerate(commands):
        if name == "copy":
            if first:  # the others wait for it where they meet
                shutil.copytree(*arguments)
            continue
        train.init_parallel = partial(init_parallel, init_method=f"file://{Path.cwd()}/meeting-{size}-{number}")
        if code := call(name, *arguments):
            return code
    return 0


if __name__ == "__main__":
    import ast

    sys.exit(_main(ast.literal_eval(sys.argv[1])))
