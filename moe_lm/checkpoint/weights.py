"""A model's tensors in safetensors files as Hugging Face lays them out: one file, or several and an index.

model.safetensors   |   model-00001-of-00002.safetensors ... model.safetensors.index.json
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.parallel.grad_reduce import shares_of
from moe_lm.parallel.group import Shard

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SEVERAL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save(folder: Path, model: nn.Module, max_file_bytes: int) -> None:
    """Write the model's tensors into an existing folder; a tensor is never cut, so a large one may exceed the limit."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    parts = _parts({name: tensor.nbytes for name, tensor in tensors.items()}, max_file_bytes)
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [ONE]
    for file, names in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        place = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": place}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load(folder: Path, model: nn.Module) -> None:
    """Fill the model, whose storage exists, or of one that is divided over processes the rows that are here.

    Raises `UserError` where the files and it do not fit tensor by tensor.
    """
    wanted, shares, found = model.state_dict(), shares_of(model), {}
    for file in _files(folder):
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    _fill(wanted.get(name), shares.get(name), stored.get_slice(name), f"{folder / file}: {name}")
                    found[name] = file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file} is no safetensors file, or a damaged one ({_line(error)})") from error
    if lacking := wanted.keys() - found.keys():
        raise UserError(f"{folder} does not fit the model: {min(lacking)} is in none of its files")
    if (folder / INDEX).exists() and _weight_map(folder) != found:
        raise UserError(f"{folder / INDEX} is damaged: it does not name the files that hold the tensors")


def _fill(place: Tensor | None, share: Shard | None, stored, name: str) -> None:
    """Copy a stored tensor, or its rows that belong here, into its place."""
    shape = tuple(stored.get_shape())
    wanted = None if place is None else tuple(place.shape) if share is None else (share.total, *place.shape[1:])
    if wanted != shape:
        raise UserError(f"{name} does not fit the model: its shape is {shape}, wanted {wanted}")
    rows = stored[...] if share is None else stored[share.first : share.first + share.size]
    if rows.dtype != place.dtype:
        raise UserError(f"{name} does not fit the model: it is {rows.dtype}, wanted {place.dtype}")
    place.copy_(rows)


def _files(folder: Path) -> list[str]:
    files = [ONE]
    if (folder / INDEX).exists():
        files = sorted(set(_weight_map(folder).values()))
        if wrong := [file for file in files if not SEVERAL.fullmatch(file)]:
            raise UserError(f"{folder / INDEX} is damaged: it names {wrong[0]!r}")
    if unread := {path.name for path in folder.glob("*.safetensors")} - set(files):
        raise UserError(f"{folder / min(unread)} belongs to no model there: take it away")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({_line(error)})") from error


def _parts(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Cut the names, in order, where the next tensor would pass the limit."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
