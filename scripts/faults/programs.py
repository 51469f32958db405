"""Program texts that run first inside a training's processes, and put a fault or a delay where it is wanted."""

_SLOWLY = """
import time
from moe_lm.data.batching import Batches
_step = Batches.step
Batches.step = lambda *a, **k: (time.sleep({seconds}), _step(*a, **k))[1]
"""
SLOWLY, VERY_SLOWLY = (_SLOWLY.format(seconds=seconds) for seconds in (0.03, 3))
"""Every step waits, so that it can be hit in its middle, or another command started meanwhile."""

_DIE = """
import os, signal
_left = [{count}]
def die_at_last():
    _left[0] -= 1
    if _left[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
def about_to_die():
    return _left[0] <= 1
"""

_HALF_WRITTEN = """
import os, signal
from moe_lm import run
_write_text = run.write_text
def write_text(path, text):
    if path.name == "NAME":
        path.with_name(f".{path.name}.partial").write_text(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    _write_text(path, text)
run.write_text = write_text
"""

_PLACES = {
    "while the model's files are written": """
from moe_lm.checkpoint import sharded_safetensors as tensors_on_disk
_write = tensors_on_disk.write
def write(folder, tensors, group):
    if folder.name == "model":
        if about_to_die():
            folder.mkdir(exist_ok=True)
            (folder / f"half-{RANK}.safetensors").write_bytes(b"half")
        die_at_last()
    _write(folder, tensors, group)
tensors_on_disk.write = write
""",
    "after the model's files": """
from moe_lm.checkpoint import sharded_safetensors as tensors_on_disk
_write = tensors_on_disk.write
def write(folder, tensors, group):
    if folder.name == "optimizer":
        die_at_last()
    _write(folder, tensors, group)
tensors_on_disk.write = write
""",
    "after its own files": """
from moe_lm.checkpoint.saver import Saver
_sums = Saver._sums
def sums(self, partial):
    die_at_last()
    return _sums(self, partial)
Saver._sums = sums
""",
    "before state.json": """
from moe_lm.checkpoint import saver
_put = saver._put_in_place
def put(partial, path, state):
    die_at_last()
    _put(partial, path, state)
saver._put_in_place = put
""",
    "in the middle of state.json": """
from moe_lm.checkpoint import saver
_put = saver._put_in_place
def put(partial, path, state):
    if about_to_die():
        (partial / "state.json").write_text(state[: len(state) // 2])
    die_at_last()
    _put(partial, path, state)
saver._put_in_place = put
""",
    "between rename and prune": """
from moe_lm.checkpoint import checkpoint
_prune = checkpoint.prune
def prune(*arguments):
    die_at_last()
    _prune(*arguments)
checkpoint.prune = prune
""",
    "in the middle of prune": """
import types
from pathlib import Path
from moe_lm.checkpoint import checkpoint
_shutil = checkpoint.shutil
def rmtree(path, *a, **k):
    if about_to_die():
        sorted(file for file in Path(path).rglob("*") if file.is_file())[0].unlink()
    die_at_last()
    _shutil.rmtree(path, *a, **k)
checkpoint.shutil = types.SimpleNamespace(rmtree=rmtree)
""",
    "while metrics.jsonl is cut": _HALF_WRITTEN.replace("NAME", "metrics.jsonl"),
    "while result.json is written": _HALF_WRITTEN.replace("NAME", "result.json"),
}

PLACES = tuple(_PLACES)
ON_EVERY_RANK = PLACES[:3]
"""Places that processes other than the first come to."""
ON_RESUMING = "while metrics.jsonl is cut"


def killed(place: str, count: int) -> str:
    """Return the text of a process that kills itself where `place` says, the `count`-th time it comes there."""
    return _DIE.format(count=count) + _PLACES[place]


_STEP_KNOWN = """
import torch
from moe_lm.train.step import Update
_call, _now = Update.__call__, [None]
def call(self, batch, step, rate):
    _now[0] = step
    return _call(self, batch, step, rate)
Update.__call__ = call
def is_now():
    return {first} <= _now[0] < {last}
"""

_NAN = {
    "loss": """
from moe_lm.loss.objective import Objective
_loss = Objective.__call__
def objective(self, *a, **k):
    loss, values = _loss(self, *a, **k)
    return (loss * float("nan") if is_now() else loss), values
Objective.__call__ = objective
""",
    "gradient": """
from moe_lm.parallel.grad_reduce import Gradients
_init = Gradients.__init__
def init(self, model, *a, **k):
    _init(self, model, *a, **k)
    matrix = [p for p in model.parameters() if not hasattr(p, "row_gradients")][-1]
    matrix.register_hook(lambda grad: torch.full_like(grad, float("nan")) if is_now() else grad)
Gradients.__init__ = init
""",
    "explosion": """
_passes = Update._passes
def passes(self, batch, step):
    seen = _passes(self, batch, step)
    if is_now():
        seen.nats = seen.nats * 1e6
    return seen
Update._passes = passes
""",
}

FAULTY_UPDATES = tuple(_NAN)


def faulty(kind: str, first: int, last: int) -> str:
    """Return the text of a process whose steps from `first` to before `last` have no loss to learn from."""
    return _STEP_KNOWN.format(first=first, last=last) + _NAN[kind]


UNAWARE_OF_DISK = """
from moe_lm.checkpoint import saver
saver.free_disk = lambda folder: 2**50
"""
"""The disk fills up after the look at how much is free: the writing itself fails."""
