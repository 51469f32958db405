"""Type checks of overrides: Hydra accepts a value of any type, so each value is compared with the key's default."""

import re

from omegaconf import DictConfig, OmegaConf

from moe_lm.cli import as_typed
from moe_lm.config_files import flatten, folder, packaged_targets
from moe_lm.errors import UserError

_OPTIONAL_OF_TYPE = {
    int: (
        *("batch.micro_words", "batch.words", "gate.max_experts", "machine.threads", "max_words"),
        *("parallel.expert_size", "processes", "softmax.chunk_logits", "top", "training.valid_every"),
        *("vocabulary.max_size", "vocabulary_size"),
    ),
    float: ("gate.capacity_factor", "layer.gate_init_std", "model.gate_init_std", "schedule.max_warmup_fraction"),
    str: (
        *("corpus.folder", "corpus.path", "corpus.revision", "corpus.subset", "data", "file", "init_from", "name"),
        *("parallel", "runs", "scale", "study", "vocabulary.file"),
    ),
}
OPTIONAL = {key: kind for kind, keys in _OPTIONAL_OF_TYPE.items() for key in keys}
"""Types of the keys whose default is null; `layer.` stands for any layer, `gate.` for any gate of a layer."""

_OF_RECIPES = ("layer.gate_init_std", "model.gate_init_std", "schedule.max_warmup_fraction")
"""Optional keys to which a recipe or a schedule gives a value; null can still be chosen."""

_LAYER, _GATE = re.compile(r"model\.layers\.\w+\."), re.compile(r"layer\.(primary_)?gate\.")

_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    str: "text",
}


def check_types(defaults: DictConfig, config: DictConfig) -> None:
    """Raise `UserError` for a value of the wrong type; convert 1e6 to an integer and a single text to a list of one."""
    known = flatten(OmegaConf.to_container(defaults, resolve=True))
    values = flatten(OmegaConf.to_container(config, resolve=True))
    for key, value in values.items():
        if key not in known:
            _refuse_shape(key, value, known)
        default = known[key]
        place = _GATE.sub("gate.", _LAYER.sub("layer.", key))
        expected = type(default) if default is not None else OPTIONAL.get(place)
        if expected is None or (value is None and (default is None or place in _OF_RECIPES)):
            continue
        converted = _converted(value, expected)
        if converted is None:
            raise UserError(f"{key}={as_typed(value)}: needs {_IN_WORDS[expected]}{_example(key, default)}")
        if converted is not value:
            OmegaConf.update(config, key, converted)
        if expected is int and abs(converted) >= 2**63:
            raise UserError(f"{key}={value}: is beyond 64 bits")
    if emptied := [key for key in known if key not in values]:
        raise UserError(f"{emptied[0]}={{}}: needs a value{_example(emptied[0], known[emptied[0]])}")


def _converted(value: object, expected: type) -> object | None:
    """Return the value converted to the expected type without loss, None where that is impossible."""
    if expected is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and expected in (float, str):
        return expected(value)
    if expected is list and isinstance(value, str):
        return [value]
    if expected is list and isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
        return None
    return value if type(value) is expected else None


def _refuse_shape(key: str, value: object, known: dict[str, object]) -> None:
    """Raise for a single value given to a group of keys, or for a group given to a single key."""
    inside = [name for name in known if name.startswith(f"{key}.") and "._" not in name]
    if target := known.get(f"{key}._target_"):
        raise UserError(
            f"{key}={as_typed(value)}: to choose another, write {_group_of(target)}@{key}={as_typed(value)}"
        )
    if inside:
        shown = next((name for name in inside if known[name] is not None), inside[0])
        raise UserError(f"{key}={as_typed(value)}: is a group of keys; set one of them{_example(shown, known[shown])}")
    parent = key
    while parent not in known:
        parent = parent.rpartition(".")[0]
    expected = _IN_WORDS.get(type(known[parent]), "one value")
    raise UserError(f"{parent}={{...}}: needs {expected}{_example(parent, known[parent])}")


def _group_of(target: str) -> str:
    return next(path.name for path in sorted(folder().iterdir()) if target in packaged_targets(path.name))


def _example(key: str, default: object) -> str:
    return "" if default in (None, []) else f", as in {key}={as_typed(default)}"
