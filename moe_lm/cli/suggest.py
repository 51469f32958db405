"""What Hydra says about a wrong override in several lines, in one, with the nearest right name."""

import difflib
import re
from collections.abc import Mapping, Sequence


def explain(error: Exception, keys: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    """Return the line for an error of Hydra's; `keys` are the known ones, `groups` each group's choices."""
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
    """Return the line for a key that nobody reads."""
    names = {prefix for known in keys if "._" not in known for prefix in _prefixes(known)}
    layers = sorted({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    names |= {f"layer@model.layers.{layer}" for layer in layers}
    names |= {f"gate@{name}" for name in names if name.endswith(".gate")}
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
