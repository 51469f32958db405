"""Overrides to a checked configuration: composing, refusing what nobody reads, naming runs."""

import difflib
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import moe_lm
from moe_lm.mistake import Mistake
from moe_lm.run import IDENTITY, flatten

TEXT_KEYS = ("name", "run", "runs", "data", "file", "vocabulary.file")
"""Keys whose value is taken to the letter: a run's name holds `,` and `=`, which Hydra would read as a sweep."""


def folder() -> Path:
    """Return the configuration folder: inside an installed package, or at the top of the repository."""
    package = Path(moe_lm.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def choices(group: str) -> list[str]:
    """Return the names a configuration group offers."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


def composed(command: str, arguments: list[str]) -> DictConfig:
    """Return the command's configuration with these overrides; raises `Mistake` for a wrong one."""
    overrides = [quoted(argument) for argument in arguments]
    parsed = parse(overrides)
    with initialize_config_dir(str(folder().resolve()), version_base="1.3"):
        for text, override in zip(overrides, parsed, strict=True):
            if text[0] in "+~" and not _selects(override):
                raise Mistake(f"{text}: keys can be neither added nor removed, only set: key=value")
        selections = [text for text, override in zip(overrides, parsed, strict=True) if _selects(override)]
        plain = _compose(command, selections, overrides)
        config = _compose(command, overrides, overrides, flatten(OmegaConf.to_container(plain)))
    _check_types(plain, config, {override.key_or_group for override in parsed})
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise Mistake(f"moe-lm {command} needs {' '.join(f'{key}=...' for key in missing)}")
    return config


def resolved(config: DictConfig) -> dict:
    """Return the configuration as plain data, every interpolation replaced by its value."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise Mistake(f"configuration: {_first_line(error)}") from None


def parse(arguments: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar; raises `Mistake` with the one that is wrong."""
    parser, parsed = OverridesParser.create(), []
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise Mistake(f"{argument!r} is no override: write key=value")
        try:
            parsed.append(parser.parse_override(argument))
        except HydraException as error:
            raise Mistake(f"cannot read the override {argument!r}: {_first_line(error)}") from None
    return parsed


def quoted(argument: str) -> str:
    """Quote the value of a key that holds a path or a name."""
    key, equals, value = argument.partition("=")
    if equals and key.lstrip("+") in TEXT_KEYS and value not in ("null", "") and value[0] not in "'\"":
        return f"{key}='{value}'" if "'" not in value else argument
    return argument


def preset_of(arguments: list[str]) -> str:
    """Return the model preset that these overrides of `train` choose."""
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("model=")]
    defaults = OmegaConf.load(folder() / "train.yaml").defaults
    return given[-1] if given else next(entry.model for entry in defaults if "model" in entry)


def default_name(preset: str, arguments: list[str]) -> str:
    """Return the preset and, sorted, the overrides that change the result: `moe_4,seed=2`."""
    parts = []
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        if key != "model" and re.split(r"[.@]", key)[0] in (*IDENTITY, "layer", "gate"):
            plain = re.fullmatch(r"[\w.+\-\[\]]{1,40}", value)
            parts.append(f"{key}={value if plain else blake2b(value.encode(), digest_size=4).hexdigest()}")
    return ",".join([preset, *sorted(parts)]).replace("/", "-")


def _compose(command: str, overrides: list[str], given: list[str], known: dict | None = None) -> DictConfig:
    try:
        return compose(command, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise Mistake(_explain(error, given, known or {})) from None


def _explain(error: Exception, given: list[str], known: dict) -> str:
    """One line for what Hydra says in several."""
    text = str(error)
    if match := re.search(r"Could not (?:find|load) '([\w/.\-]+)/([^'/]*)'", text):
        group, choice = match.groups()
        offered = choices(group)
        return f"{group}={choice}: no such choice{_nearest(choice, offered)}; there are {', '.join(offered)}"
    if match := re.search(r"Could not (?:override|append to config|delete from config)\W+'?([\w.@/]+)", text):
        key = match.group(1).rstrip(".'")
    elif match := re.search(r"[Kk]ey '([\w.@/]+)'", text):
        key = match.group(1)
    else:
        return f"configuration ({' '.join(given)}): {_first_line(error)}"
    full = next((g.lstrip("+~").partition("=")[0] for g in given if key in g.partition("=")[0]), key)
    names = [*_prefixes(known), *(path.name for path in folder().iterdir() if path.is_dir())]
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    names += [f"layer@model.layers.{layer}" for layer in layers]
    return f"unknown key {full}{_nearest(full, names)}"


def _prefixes(known: dict) -> Iterator[str]:
    for key in known:
        parts = key.split(".")
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _nearest(word: str, names: list[str]) -> str:
    names = sorted(set(names))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    near = near or [name for name in names if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f": did you mean {near[0]}?" if near else ""


def _selects(override: Override) -> bool:
    """Whether an override chooses from a group (and may thereby bring keys) rather than setting a value."""
    return "@" in override.key_or_group or (folder() / override.key_or_group).is_dir()


def _check_types(plain: DictConfig, config: DictConfig, keys: set[str]) -> None:
    """Refuse a value of another type than the default's: Hydra itself lets any through."""
    defaults = flatten(resolved(plain))
    for key, value in flatten(resolved(config)).items():
        if key not in keys or defaults.get(key) is None:
            continue
        default, wanted = defaults[key], type(defaults[key])
        if wanted is int and isinstance(value, float) and value.is_integer():
            OmegaConf.update(config, key, int(value))  # 1e6
        elif wanted is list and isinstance(value, str):
            OmegaConf.update(config, key, [value])  # a single glob
        elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
            OmegaConf.update(config, key, float(value))
        elif type(value) is not wanted:
            kind = {
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                list: "a list",
                str: "text",
            }
            raise Mistake(f"{key}={value}: needs {kind.get(wanted, wanted.__name__)}, as in {key}={default}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
