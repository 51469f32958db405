"""moe-lm COMMAND --help: every key with its default and comment, and what the groups offer."""

from types import ModuleType

from moe_lm.commands.configuration import choices, folder


def text(name: str, command: ModuleType) -> str:
    """Return the help of a command, made from the YAML that defines it."""
    lines = [f"moe-lm {name} [key=value ...]   {command.HELP}", "", f"configs/{name}.yaml:", ""]
    source = (folder() / f"{name}.yaml").read_text(encoding="utf-8").rstrip()
    lines += ["  " + line for line in source.splitlines()]
    groups = sorted(path.name for path in folder().iterdir() if path.is_dir() and f"- {path.name}:" in source)
    if name == "train":
        groups += ["layer", "gate"]
    if name == "sweep":
        groups = ["study"]
    if groups:
        lines += ["", "Choices (group=choice; layer@model.layers.NAME=..., gate@model.layers.NAME.gate=...):"]
        lines += [f"  {group:<12}{' '.join(choices(group))}" for group in groups]
    return "\n".join(lines)
