"""Several commands of moe-lm one after another in processes that meet anew for each, as a launcher's would."""

import os
import shutil
from functools import partial
from pathlib import Path

from tiny_training import call

from moe_lm.cli import train
from moe_lm.parallel.context import init_parallel


def run_commands(commands: list[list[str]]) -> None:
    """Run each command, or ["copy", from, to], in every process; all must end with 0."""
    size, first = os.environ["WORLD_SIZE"], os.environ["RANK"] == "0"
    for number, (name, *arguments) in enumerate(commands):
        if name == "copy":
            if first:  # the others wait for it where they meet
                shutil.copytree(*arguments)
            continue
        train.init_parallel = partial(init_parallel, init_method=f"file://{Path.cwd()}/meeting-{size}-{number}")
        code = call(name, *arguments)
        assert code == 0, f"{name} {' '.join(arguments)} ended with {code}"
