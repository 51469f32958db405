"""moe-lm COMMAND --help: every key with its default and comment, and what the groups offer."""

from types import ModuleType

import yaml

from moe_lm.cli.config import choices, folder
from moe_lm.cli.type_check import as_typed
from moe_lm.run import flatten


def text(name: str, command: ModuleType) -> str:
    """Return the help of a command, made from the YAML that defines it."""
    lines = [f"moe-lm {name} [key=value ...]   {command.HELP}", "", f"configs/{name}.yaml:", ""]
    source = (folder() / f"{name}.yaml").read_text(encoding="utf-8").rstrip()
    lines += ["  " + line for line in source.splitlines()]
    groups = sorted(path.name for path in folder().iterdir() if path.is_dir() and f"- {path.name}:" in source)
    if name == "sweep":
        groups = ["study"]
    if name in ("train", "describe"):
        groups += ["layer", "gate"]
    if groups:
        lines += ["", "Choices, and the keys each brings:"]
        lines += [_choice(group, choice) for group in groups for choice in choices(group)]
    return "\n".join(lines)


def _choice(group: str, choice: str) -> str:
    place = {"layer": "layer@model.layers.NAME", "gate": "gate@model.layers.NAME.gate"}.get(group, group)
    line = f"  {place}={choice}"
    if group == "study":
        return line
    config = flatten(yaml.safe_load((folder() / group / f"{choice}.yaml").read_text(encoding="utf-8")))
    for key, value in config.items():
        # What begins with an underscore is Hydra's; what is taken from another key is set there.
        if key != "defaults" and "_target_" not in key and not key.startswith("_") and "${" not in str(value):
            line += f"  {place.partition('@')[2] or group}.{key}={as_typed(value)}"
    return line
