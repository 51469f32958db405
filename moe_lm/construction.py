"""Building objects from a resolved configuration: the only code that follows `_target_`, strictly and without Hydra."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from moe_lm.config_files import packaged_targets
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel

_ALLOWED_KEYS = {"_target_", "_partial_"}


def build(config: dict) -> object:
    """Return the object that one part of a configuration describes, built from targets of packaged YAML only.

    A constructor's ValueError becomes a `UserError` with the same message; RuntimeError and MemoryError are not caught.
    """
    check_targets(config)
    if not isinstance(config, dict) or "_target_" not in config:
        raise UserError("the configuration is damaged: a part has no _target_")
    with _user_errors():
        try:
            return _build(config)
        except (ValueError, RuntimeError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot build {config['_target_']}: {reason}") from error


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn a constructor's ValueError into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


@_user_errors()
def build_model(config: dict, vocabulary_size: int) -> LanguageModel:
    """Return the whole model of a resolved configuration, with its layers in the order `model.order`."""
    model = config["model"]
    order, layers = model["order"], model["layers"]
    unknown = [name for name in order if name not in layers]
    if unknown or len(set(order)) != len(order):
        raise UserError(
            f"model.order={order}: name layers out of {', '.join(layers)}, each once"
            + (f" (add one with +layer@model.layers.{unknown[0]}=lstm)" if unknown else "")
        )
    return LanguageModel(
        width=model["width"],
        vocabulary_size=vocabulary_size,
        dropout=model["dropout"],
        layers={name: build(layers[name]) for name in order},
        softmax=build(config["softmax"]),
    )


def check_targets(config: object) -> None:
    """Raise `UserError` for a target that no packaged YAML names, and for keys and values that Hydra interprets."""
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


def is_target_of(group: str, target: object) -> bool:
    """Return whether a YAML of this configuration group names the target."""
    return target in packaged_targets(group)


def _build(node: object) -> object:
    """Build a node's parts, then the object that it names; a node without `_target_` is plain data."""
    if isinstance(node, list):
        return [_build(value) for value in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: _build(value) for key, value in node.items() if key not in _ALLOWED_KEYS}
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
