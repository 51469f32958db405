"""Checkpoints: a folder a step with safetensors and a JSON state; complete before it counts, never a pickle.

checkpoints/0000001000/model/*.safetensors  optimizer/*.safetensors  state.json

Each file holds what one process had; any number of processes reads them. `state.json` names every file with its size
and checksum.
"""

import json
import re
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moe_lm.atomic_io import checksum
from moe_lm.checkpoint import sharded_safetensors as tensors_on_disk
from moe_lm.checkpoint.sharded_safetensors import Named, named
from moe_lm.errors import UserError
from moe_lm.optim import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.grad_reduce import shares_of

FORMAT = 3
PARTS = ("model", "optimizer")
_ASIDE = "damaged-"


class Damaged(UserError):
    """A checkpoint that is not what was written."""


def steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of this step's checkpoint."""
    return folder / f"{step:010d}"


def partial_of(path: Path) -> Path:
    """Return where a checkpoint is while it is written, or half deleted: a name that does not count."""
    return path.with_name(f".{path.name}.partial")


def prune(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Delete all checkpoints but the last few, the steps in `keep`, and leftovers of crashes."""
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    for step in steps(folder)[:-keep_last]:
        if step not in keep:
            # Renamed first: a folder that a crash left half deleted must not look complete.
            path = path_of(folder, step)
            shutil.rmtree(path.rename(partial_of(path)))


def newest(folder: Path, parallel: ParallelContext, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is what was written, None if there is none at all; all processes take part.

    Damaged ones are set aside, loudly. Raises `UserError` where there are checkpoints, or were, and none is intact.
    """
    found, had = parallel.first(lambda: (steps(folder), any(folder.glob(f"{_ASIDE}*"))))
    for step in reversed(found):
        path = path_of(folder, step)
        try:
            verify(path, parallel=parallel)
        except Damaged as damaged:
            aside = parallel.first(lambda path=path: _set_aside(path))
            say(f"WARNING: {damaged}; it is now {aside.name}, and the one before it is taken")
        else:
            return path
    if found or had:
        raise UserError(
            f"no checkpoint in {folder} is intact: nothing to go on from; the damaged ones are kept beside it, delete "
            f"{folder.parent} or choose another name=... to begin anew"
        )
    return None


def verify(path: Path, parts: tuple[str, ...] = PARTS, parallel: ParallelContext = SINGLE_PROCESS) -> dict:
    """Return the state of a checkpoint all of whose files are what was written; the processes share the reading.

    Raises `Damaged` on each where a file is missing, altered, additional or no safetensors.
    """
    state, reason = None, None
    try:
        state = load_state(path)
        if state["step"] != int(path.name):
            raise _damaged(path, f"it is that of step {state['step']}")
        _check_names(path, state["files"])
        files = [name for name in sorted(state["files"]) if name.split("/")[0] in parts]
        for name in files[parallel.rank :: parallel.size]:
            _check_file(path / name, *state["files"][name])
    except Damaged as damaged:
        reason = str(damaged)
    except (OSError, SafetensorError) as error:
        reason = str(_damaged(path, error))
    for found in parallel.each(reason):
        if found is not None:
            raise Damaged(found)
    return state


def load_state(path: Path) -> dict:
    """Return the JSON state; raises `Damaged` where it is missing or not what was written."""
    try:
        record = json.loads((path / "state.json").read_text())
        intact = record["checksum"] == _checksum_of(record["state"])
        if record["format"] != FORMAT and not intact:
            raise UserError(f"{path} has format {record['format']}, this version of moe-lm reads {FORMAT}: train anew")
        if record["format"] != FORMAT or not intact:  # what it is a checksum of has the true format
            raise _damaged(path, "state.json does not match its checksum")
        return _checked(record["state"])
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def state_text(state: dict) -> str:
    """Return what `state.json` holds."""
    return json.dumps({"format": FORMAT, "checksum": _checksum_of(state), "state": state}, indent=1)


def load_model(path: Path, model: nn.Module, *, verified: bool = False) -> None:
    """Fill the model's parameters and buffers; raises `UserError` where file and model do not fit."""
    if not verified:
        verify(path, ("model",))
    targets = of_model(model)
    wanted = {name: tuple(x.size()) for name, x in targets.items()}
    found = {name: shape for name, (shape, _) in _shapes(path, "model").items()}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise UserError(f"{path} does not fit the model: {name} is {found.get(name)}, wanted {wanted.get(name)}")
    tensors_on_disk.read(path / "model", targets)


def load_optimizer(path: Path, model: nn.Module, optimizer: CompositeOptimizer, *, verified: bool = False) -> None:
    """Fill the optimizer's state, tensor by tensor under the parameters' names."""
    if not verified:
        verify(path, ("optimizer",))
    parameters, shares = dict(model.named_parameters()), shares_of(model)
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    targets = {}
    for key, (shape, dtype) in _shapes(path, "optimizer").items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise _damaged(path, f"optimizer state of an unknown parameter {name}")
        share = shares.get(name)
        shape = (share.size, *shape[1:]) if share is not None and shape else shape
        tensor = torch.empty(shape, dtype=dtype)
        state.setdefault(parameters[name], {})[kind] = tensor
        targets[key] = named(tensor, share)
    tensors_on_disk.read(path / "optimizer", targets)
    optimizer.load(state)


def of_model(model: nn.Module) -> Named:
    """Return the model's parameters and buffers by name, as a checkpoint holds them."""
    shares = shares_of(model)
    return {name: named(tensor.detach(), shares.get(name)) for name, tensor in model.state_dict().items()}


def of_optimizer(model: nn.Module, optimizer: CompositeOptimizer) -> Named:
    """Return the optimizer's state by kind and parameter, as a checkpoint holds it."""
    shares, state = shares_of(model), optimizer.state
    return {
        f"{kind}/{name}": named(value.detach(), shares.get(name))
        for name, parameter in model.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def _checked(state: dict) -> dict:
    """Return the state if it has the form of one; raises `KeyError` or `TypeError`."""
    forms = {"step": int, "data": str, "progress": dict, "files": dict}
    for key in ("step", "files", *(forms.keys() & state.keys())):
        if not isinstance(state[key], forms[key]):
            raise TypeError(f"{key} is no {forms[key].__name__}")
    for name, entry in state["files"].items():
        if not (isinstance(entry, list) and [type(x) for x in entry] == [int, str]):
            raise TypeError(f"{name} has no size and checksum")
    return state


def _check_names(path: Path, files: dict) -> None:
    there = {str(file.relative_to(path)) for file in path.rglob("*")}
    for name in sorted(there ^ {"state.json", *PARTS, *files}):
        raise _damaged(path, f"{name} is missing" if name not in there else f"{name} does not belong there")
    for name in files:
        if not re.fullmatch(rf"({'|'.join(PARTS)})/[^/]+\.safetensors", name):
            raise _damaged(path, f"{name} does not belong there")


def _check_file(file: Path, size: int, digest: str) -> None:
    if file.stat().st_size != size or checksum(file) != digest:
        raise _damaged(file.parent.parent, f"{file.name} does not match its checksum")
    try:
        tensors_on_disk.check_is_safetensors(file)
    except SafetensorError as error:
        raise _damaged(file.parent.parent, f"{file.name}: {error}") from error


def _shapes(path: Path, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        return tensors_on_disk.shapes(path / part)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"{_ASIDE}{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{_ASIDE}{path.name}-{number}")
    return path.rename(aside)


def _damaged(path: Path, reason: object) -> Damaged:
    return Damaged(f"checkpoint {path} is damaged ({reason})")


def _checksum_of(state: dict) -> str:
    return blake2b(json.dumps([FORMAT, state]).encode(), digest_size=16).hexdigest()
