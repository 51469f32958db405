"""From overrides to a checked configuration: composing it, explaining wrong overrides, naming runs."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lm.cli.type_check import check_types
from moe_lm.compat import KEYS, current_key, stored_key
from moe_lm.config_files import choices, flatten, folder
from moe_lm.errors import UserError
from moe_lm.run import IDENTITY

TEXT_KEYS = (
    "name",
    "run",
    "runs",
    "to",
    "data",
    "file",
    "prefix",
    "init_from",
    "vocabulary.file",
    "corpus.folder",
    "corpus.path",
)
"""Keys whose value is taken literally: a run's name holds `,` and `=`, which Hydra would read as a sweep."""

SEVERAL = ("balance",)
"""Groups from which several choices may be taken at once."""


def composed(command: str, arguments: list[str]) -> DictConfig:
    """Return the command's configuration with these overrides; raises `UserError` for a wrong override."""
    overrides = [quoted(argument) for argument in arguments]
    parsed = parse(overrides)
    for text, override in zip(overrides, parsed, strict=True):
        _refuse_foreign(text, override)
    selections = [text for text, override in zip(overrides, parsed, strict=True) if _selects(override)]
    with initialize_config_dir(str(folder().resolve()), version_base="1.3"):
        defaults = _defaults(command, tuple(selections))
        config = _compose(command, overrides, known=selections)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"{command} needs {' '.join(f'{key}=...' for key in missing)}")
        unread = _unread_size(arguments, config)  # before converted values replace interpolations
        check_types(defaults, config)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from None
    _refuse_idle_layers(selections, config)
    if unread:
        raise UserError(unread)
    return config


def resolved(config: DictConfig) -> dict:
    """Return a composed configuration as plain data with every interpolation replaced by its value."""
    return OmegaConf.to_container(config, resolve=True)


