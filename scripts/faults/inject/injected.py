"""Faults and delays inside a training's process: a program that runs first calls some of these functions."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

NAN = float("nan")


def wrap(target: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function, named as in "module:Class.function", by what `make` returns for it."""
    module, _, path = target.partition(":")
    owner, _, name = f"{module}:{path}".rpartition("." if "." in path else ":")
    owner = resolve_name(owner)
    setattr(owner, name, make(getattr(owner, name)))


def before(target: str, action: Callable[..., object]) -> None:
    """Call `action` with the arguments of each call of a function, before the function."""

    wrap(target, lambda function: lambda *args, **kwargs: (action(*args, **kwargs), function(*args, **kwargs))[1])


def slow(seconds: float) -> None:
    """Make every step wait, so that a signal can arrive in the middle of it."""
    before("moe_lm.data.batching:Batches.step", lambda *_: time.sleep(seconds))


def unaware_of_full_disk() -> None:
    """Make the disk look empty, so that no check but the write itself fails."""
    wrap("moe_lm.checkpoint.saver:free_disk", lambda _: lambda _folder: 2**50)


class Place(NamedTuple):
    """A moment inside a save: the call of a function with certain arguments."""

    target: str
    applies: Callable[..., bool] = lambda *_, **__: True
    half: Callable[..., object] = lambda *_, **__: None
    """Does a part of what the call would do."""
    every_rank: bool = False
    """Whether processes other than the first get there too."""
    once: bool = False
    """Whether a run gets there only once."""


def _half_written(path: Path, text: str) -> None:
    path.with_name(f".{path.name}.partial").write_text(text[: len(text) // 2])


def _half_model(folder: Path, *_: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"half-{os.environ.get('RANK', 0)}.safetensors").write_bytes(b"half")


def _half_state(partial: Path, _: Path, state: dict) -> None:
    text = json.dumps(state)
    (partial / "state.json").write_text(text[: len(text) // 2])


_WRITE, _COMMIT = "moe_lm.checkpoint.sharded_safetensors:write", "moe_lm.checkpoint.checkpoint:commit"
ON_RESUMING = "while metrics.jsonl is cut"
PLACES = {
    "while the model's files are written": Place(_WRITE, lambda folder, *_: folder.name == "model", _half_model, True),
    "after the model's files": Place(_WRITE, lambda folder, *_: folder.name == "optimizer", every_rank=True),
    "after its own files": Place("moe_lm.checkpoint.checkpoint:manifest", every_rank=True),
    "before state.json": Place(_COMMIT),
    "in the middle of state.json": Place(_COMMIT, half=_half_state),
    "between rename and prune": Place("moe_lm.checkpoint.checkpoint:prune"),
    "in the middle of prune": Place(
        "shutil:rmtree",
        lambda path, **options: not options and Path(path).parent.name == "checkpoints",
        lambda path: min(file for file in Path(path).rglob("*") if file.is_file()).unlink(),
    ),
    ON_RESUMING: Place("moe_lm.run:write_text", lambda p, _: p.name == "metrics.jsonl", _half_written, once=True),
    "while result.json is written": Place(
        "moe_lm.run:write_text", lambda path, _: path.name == "result.json", _half_written, once=True
    ),
}


def kill(place: str, count: int) -> None:
    """Let the process kill itself at a place, when it gets there for the `count`-th time."""
    target, applies, half, _, once = PLACES[place]
    left = [1 if once else count]

    def action(*args: object, **kwargs: object) -> None:
        if applies(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                half(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

    before(target, action)


FAULTY_UPDATES = "loss", "gradient", "explosion"


def spoil(kind: str, first: int, last: int) -> None:
    """Let the steps from `first` to before `last` have a loss or gradient that is not finite, or an exploded loss."""
    import torch

    from moe_lm.ops.sparse_rows import RowSparseParameter

    now = [0]
    before("moe_lm.train.step:TrainStep.__call__", lambda _self, _batch, step, *_: now.__setitem__(0, step))

    def spoiled(value, bad):
        return bad(value) if first <= now[0] < last else value

    def loss(call: Callable) -> Callable:
        def objective(*args, **kwargs):
            value, balance = call(*args, **kwargs)
            return spoiled(value, lambda x: x * NAN), balance

        return objective

    def sums(call: Callable) -> Callable:
        def forward_backward(*args):
            found = call(*args)
            found.nats = spoiled(found.nats, lambda x: x * 1e6)
            return found

        return forward_backward

    def hook(_self: object, model: torch.nn.Module, *_: object) -> None:
        parameter = [p for p in model.parameters() if not isinstance(p, RowSparseParameter)][-1]
        parameter.register_hook(lambda grad: spoiled(grad, lambda x: torch.full_like(x, NAN)))

    if kind == "loss":
        wrap("moe_lm.loss.objective:Objective.__call__", loss)
    elif kind == "gradient":
        before("moe_lm.parallel.grad_reduce:GradReducer.__init__", hook)
    else:
        wrap("moe_lm.train.step:TrainStep._forward_backward", sums)
