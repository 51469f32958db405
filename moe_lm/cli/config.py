"""Overrides to a checked configuration: composing, refusing what nobody reads, naming runs."""

import re
from functools import cache
from hashlib import blake2b

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lm.cli.suggest import explain, first_line
from moe_lm.cli.type_check import check_kinds
from moe_lm.construction import folder
from moe_lm.errors import UserError
from moe_lm.run import IDENTITY, flatten

TEXT_KEYS = (
    "name",
    "run",
    "runs",
    "to",
    "data",
    "file",
    "prefix",
    "init",
    "vocabulary.file",
    "corpus.folder",
    "corpus.path",
)
"""Keys whose value is taken to the letter: a run's name holds `,` and `=`, which Hydra would read as a sweep."""

SEVERAL = ("balance",)
"""Groups of which several may be chosen at once."""


def choices(group: str) -> list[str]:
    """Return the names a configuration group offers."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


def composed(command: str, arguments: list[str]) -> DictConfig:
    """Return the command's configuration with these overrides; raises `UserError` for a wrong one."""
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
        unread = _unread_size(arguments, config)  # before values of another kind replace interpolations
        check_kinds(defaults, config)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from None
    _refuse_idle_layers(selections, config)
    if unread:
        raise UserError(unread)
    return config


def resolved(config: DictConfig) -> dict:
    """Return a composed configuration as plain data, every interpolation replaced by its value."""
    return OmegaConf.to_container(config, resolve=True)


def parse(arguments: list[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar; raises `UserError` with the one that is wrong."""
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
    """Quote the value of a key that holds a path or a name."""
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
    """Return the preset and, sorted, the overrides that change the result: `moe_4,seed=2`."""
    given = dict(argument.lstrip("+~").partition("=")[::2] for argument in arguments)
    parts = []
    for key, value in given.items():
        if key != "model" and re.split(r"[.@]", key)[0] in (*IDENTITY, "layer", "gate"):
            plain = re.fullmatch(r"[\w.+\-\[\]]{1,40}", value)
            parts.append(f"{key}={value if plain else blake2b(value.encode(), digest_size=4).hexdigest()}")
    name = ",".join([preset, *sorted(parts)]).replace("/", "-")
    # A file system takes 255 bytes, and the sweep's log has the name too.
    return name if len(name) <= 200 else f"{name[:180]},{blake2b(name.encode(), digest_size=4).hexdigest()}"


@cache
def _defaults(command: str, selections: tuple[str, ...]) -> DictConfig:
    """Compose what these choices give before any value is set; the runs of a sweep share it."""
    return _compose(command, list(selections), known=[])


def _compose(command: str, overrides: list[str], known: list[str]) -> DictConfig:
    """Compose; a wrong override is explained by the keys that the overrides `known` to be right give."""
    try:
        return compose(command, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        keys = list(flatten(OmegaConf.to_container(compose(command, overrides=known))))
        groups = {path.name: choices(path.name) for path in folder().iterdir() if path.is_dir()}
        raise UserError(explain(error, keys, groups)) from None


def _selects(override: Override) -> bool:
    """Whether an override chooses from a group (and may thereby bring keys) rather than setting a value."""
    return "@" in override.key_or_group or (folder() / override.key_or_group).is_dir()


def _refuse_foreign(text: str, override: Override) -> None:
    """Raise for what Hydra's grammar allows and no command reads."""
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
    """Raise for an added layer that no place in the order uses."""
    for text in selections:
        added = re.match(r"\+layer@model\.layers\.(\w+)=", text)
        if added and added[1] not in config.model.order:
            order = ",".join([*config.model.order, added[1]])
            raise UserError(f"{text}: give the layer its place in model.order, as in model.order=[{order}]")


def _unread_size(arguments: list[str], config: DictConfig) -> str | None:
    """Say which size of the model no layer in its order reads: it would be in the run's name for nothing."""
    sizes = {key: argument for argument in arguments if (key := argument.partition("=")[0]).startswith("model.")}
    if not sizes:
        return None
    order = config.model.order if OmegaConf.is_list(config.model.order) else []
    layers = [config.model.layers[name] for name in set(order) & config.model.layers.keys()]
    if not len(layers) == len(order) > 0 or not all(map(OmegaConf.is_dict, layers)):
        return None  # a wrong order or layer has a mistake of its own
    text = "".join(map(OmegaConf.to_yaml, layers))
    read = {"order", "width", "dropout", "layers", *re.findall(r"\$\{model\.(\w+)\}", text)}
    for key, argument in sizes.items():
        if key.split(".")[1] not in read:
            return f"{argument}: no layer of model={preset_of(arguments)} reads {key}: leave it away"
    return None
