"""Checkpoints: one folder per step with safetensors files and a JSON state, without pickle; only complete ones count.

checkpoints/0000001000/model/*.safetensors  optimizer/*.safetensors  state.json

Each file holds the tensors or rows of one process; any number of processes can read them. `state.json` lists every
file with its size and checksum.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moe_lm.atomic_io import checksum, sync
from moe_lm.checkpoint import sharded_safetensors
from moe_lm.checkpoint.sharded_safetensors import NamedTensors, Shards, sharded
from moe_lm.errors import UserError
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext

FORMAT = 3
PARTS = ("model", "optimizer")
_DAMAGED = "damaged-"
"""Prefix of the folders of damaged checkpoints, which are kept but do not count."""

OptimizerState = Mapping[nn.Parameter, Mapping[str, Tensor]]
"""Optimizer state by parameter and kind, such as `exp_avg`."""


class CheckpointError(UserError):
    """A checkpoint whose files are missing or altered."""


def steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"{step:010d}"


def partial_path(path: Path) -> Path:
    """Return the folder of a checkpoint while it is written or deleted; it does not count as a checkpoint."""
    return path.with_name(f".{path.name}.partial")


def manifest(partial: Path, parallel: ParallelContext) -> dict[str, list]:
    """Return the size and checksum of each file in this process's share, as read back from the disk."""
    files = sorted(file for file in partial.rglob("*") if not file.is_dir())
    own = files[parallel.rank :: parallel.size]
    return {str(file.relative_to(partial)): [file.stat().st_size, checksum(file)] for file in own}


def commit(partial: Path, path: Path, state: dict) -> None:
    """Write `state.json`, flush everything to the disk and rename the folder: the checkpoint counts from here on."""
    (partial / "state.json").write_text(state_text(state))
    for file in [*partial.rglob("*"), partial]:
        sync(file)
    partial.rename(path)
    sync(path.parent)


