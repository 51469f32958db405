"""Checkpoints: a folder a step with safetensors and a JSON state; complete before it counts, never a pickle.

checkpoints/0000001000/model.safetensors  optimizer.safetensors  state.json
"""

import json
import shutil
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_lm.files import sync
from moe_lm.mistake import Mistake
from moe_lm.optimizer import Together

FORMAT = 2
_PARTS = ("model", "optimizer")


def save(folder: Path, step: int, model: nn.Module, optimizer: Together, state: dict) -> Path:
    """Write the checkpoint of this step; a crash at any moment leaves the earlier ones as they were.

    Raises `Mistake` where it cannot be written (disk full, read-only).
    """
    final = folder / f"{step:010d}"
    if final.exists():
        return final
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(_detached(model.state_dict()), partial / "model.safetensors")
        save_file(_flatten(model, optimizer), partial / "optimizer.safetensors")
        sums = {part: _checksum(partial / f"{part}.safetensors") for part in _PARTS}
        state = {"step": step, "checksums": sums, **state}
        record = {"format": FORMAT, "checksum": _checksum_of(state), "state": state}
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        for path in partial.iterdir():
            sync(path)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Mistake(f"cannot write checkpoint {final}: {error}; earlier checkpoints are untouched") from error
    return final


def steps(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of this step's checkpoint."""
    return folder / f"{step:010d}"


def prune(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Delete all checkpoints but the last few, the steps in `keep`, and leftovers of crashes."""
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    for step in steps(folder)[:-keep_last]:
        if step not in keep:
            # Renamed first: a folder that a crash left half deleted must not look complete.
            shutil.rmtree(path_of(folder, step).rename(folder / f".{step}.partial"))


def load_state(path: Path) -> dict:
    """Return the JSON state; raises `Mistake` where it is missing or damaged."""
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format"] != FORMAT:
            raise _damaged(path, f"state.json is not of format {FORMAT}")
        if record["checksum"] != _checksum_of(record["state"]):
            raise _damaged(path, "state.json does not match its checksum")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return record["state"]


def load_model(path: Path, model: nn.Module) -> None:
    """Fill the model's parameters; raises `Mistake` where file and model do not fit."""
    tensors = _load(path, "model")
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise Mistake(f"{path} does not fit the model: {name} is {found.get(name)}, wanted {wanted.get(name)}")
    model.load_state_dict(tensors)


def load_optimizer(path: Path, model: nn.Module, optimizer: Together) -> None:
    """Fill the optimizer's state, tensor by tensor under the parameters' names."""
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for key, tensor in _load(path, "optimizer").items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise _damaged(path, f"optimizer state of an unknown parameter {name}")
        state.setdefault(parameters[name], {})[kind] = tensor
    optimizer.load(state)


def _flatten(model: nn.Module, optimizer: Together) -> dict[str, Tensor]:
    state = optimizer.state
    return {
        f"{kind}/{name}": value.detach()
        for name, parameter in model.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _load(path: Path, part: str) -> dict[str, Tensor]:
    file = path / f"{part}.safetensors"
    try:
        if _checksum(file) != load_state(path)["checksums"][part]:
            raise _damaged(path, f"{file.name} does not match its checksum")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> Mistake:
    return Mistake(f"checkpoint {path} is damaged ({reason}): delete that folder to go on from the one before")


def _checksum(file: Path) -> str:
    digest = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(state: dict) -> str:
    return blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