def parse(arguments: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar; raises a `UserError` that names the wrong override."""
    parser, parsed = OverridesParser.create(), []
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument!r} is no override: write key=value")
        try:
            parsed.append(parser.parse_override(argument))
        except HydraException as error:
            raise UserError(f"cannot read the override {argument!r}: {first_line(error)}") from None
    return parsed


def quoted(argument: str) -> str:
    """Quote the value of a key that takes a path or a name."""
    key, equals, value = argument.partition("=")
    quoted_already = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if equals and key.lstrip("+") in TEXT_KEYS and value not in ("null", "") and not quoted_already:
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return argument


def preset_of(arguments: list[str]) -> str:
    """Return the model preset that these overrides of `train` choose."""
    given = [argument.partition("=")[2].strip("'\"") for argument in arguments if argument.startswith("model=")]
    defaults = OmegaConf.load(folder() / "train.yaml").defaults
    return given[-1] if given else next(entry.model for entry in defaults if "model" in entry)


def default_name(preset: str, arguments: list[str]) -> str:
    """Return a run's default name: the preset and, sorted, the overrides that change the result (`moe_4,seed=2`).

    Renamed keys keep their first spelling, so that the command finds a run which was begun with it.
    """
    given = dict(argument.lstrip("+~").partition("=")[::2] for argument in arguments)
    parts = []
    for key, value in given.items():
        if key != "model" and re.split(r"[.@]", current_key(key))[0] in (*IDENTITY, "layer", "gate", "recipe"):
            plain = re.fullmatch(r"[\w.+\-\[\]]{1,40}", value)
            parts.append(f"{stored_key(key)}={value if plain else blake2b(value.encode(), digest_size=4).hexdigest()}")
    name = ",".join([preset, *sorted(parts)]).replace("/", "-")
    # File systems limit a name to 255 bytes, and the sweep adds `.log` to it.
    return name if len(name) <= 200 else f"{name[:180]},{blake2b(name.encode(), digest_size=4).hexdigest()}"


@cache
def _defaults(command: str, selections: tuple[str, ...]) -> DictConfig:
    """Compose the configuration with these choices and no other overrides; cached, as the runs of a sweep share it."""
    return _compose(command, list(selections), known=[])


def _compose(command: str, overrides: list[str], known: list[str]) -> DictConfig:
    """Compose a configuration; the error for a wrong override suggests keys that exist with the `known` overrides."""
    try:
        return compose(command, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        keys = list(flatten(OmegaConf.to_container(compose(command, overrides=known))))
        groups = {path.name: choices(path.name) for path in folder().iterdir() if path.is_dir()}
        raise UserError(explain(error, keys, groups)) from None


def _selects(override: Override) -> bool:
    """Return whether an override chooses from a group, which may add keys, rather than setting a value."""
    return "@" in override.key_or_group or (folder() / override.key_or_group).is_dir()


def _refuse_foreign(text: str, override: Override) -> None:
    """Raise for overrides that Hydra's grammar allows but no command supports."""
    key = override.key_or_group
    if text[0] in "+~" and not re.match(r"\+layer@model\.layers\.\w+=", text):
        raise UserError(f"{text}: keys can be neither added nor removed, only set: key=value")
    if override.is_sweep_override():
        raise UserError(
            f"{text}: several values are a sweep (moe-lm sweep -m); a text with commas needs '{key}=\"...\"'"
        )
    if re.match(r"hydra\b", key):
        raise UserError(f"unknown key {key}; --help lists all keys")
    if _selects(override) and not isinstance(override.value(), str | list if key in SEVERAL else str):
        raise UserError(f"{text}: choose one of {', '.join(choices(key.partition('@')[0]))}")


def _refuse_idle_layers(selections: list[str], config: DictConfig) -> None:
    """Raise for an added layer that is not in `model.order`."""
    for text in selections:
        added = re.match(r"\+layer@model\.layers\.(\w+)=", text)
        if added and added[1] not in config.model.order:
            order = ",".join([*config.model.order, added[1]])
            raise UserError(f"{text}: give the layer its place in model.order, as in model.order=[{order}]")


def _unread_size(arguments: list[str], config: DictConfig) -> str | None:
    """Return the error for a model size that no layer reads: it would change the run's name and nothing else."""
    sizes = {key: argument for argument in arguments if (key := argument.partition("=")[0]).startswith("model.")}
    if not sizes:
        return None
    order = config.model.order if OmegaConf.is_list(config.model.order) else []
    layers = [config.model.layers[name] for name in set(order) & config.model.layers.keys()]
    if not len(layers) == len(order) > 0 or not all(map(OmegaConf.is_dict, layers)):
        return None  # a wrong order or layer raises an error of its own
    text = "".join(map(OmegaConf.to_yaml, layers))
    read = {"order", "width", "dropout", "layers", *re.findall(r"\$\{model\.(\w+)\}", text)}
    for key, argument in sizes.items():
        if key.split(".")[1] not in read:
            return f"{argument}: no layer of model={preset_of(arguments)} reads {key}: omit it"
    return None


def explain(error: Exception, keys: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    """Return one line for an error of Hydra, with the nearest valid name among `keys` and the choices of `groups`."""
    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not (?:find|load) '([\w/.\-]+)/([^'/]*)'", text):
        group, choice = match.groups()
        offered = groups.get(group, ())
        return f"{group}={choice}: no such choice{_nearest(choice, offered)}; there are {', '.join(offered)}"
    if match := re.search(r"Could not (?:override|append to config)\W+'?([\w.@/]+)", text):
        key = match.group(1).rstrip(".")
        inside = re.search(rf"full_key: ({re.escape(key)}\.[\w.]+)", text)
        return unknown_key(inside.group(1) if inside else key, keys)
    return ": ".join(first_line(part) for part in (error, error.__cause__) if part)


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Return the error line for an unknown key."""
    names = {prefix for known in keys if "._" not in known for prefix in _prefixes(known)}
    layers = sorted({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    names |= {f"layer@model.layers.{layer}" for layer in layers}
    names |= {f"gate@{name}" for name in names if name.endswith(".gate")}
    if old := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
        return f"unknown key {key}: did you mean {current_key(old[0])}?"
    if near := _nearest(key, sorted(names)):
        return f"unknown key {key}{near}"
    parent = key.rpartition(".")[0]
    siblings = sorted({name[len(parent) + 1 :].split(".")[0] for name in names if name.startswith(parent + ".")})
    return f"unknown key {key}; " + (f"{parent} has {', '.join(siblings)}" if siblings else "--help lists all keys")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _nearest(word: str, names: Sequence[str]) -> str:
    same_end = [name for name in names if name.split(".")[-1] == word or name.startswith(f"{word}@")]
    near = same_end or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [name for name in names if name.split(".")[-1] == word.split(".")[-1]]
    return f": did you mean {near[0]}?" if near else ""
