"""The packaged configuration: the folder of its YAML files, the choices of each group, and the targets they name."""

import re
from functools import cache
from pathlib import Path


def folder() -> Path:
    """Return the configuration folder: inside an installed package, or at the top of the repository."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def choices(group: str) -> list[str]:
    """Return the names that a configuration group offers."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


def read_choice(group: str, choice: str) -> object:
    """Return the content of a choice's file; a syntax error names the file."""
    import yaml  # slow to import

    with (folder() / group / f"{choice}.yaml").open(encoding="utf-8") as file:
        return yaml.safe_load(file)


@cache
def packaged_targets(group: str = "") -> frozenset[str]:
    """Return every `_target_` that the packaged YAML files name, or only those in the files of one group."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (folder() / group).rglob("*.yaml"))
    return frozenset(re.findall(r"^\s*_target_:\s*([\w.]+)\s*$", text, re.MULTILINE))


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """Return nested dicts as one level of dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
