"""Helpers for the finished run runs/tiny: figures that commands print, and changes of its stored configuration."""

import json
import re
from pathlib import Path

import yaml

RUN = "run=runs/tiny"

PROGRAM = """
import builtins, sys

def without_hydra(name, *rest, real=builtins.__import__, **options):
    if name.split(".")[0] in ("hydra", "omegaconf", "antlr4"):
        raise ImportError(f"{name} must not be imported")
    return real(name, *rest, **options)

builtins.__import__ = without_hydra
import moe_lm
lm = moe_lm.load(FOLDER)
print(lm.perplexity(open("text/test.txt")), lm.log10("w1 w2 zebra"))
assert not {name.split(".")[0] for name in sys.modules} & {"hydra", "omegaconf", "antlr4"}
"""
"""A program that opens FOLDER where Hydra cannot be imported."""


def evaluated(moe_lm, *overrides: str) -> dict:
    """The JSON object that evaluate prints."""
    outcome = moe_lm("evaluate", RUN, "json=true", *overrides)
    assert outcome.code == 0, outcome.err
    [line] = outcome.out.splitlines()
    return json.loads(line)


def scored(moe_lm, *arguments: str) -> dict:
    """The last two lines of score as numbers, and the output before them."""
    outcome = moe_lm("score", RUN, *arguments)
    assert outcome.code == 0, outcome.err
    *before, counts, sums = outcome.out.splitlines()
    file, sentences, words, unknown = re.fullmatch(
        r"file (.*): (\d+) sentences, (\d+) words, (\d+) OOVs", counts
    ).groups()
    log10, ppl, ppl1 = re.fullmatch(r"0 zeroprobs, logprob= (\S+) ppl= (\S+) ppl1= (\S+)", sums).groups()
    return {
        "file": file,
        "sentences": int(sentences),
        "words": int(words),
        "unknown": int(unknown),
        "log10": float(log10),
        "ppl": float(ppl),
        "ppl1": float(ppl1),
        "before": before,
    }


def change(*path: str, value: object, file: Path = Path("runs/tiny/config.yaml")) -> None:
    """Set a key of a stored configuration."""
    config = yaml.safe_load(file.read_text())
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(yaml.safe_dump(config))
