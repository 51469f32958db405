"""Values of another kind than the default's are refused: Hydra itself lets any through."""

import json
import re

from omegaconf import DictConfig, OmegaConf

from moe_lm.errors import UserError
from moe_lm.run import flatten

OPTIONAL = {
    "batch.micro_words": int,
    "batch.words": int,
    "corpus.folder": str,
    "corpus.path": str,
    "corpus.revision": str,
    "corpus.subset": str,
    "data": str,
    "file": str,
    "gate.capacity_factor": float,
    "gate.max_experts": int,
    "init": str,
    "machine.expert_processes": int,
    "machine.threads": int,
    "max_words": int,
    "name": str,
    "parallel": str,
    "processes": int,
    "runs": str,
    "scale": str,
    "softmax.max_logits": int,
    "study": str,
    "top": int,
    "vocabulary.file": str,
    "vocabulary.max_size": int,
    "vocabulary_size": int,
}
"""What a key takes whose default is null; gate. is any gate of a layer."""

_GATE = re.compile(r"model\.layers\.\w+\.(primary_)?gate\.")

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    str: "text",
}


def check_kinds(defaults: DictConfig, config: DictConfig) -> None:
    """Raise `UserError` for a value of a wrong kind; turn 1e6 into a whole number and a text into a list of one."""
    plain = flatten(OmegaConf.to_container(defaults, resolve=True))
    values = flatten(OmegaConf.to_container(config, resolve=True))
    for key, value in values.items():
        if key not in plain:
            _refuse_shape(key, value, plain)
        wanted = type(plain[key]) if plain[key] is not None else OPTIONAL.get(_GATE.sub("gate.", key))
        if wanted is None or (value is None and plain[key] is None):
            continue
        fitting = _fitting(value, wanted)
        if fitting is None:
            raise UserError(f"{key}={as_typed(value)}: needs {_WORDS[wanted]}{_example(key, plain[key])}")
        if fitting is not value:
            OmegaConf.update(config, key, fitting)
        if wanted is int and abs(fitting) >= 2**63:
            raise UserError(f"{key}={value}: is beyond 64 bits")
    emptied = [key for key in plain if key not in values]
    if emptied:
        raise UserError(f"{emptied[0]}={{}}: needs a value{_example(emptied[0], plain[emptied[0]])}")


def _fitting(value: object, wanted: type) -> object | None:
    """Return the value, or what it plainly means, in the wanted type; None where it does not fit."""
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and wanted in (float, str):
        return wanted(value)
    if wanted is list and isinstance(value, str):
        return [value]
    if wanted is list and isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
        return None
    return value if type(value) is wanted else None


def _refuse_shape(key: str, value: object, plain: dict[str, object]) -> None:
    """Raise for one value in the place of a group of keys, or the other way round."""
    inside = [known for known in plain if known.startswith(f"{key}.") and "._" not in known]
    if target := plain.get(f"{key}._target_"):
        raise UserError(
            f"{key}={as_typed(value)}: to choose another, write {target.split('.')[-3]}@{key}={as_typed(value)}"
        )
    if inside:
        raise UserError(
            f"{key}={as_typed(value)}: is a group of keys; set one of them, as in {inside[0]}={plain[inside[0]]}"
        )
    parent = key
    while parent not in plain:
        parent = parent.rpartition(".")[0]
    wanted = _WORDS.get(type(plain[parent]), "one value")
    raise UserError(f"{parent}={{...}}: needs {wanted}{_example(parent, plain[parent])}")


def _example(key: str, default: object) -> str:
    return "" if default in (None, []) else f", as in {key}={as_typed(default)}"


def as_typed(value: object) -> str:
    """Return a value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(as_typed(entry) for entry in value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
