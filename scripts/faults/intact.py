"""What must be true of a run's directory at any moment, checked without moe_lm's own code."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

_TIMES = ("seconds", "words_per_second", "interval")
_RESULT = ("perplexity", "predicted_words", "steps", "words", "flops")


def steps(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    try:
        return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"{step:010d}"


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is as it was written."""
    try:
        record = json.loads((checkpoint / "state.json").read_text())
        state = record["state"]
        if record["checksum"] != _digest(json.dumps([record["format"], state]).encode()):
            return "state.json does not match its checksum"
        if state["step"] != int(checkpoint.name):
            return f"state.json is of step {state['step']}"
        there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
        if there != {"state.json", *state["files"]}:
            return f"files differ from the list: {sorted(there ^ {'state.json', *state['files']})}"
        if not {"model", "optimizer"} <= {name.split("/")[0] for name in state["files"]}:
            return "a part is missing"
        for name, (size, digest) in state["files"].items():
            content = (checkpoint / name).read_bytes()
            if len(content) != size or _digest(content) != digest:
                return f"{name} does not match its checksum"
            with safe_open(checkpoint / name, framework="pt") as file:
                if not all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys()):  # noqa: SIM118
                    return f"{name} holds numbers that are not finite"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__} {error}"
    return None


def best_of(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint, as this checkpoint records it."""
    best = json.loads((checkpoint / "state.json").read_text())["state"]["progress"]["best"]
    return int(best["step"]) if best else None


def last_step(run: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl, 0 without one."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


def outcome(run: Path) -> dict[str, object]:
    """Return by name everything in a finished run that must not depend on interruptions."""
    last = folder_of(run, steps(run)[-1])
    result = json.loads((run / "result.json").read_text())
    progress = json.loads((last / "state.json").read_text())["state"]["progress"]
    return {
        "the last step": last.name,
        "tensors": _tensors(last),
        "progress": {key: value for key, value in progress.items() if key not in _TIMES},
        "metrics.jsonl": metrics(run),
        "result.json": {key: result[key] for key in _RESULT},
        "the vocabulary": (run / "vocabulary" / "vocabulary.txt").read_bytes(),
    }


def _tensors(checkpoint: Path) -> dict[str, list[str]]:
    """Return hashes of each tensor's shards; which file holds a tensor that is not sharded does not matter."""
    found: dict[str, list[str]] = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found.setdefault(f"{file.parent.name}/{name}", []).append(_hash(tensor))
    return found


def words_of_result(run: Path) -> int:
    """Return the words of a finished run, 0 if it is not finished."""
    file = run / "result.json"
    return json.loads(file.read_text())["words"] if file.exists() else 0


def resumed_at(text: str) -> int:
    """Return the step at which a training logs that it resumed, 0 if it started from nothing."""
    found = re.findall(r": resumed at step (\d+),", text)
    return int(found[-1]) if found else 0


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