def prune(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Delete the leftovers of crashes, and all checkpoints but the last `keep_last` and the steps in `keep`."""
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    for step in steps(folder)[:-keep_last]:
        if step not in keep:
            # Renamed first, because a folder that a crash left half deleted must not count as complete.
            path = path_of(folder, step)
            shutil.rmtree(path.rename(partial_path(path)))


def newest(folder: Path, parallel: ParallelContext, log: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint, None if there was never any; called by all processes.

    Damaged checkpoints are renamed with a warning. Raises `UserError` if all checkpoints are damaged.
    """
    found, had = parallel.first(lambda: (steps(folder), any(folder.glob(f"{_DAMAGED}*"))))
    for step in reversed(found):
        path = path_of(folder, step)
        try:
            verify(path, parallel=parallel)
        except CheckpointError as error:
            aside = parallel.first(lambda path=path: _set_aside(path))
            log(f"WARNING: {error}; it is now {aside.name}, and the one before it is taken")
        else:
            return path
    if found or had:
        raise UserError(
            f"no checkpoint in {folder} is intact, so the run cannot be resumed; the damaged ones are kept there: "
            f"delete {folder.parent} or choose another name=... to start again"
        )
    return None


def verify(path: Path, parts: tuple[str, ...] = PARTS, parallel: ParallelContext = SINGLE_PROCESS) -> dict:
    """Return the state of a checkpoint after checking all files of `parts`; each process checks a share of them.

    Raises `CheckpointError` on every process if a file is missing, altered, additional or not safetensors.
    """
    state, reason = None, None
    try:
        state = load_state(path)
        if state["step"] != int(path.name):
            raise _damaged(path, f"its state is that of step {state['step']}")
        _check_names(path, state["files"])
        files = [name for name in sorted(state["files"]) if name.split("/")[0] in parts]
        for name in files[parallel.rank :: parallel.size]:
            _check_file(path / name, *state["files"][name])
    except CheckpointError as error:
        reason = str(error)
    except (OSError, SafetensorError) as error:
        reason = str(_damaged(path, error))
    for found in parallel.each(reason):
        if found is not None:
            raise CheckpointError(found)
    return state


def load_state(path: Path) -> dict:
    """Return the JSON state; raises `CheckpointError` if it is missing or damaged."""
    try:
        record = json.loads((path / "state.json").read_text())
        intact = record["checksum"] == _checksum_of(record["state"])
        if record["format"] != FORMAT and not intact:
            raise UserError(
                f"{path} has format {record['format']}, this version of moe-lm reads {FORMAT}: train the model again"
            )
        if record["format"] != FORMAT or not intact:  # an intact checksum was made with FORMAT
            raise _damaged(path, "state.json does not match its checksum")
        return _check_types(record["state"])
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def state_text(state: dict) -> str:
    """Return the text of `state.json`."""
    return json.dumps({"format": FORMAT, "checksum": _checksum_of(state), "state": state}, indent=1)


def load_model(path: Path, model: nn.Module, shards: Shards, *, verified: bool = False) -> None:
    """Load the model's parameters and buffers; raises `UserError` if the checkpoint does not fit the model."""
    if not verified:
        verify(path, ("model",))
    targets = model_tensors(model, shards)
    wanted = {name: tuple(x.size()) for name, x in targets.items()}
    found = {name: shape for name, (shape, _) in _shapes(path, "model").items()}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise UserError(f"{path} does not fit the model: {name} is {found.get(name)}, wanted {wanted.get(name)}")
    sharded_safetensors.read(path / "model", targets)


def load_optimizer_state(path: Path, model: nn.Module, shards: Shards, *, verified: bool = False) -> OptimizerState:
    """Return the optimizer state of the model's parameters; of sharded parameters, only the local rows."""
    if not verified:
        verify(path, ("optimizer",))
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    targets = {}
    for key, (shape, dtype) in _shapes(path, "optimizer").items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise _damaged(path, f"optimizer state of an unknown parameter {name}")
        shard = shards.get(name)
        shape = (shard.size, *shape[1:]) if shard is not None and shape else shape
        tensor = torch.empty(shape, dtype=dtype)
        state.setdefault(parameters[name], {})[kind] = tensor
        targets[key] = sharded(tensor, shard)
    sharded_safetensors.read(path / "optimizer", targets)
    return state


def model_tensors(model: nn.Module, shards: Shards) -> NamedTensors:
    """Return the model's parameters and buffers under the names that a checkpoint uses."""
    return {name: sharded(tensor.detach(), shards.get(name)) for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, state: OptimizerState, shards: Shards) -> NamedTensors:
    """Return the optimizer's state under the names that a checkpoint uses: "kind/parameter"."""
    return {
        f"{kind}/{name}": sharded(value.detach(), shards.get(name))
        for name, parameter in model.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def _check_types(state: dict) -> dict:
    """Return the state if its entries have the right types; raises `KeyError` or `TypeError`."""
    types = {"step": int, "data": str, "progress": dict, "files": dict}
    for key in ("step", "files", *(types.keys() & state.keys())):
        if not isinstance(state[key], types[key]):
            raise TypeError(f"{key} is no {types[key].__name__}")
    for name, entry in state["files"].items():
        if not (isinstance(entry, list) and [type(x) for x in entry] == [int, str]):
            raise TypeError(f"{name} has no size and checksum")
    return state


def _check_names(path: Path, files: dict) -> None:
    present = {str(file.relative_to(path)) for file in path.rglob("*")}
    for name in sorted(present ^ {"state.json", *PARTS, *files}):
        raise _damaged(path, f"{name} is missing" if name not in present else f"{name} does not belong there")
    for name in files:
        if not re.fullmatch(rf"({'|'.join(PARTS)})/[^/]+\.safetensors", name):
            raise _damaged(path, f"{name} does not belong there")


def _check_file(file: Path, size: int, digest: str) -> None:
    if file.stat().st_size != size or checksum(file) != digest:
        raise _damaged(file.parent.parent, f"{file.name} does not match its checksum")
    try:
        sharded_safetensors.check_is_safetensors(file)
    except SafetensorError as error:
        raise _damaged(file.parent.parent, f"{file.name}: {error}") from error


def _shapes(path: Path, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        return sharded_safetensors.shapes(path / part)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts; return its new folder."""
    aside, number = path.with_name(f"{_DAMAGED}{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{_DAMAGED}{path.name}-{number}")
    return path.rename(aside)


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged ({reason})")


def _checksum_of(state: dict) -> str:
    return blake2b(json.dumps([FORMAT, state]).encode(), digest_size=16).hexdigest()
