"""The commands: one module each, with `main(arguments) -> exit code`; the only code that knows Hydra and OmegaConf.

Usage and help are made from the YAML files alone: nothing heavy is imported for them.
"""

import json
import sys

from moe_lm.config_files import choices, flatten, folder, read_choice

COMMANDS = {
    "prepare": "text to token ids in data/<name>/ (train does it by itself)",
    "train": "train one model; repeat the command to resume it",
    "sweep": "train every model of a study, or of a grid (-m model=moe_4,moe_32 seed=1,2)",
    "evaluate": "exact perplexity of a run on a split",
    "score": "log10 probability of each word and sentence of a file or standard input",
    "report": "table, plots and an HTML page of a folder of runs",
    "describe": "operations, parameters and memory of a model of any size",
    "inspect": "what each expert of a run is for: its contexts, words and load",
    "audit": "whether a run's predictions see the future, and how many bits training's routing leaks",
    "sample": "sentences drawn from a model, each from its seed and number alone",
    "export": "a trained model as one folder: safetensors, configuration, vocabulary, model card",
}


def log(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def usage() -> str:
    """Return the list of commands."""
    lines = ["moe-lm COMMAND [key=value ...]      moe-lm COMMAND --help lists the keys", ""]
    return "\n".join(lines + [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()])


def help_text(command: str) -> str:
    """Return the help of a command: its YAML, and the choices of its groups with the keys that each brings."""
    lines = [f"moe-lm {command} [key=value ...]   {COMMANDS[command]}", "", f"configs/{command}.yaml:", ""]
    source = (folder() / f"{command}.yaml").read_text(encoding="utf-8").rstrip()
    lines += ["  " + line for line in source.splitlines()]
    groups = sorted(path.name for path in folder().iterdir() if path.is_dir() and f"- {path.name}:" in source)
    if command == "sweep":
        groups = ["study"]
    if command in ("train", "describe"):
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
    prefix = "" if group == "recipe" else f"{place.partition('@')[2] or group}."  # a recipe names keys of any group
    config = flatten(read_choice(group, choice))
    for key, value in config.items():
        # Keys with an underscore are Hydra's own; an interpolated key is set where it is defined.
        if key != "defaults" and "_target_" not in key and not key.startswith("_") and "${" not in str(value):
            line += f"  {prefix}{key}={as_typed(value)}"
    return line


def as_typed(value: object) -> str:
    """Return a value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(as_typed(entry) for entry in value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
