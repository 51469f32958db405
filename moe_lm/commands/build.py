"""A checked configuration to objects: the one place where `_target_` is followed."""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lm.commands.configuration import folder
from moe_lm.distributed import ALONE, Processes
from moe_lm.layer import Layer
from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_ALLOWED_KEYS = {"_target_", "_partial_"}


def build(config: dict) -> object:
    """Instantiate one part of a configuration; only exact targets that the packaged configs name.

    Raises `Mistake` as the constructor does, or for a configuration that was tampered with.
    """
    check_targets(config)
    if not isinstance(config, dict) or "_target_" not in config:
        raise Mistake("the configuration is damaged: a part has no _target_")
    try:
        return instantiate(OmegaConf.create(config), _convert_="all")
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__
        while cause is not None:
            # What the constructor itself says, or the machine (out of memory).
            if isinstance(cause, Mistake | RuntimeError | MemoryError):
                raise cause from None
            cause = cause.__cause__
        raise Mistake(f"cannot build {config.get('_target_')}: {' '.join(str(error).split())}") from error


def build_model(config: dict, vocabulary_size: int, processes: Processes = ALONE) -> LanguageModel:
    """Return the model of a resolved configuration, its layers in `model.order`; of experts this process's share."""
    model = config["model"]
    order, layers = model["order"], model["layers"]
    unknown = [name for name in order if name not in layers]
    if unknown or len(set(order)) != len(order):
        raise Mistake(
            f"model.order={order}: name each layer once, of {', '.join(layers)}"
            + (f" (add one with +layer@model.layers.{unknown[0]}=lstm)" if unknown else "")
        )
    return LanguageModel(
        width=model["width"],
        vocabulary_size=vocabulary_size,
        dropout=model["dropout"],
        layers={name: _layer(layers[name], processes) for name in order},
        softmax=build(config["softmax"]),
        processes=processes,
    )


def _layer(config: dict, processes: Processes) -> Layer:
    if processes.size == 1 or "num_experts" not in config:
        return build(config)
    return build(config | {"_partial_": True})(processes=processes)


def check_targets(config: object) -> None:
    """Refuse targets outside the packaged configs (as exact strings) and anything a resolver would run."""
    allowed = packaged_targets()
    for key, value in _walk(config):
        if key == "_target_" and not (isinstance(value, str) and value in allowed):
            raise Mistake(f"the configuration names {value!r}, which is no part of moe-lm: refused")
        if str(key).startswith("_") and key not in _ALLOWED_KEYS:
            raise Mistake(f"the configuration holds the key {key!r}: refused")
        if isinstance(value, str) and "${" in value:
            raise Mistake(f"the configuration holds an unresolved {value!r}: refused")


def packaged_targets(group: str = "") -> set[str]:
    """Return every `_target_` that a YAML of the package, or of one of its groups, names."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (folder() / group).rglob("*.yaml"))
    return set(re.findall(r"^\s*_target_:\s*([\w.]+)\s*$", text, re.MULTILINE))


def device(name: str, several: bool = False) -> torch.device:
    """Return the device of `machine.device`, of several processes this one's (LOCAL_RANK of the environment).

    Raises `Mistake` where the machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise Mistake(f"machine.device={name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise Mistake("machine.device=cuda: torch sees no GPU here; choose machine.device=cpu")
    if not several or name == "cpu":
        return torch.device(name)
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        raise Mistake(f"process {place} of this machine finds no GPU: it has {torch.cuda.device_count()}")
    torch.cuda.set_device(place)
    return torch.device(name, place)


def autocast_type(precision: str, on: torch.device) -> torch.dtype | None:
    """Return the autocast type of `machine.precision`, None for float32."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise Mistake(f"machine.precision={precision}: choose auto, float32 or bfloat16")
    if precision == "auto":
        precision = "bfloat16" if on.type == "cuda" else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def set_threads(threads: int | None) -> None:
    """Fix the CPU threads and let no operation differ from run to run."""
    if threads is not None:
        if threads < 1:
            raise Mistake(f"machine.threads={threads}: must be at least 1, or null")
        torch.set_num_threads(threads)


def be_deterministic(on: torch.device) -> None:
    """Choose reproducible kernels on the CPU; a GPU promises its results to rounding only."""
    torch.use_deterministic_algorithms(on.type == "cpu")
    # Filling every fresh tensor with NaN is a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False


def keep_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system and faulting it in again each step.

    Measured at 256 experts of 1 M parameters: forward and backward of the layer take 0.52 of the time.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def ready_to_read(config: dict) -> torch.device:
    """Check and apply what `evaluate`, `score` and `inspect` have in common; return the device."""
    for key, value in config["batch"].items():
        if value < 1:
            raise Mistake(f"batch.{key}={value}: must be at least 1")
    set_threads(config["machine"]["threads"])
    keep_memory()
    return device(config["machine"]["device"])


def existing(path: str | Path) -> Path:
    """Return the path of a folder that must exist."""
    path = Path(path)
    if not path.is_dir():
        raise Mistake(f"{path} does not exist: name a folder, as in runs/moe_4")
    return path


def _walk(node: object):
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield None, value
            yield from _walk(value)
