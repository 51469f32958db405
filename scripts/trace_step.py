"""Traces one training step and prints which files of moe_lm a batch passes through, in order of first use.

    python scripts/trace_step.py [key=value ...]

The step is that of a small flat mixture with a sampled softmax, in one process on a CPU; overrides, as for `moe-lm
train`, change it. The first list holds the files that run between the micro-batch and the loss, the second those that
run from the loss to the changed weights. A first step, which fills caches, is not traced.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import synthetic

import moe_lm
from moe_lm.loss.objective import Objective

PACKAGE = str(Path(moe_lm.__file__).parent) + os.sep
SMALL = [
    "model=moe_4",
    "model.width=16",
    "model.expert_hidden=32",
    "batch.words=120",
    "batch.micro_words=120",
    "softmax.num_sampled=20",
    "machine.device=cpu",
    "machine.threads=1",
]


def main() -> None:
    """Print both lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the traced training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*SMALL, *options.overrides]
        trainer = synthetic.trainer(overrides, synthetic.data(500, 5000), Path(folder) / "traced")
        synthetic.step(trainer)
        for title, files in zip(("batch to loss", "loss to weights"), traced(trainer), strict=True):
            print(f"{title}: {len(files)} files")
            print("".join(f"  {file}\n" for file in files), end="")


def traced(trainer) -> tuple[list[str], list[str]]:
    """Return the files whose functions run before and after the loss exists, in one step of a trainer."""
    before: dict[str, None] = {}
    after: dict[str, None] = {}
    seen = {"into": None}

    def profile(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and seen["into"] is not None and file.startswith(PACKAGE):
            seen["into"].setdefault(file.removeprefix(PACKAGE))
        if event == "return" and frame.f_code is Objective.__call__.__code__:
            seen["into"] = after

    begins = trainer.model.register_forward_pre_hook(lambda *_: seen.update(into=before))
    batch = trainer.prefetcher.step(trainer.progress.step)
    _profiled(profile, lambda: trainer.train_step(batch, trainer.progress.step, 1e-3))
    begins.remove()
    return list(before), list(after)


def _profiled(profile: Callable, work: Callable[[], object]) -> None:
    """Run a function with a profiler on this thread; on a CPU, a backward pass runs on the thread that calls it."""
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    main()
