"""Reads a folder of sharded safetensors with the safetensors library alone, as another program would."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint's `model` or `optimizer`, joined by the offsets in each file's header.

    Every element must be in exactly one file.
    """
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in sorted(folder.iterdir()):
        with safe_open(file, "pt") as opened:
            where = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((where[name]["saved_offsets"], opened.get_tensor(name)))
    return {name: _joined(name, found) for name, found in parts.items()}


def _joined(name: str, parts: list[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    tensor = parts[0][1]
    if tensor.dim() == 0:
        assert len(parts) == 1, f"{name} is in {len(parts)} files"
        return tensor
    size = [max(first[d] + part.shape[d] for first, part in parts) for d in range(tensor.dim())]
    times, tensor = torch.zeros(size, dtype=torch.int64), tensor.new_zeros(size)
    for first, part in parts:
        place = tuple(slice(a, a + n) for a, n in zip(first, part.shape, strict=True))
        tensor[place] = part
        times[place] += 1
    assert (times == 1).all(), f"{name} has numbers in no file or in several"
    return tensor


def assert_safetensors_or_json(folder: Path) -> int:
    """Check the content of every file below, whatever its name; return the number of safetensors files."""
    count = 0
    for file in folder.rglob("*"):
        if file.is_dir():
            continue
        assert not file.is_symlink(), file
        if file.name == "state.json":
            assert isinstance(json.loads(file.read_text()), dict)
            continue
        assert file.suffix == ".safetensors", file
        with safe_open(file, "pt") as opened:
            assert all(isinstance(opened.get_tensor(name), torch.Tensor) for name in opened.keys())  # noqa: SIM118
        count += 1
    return count
