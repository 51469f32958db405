"""A resolved configuration to objects: the one place where `_target_` is followed, strictly and without Hydra."""

import re
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import moe_lm
from moe_lm.errors import UserError
from moe_lm.model import Layer
from moe_lm.model.language_model import LanguageModel
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext

_ALLOWED_KEYS = {"_target_", "_partial_"}


def folder() -> Path:
    """Return the configuration folder: inside an installed package, or at the top of the repository."""
    package = Path(moe_lm.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def build(config: dict) -> object:
    """Return what one part of a configuration describes; only exact targets that the packaged configs name.

    Raises `UserError`, RuntimeError and MemoryError as the constructor does, else `UserError` in one line.
    """
    check_targets(config)
    if not isinstance(config, dict) or "_target_" not in config:
        raise UserError("the configuration is damaged: a part has no _target_")
    try:
        return _made(config)
    except (UserError, RuntimeError, MemoryError):
        raise  # what the constructor itself says, or the machine (out of memory)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot build {config['_target_']}: {reason}") from error


def build_model(config: dict, vocabulary_size: int, parallel: ParallelContext = SINGLE_PROCESS) -> LanguageModel:
    """Return the model of a resolved configuration, its layers in `model.order`; of experts this process's share."""
    model = config["model"]
    order, layers = model["order"], model["layers"]
    unknown = [name for name in order if name not in layers]
    if unknown or len(set(order)) != len(order):
        raise UserError(
            f"model.order={order}: name each layer once, of {', '.join(layers)}"
            + (f" (add one with +layer@model.layers.{unknown[0]}=lstm)" if unknown else "")
        )
    return LanguageModel(
        width=model["width"],
        vocabulary_size=vocabulary_size,
        dropout=model["dropout"],
        layers={name: _layer(layers[name], parallel) for name in order},
        softmax=build(config["softmax"]),
        parallel=parallel,
    )


def _layer(config: dict, parallel: ParallelContext) -> Layer:
    if parallel.size == 1 or "num_experts" not in config:
        return build(config)
    return build(config | {"_partial_": True})(parallel=parallel)


def check_targets(config: object) -> None:
    """Refuse targets outside the packaged configs (as exact strings) and anything that a resolver would run."""
    allowed = packaged_targets()
    for key, value in _walk(config):
        if key == "_target_" and not (isinstance(value, str) and value in allowed):
            raise UserError(f"the configuration names {value!r}, which is no part of moe-lm: refused")
        if key == "_partial_" and not isinstance(value, bool):
            raise UserError(f"the configuration holds _partial_={value!r}, neither true nor false: refused")
        if str(key).startswith("_") and key not in _ALLOWED_KEYS:
            raise UserError(f"the configuration holds the key {key!r}: refused")
        if isinstance(value, str) and "${" in value:
            raise UserError(f"the configuration holds an unresolved {value!r}: refused")


@cache
def packaged_targets(group: str = "") -> frozenset[str]:
    """Return every `_target_` that a YAML of the package, or of one of its groups, names."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (folder() / group).rglob("*.yaml"))
    return frozenset(re.findall(r"^\s*_target_:\s*([\w.]+)\s*$", text, re.MULTILINE))


def _made(node: object) -> object:
    """Make a node's parts, then what it names; without a `_target_` it is plain data."""
    if isinstance(node, list):
        return [_made(value) for value in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: _made(value) for key, value in node.items() if key not in _ALLOWED_KEYS}
    if "_target_" not in node:
        return arguments
    module, _, name = node["_target_"].rpartition(".")
    constructor = getattr(import_module(module), name)
    return partial(constructor, **arguments) if node.get("_partial_") else constructor(**arguments)


def _walk(node: object) -> Iterator[tuple[object, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield None, value
            yield from _walk(value)
