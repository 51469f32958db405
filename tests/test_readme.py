"""The README's commands are real: every one composes, the training example trains, and its model opens in Python."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import call

from moe_lm.cli import NAMES
from moe_lm.cli.config import choices, composed, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.cli.sweep import jobs_of
from moe_lm.cli.validate_gates import check_losses

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]
TRAINING = next(words for words in COMMANDS if "corpus=text" in words and words[1] == "train")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_composes(words, capsys):
    """Scripts exist and run; the keys of every moe-lm command are known."""
    program, *rest = words
    if program == "sbatch":
        program, *rest = [word for word in rest if not word.startswith("--")]
        assert program == "scripts/slurm"
        resolved(composed("train", rest))
    if program == "torchrun":
        program, *rest = ["moe-lm", *rest[rest.index("moe_lm") + 1 :]]
    if program != "moe-lm":
        path = ROOT / (rest[0] if program == "./.venv/bin/python" else program)
        assert path.is_file()
        if path.suffix == ".py":
            return
        assert path.stat().st_mode & 0o111
        return
    command, *arguments = rest
    assert command in NAMES
    if "--help" in arguments:
        assert call(*rest) == 0
        assert "model" in capsys.readouterr().out
    elif command == "sweep":
        for job in jobs_of([a for a in arguments if a != "-m"]):
            resolved(composed("train", list(job.arguments)))
    else:
        arguments = [a if "=" in a else f"file={a}" for a in arguments]
        resolved(composed(command, arguments))


ROUTING = README.split("## Routing")[1].split("\n## ")[0]
GATES = re.findall(r"^\| `(\w+)` \| .* \| `?(nothing[^|]*|gate@[^|`]*)`? \|$", ROUTING, re.MULTILINE)


@pytest.mark.parametrize(("gate", "overrides"), GATES, ids=[gate for gate, _ in GATES])
def test_the_line_of_every_gate_is_complete(gate, overrides):
    """With it the model builds, and its losses are those that the gate learns by."""
    given = [] if overrides.startswith("nothing") else shlex.split(overrides)
    config = resolved(composed("train", ["model=moe_32", *given]))
    with torch.device("meta"):
        model = build_model(config, 11)
    assert config["model"]["layers"]["middle"]["gate"]["_target_"].split(".")[-2] == gate
    check_losses(model, {name: build(part) for name, part in config["balance"].items() if name != "exact"})


def test_every_gate_has_a_line():
    assert {gate for gate, _ in GATES} == set(choices("gate"))


def test_training_example_trains(tmp_path, monkeypatch, capsys):
    """The example as printed, on files of the names it uses, only shorter and narrower."""
    (tmp_path / "news").mkdir()
    text = "".join(f"the number {i} follows the number {i - 1}\n" for i in range(300))
    import gzip

    with gzip.open(tmp_path / "news/train-1.txt.gz", "wt") as stream:
        stream.write(text)
    for split in ("valid", "test"):
        (tmp_path / f"news/{split}.txt").write_text("the number 3 follows the number 2\n")
    monkeypatch.chdir(tmp_path)
    small = ["model.width=8", "model.expert_hidden=8", "batch.words=200", "training.num_words=400"]
    keys = {argument.split("=")[0] for argument in small}
    kept = [argument for argument in TRAINING[1:] if argument.split("=")[0] not in keys]
    assert call(*kept, *small) == 0
    assert "test perplexity" in capsys.readouterr().out
    assert (tmp_path / "runs/news/result.json").is_file()
    export = next(words for words in COMMANDS if words[:2] == ["moe-lm", "export"])
    assert call(*export[1:]) == 0
    [program] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    perplexity, log10, *_ = done.stdout.split()
    assert float(perplexity) == pytest.approx(10 ** (-float(log10) / 6))


def test_every_figure_named_exists():
    """Pictures and pages that the README links to are in the repository."""
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
