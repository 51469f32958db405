"""The pages are true: every command composes, links resolve, the examples of README.md and docs/routing.md run."""

import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import TRAINING, call, with_overrides

from moe_lm import cli, config_files, gate, loss
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.cli.sweep import jobs_of
from moe_lm.cli.validate_gates import check_losses
from moe_lm.config_files import choices, folder, packaged_targets

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README, ROUTING = PAGES["README.md"], PAGES["docs/routing.md"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of each command that a page shows."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if commands(page)])
def test_commands_compose(name, capsys):
    """Scripts exist and know their options; the keys of every moe-lm command are known."""
    for words in commands(PAGES[name]):
        program, *rest = words
        if program == "git":
            continue
        if program == "sbatch":
            program, *rest = [word for word in rest if not word.startswith("--")]
            assert program == "scripts/slurm"
            resolved(composed("train", rest))
        if program == "torchrun":
            program, *rest = ["moe-lm", *rest[rest.index("moe_lm") + 1 :]]
        if program == "moe-lm":
            check_moe_lm(rest, capsys)
        else:
            check_script([program, *rest], capsys)


def check_script(words: list[str], capsys) -> None:
    """The script exists; a Python script accepts each option, any other is executable."""
    is_python = words[0].rpartition("/")[2] == "python"
    path, *options = words[1:] if is_python else words
    assert (ROOT / path).is_file(), path
    if is_python:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [path, "--help"])
            patch.syspath_prepend(ROOT / "scripts")
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / path), run_name="__main__")
        usage = capsys.readouterr().out
        for option in options:
            assert not option.startswith("--") or f"{option} " in usage or f"{option}]" in usage, words
    else:
        assert (ROOT / path).stat().st_mode & 0o111, path


def check_moe_lm(words: list[str], capsys) -> None:
    """The command exists and takes these arguments."""
    command, *arguments = words
    assert command in cli.COMMANDS
    if "--help" in arguments:
        assert call(*words) == 0
        assert "model" in capsys.readouterr().out
    elif command == "sweep":
        jobs = jobs_of([a for a in arguments if a != "-m"])
        is_study = any(a.startswith("study=") for a in arguments)
        for job in jobs[:1] if is_study else jobs:  # test_studies.py composes every run of a study
            resolved(composed("train", list(job.arguments)))
    else:
        resolved(composed(command, [a if "=" in a else f"file={a}" for a in arguments]))


GATES = re.findall(r"^\| `(\w+)` \| .* \| `?(nothing[^|]*|gate@[^|`]*)`? \|$", ROUTING, re.MULTILINE)


def test_the_line_of_every_listed_gate_is_complete():
    """With it the model builds, and its losses are those that the gate learns by. A new gate may be missing."""
    assert len(GATES) >= 8
    for name, overrides in GATES:
        given = [] if overrides.startswith("nothing") else shlex.split(overrides)
        config = resolved(composed("train", ["model=moe_32", *given]))
        with torch.device("meta"):
            model = build_model(config, 11)
        assert config["model"]["layers"]["middle"]["gate"]["_target_"].split(".")[-2] == name
        check_losses(model, {key: build(part) for key, part in config["balance"].items() if key != "global_batch"})


def test_training_example_trains(tmp_path, monkeypatch, capsys):
    """The example as printed, on files of the names it uses, only shorter and narrower."""
    (tmp_path / "news").mkdir()
    text = "".join(f"the number {i} follows the number {i - 1}\n" for i in range(300))
    with gzip.open(tmp_path / "news/train-1.txt.gz", "wt") as stream:
        stream.write(text)
    for split in ("valid", "test"):
        (tmp_path / f"news/{split}.txt").write_text("the number 3 follows the number 2\n")
    monkeypatch.chdir(tmp_path)
    small = ["model.width=8", "model.expert_hidden=8", "batch.words=200", "training.num_words=400"]
    example = next(words for words in commands(README) if "corpus=text" in words and words[1] == "train")
    assert call(*with_overrides(example[1:], *small)) == 0
    assert "test perplexity" in capsys.readouterr().out
    assert (tmp_path / "runs/news/result.json").is_file()
    export = next(words for words in commands(README) if words[:2] == ["moe-lm", "export"])
    assert call(*export[1:]) == 0
    [program] = [block for block in blocks(README, "python") if "moe_lm.load" in block]
    assert program in blocks(PAGES["docs/commands.md"], "python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    perplexity, log10, *_ = done.stdout.split()
    assert float(perplexity) == pytest.approx(10 ** (-float(log10) / 6))


@pytest.fixture
def pasted(tmp_path, monkeypatch, workspace):
    """The example gate of README.md and the example balance loss of docs/routing.md as files, with their YAML."""
    shutil.copytree(folder(), tmp_path / "package/configs")
    monkeypatch.setattr(config_files, "__file__", str(tmp_path / "package/moe_lm/config_files.py"))
    [gate_code] = [block for block in blocks(README, "python") if "(Gate)" in block]
    shown_gate_code, loss_code = blocks(ROUTING, "python")
    gate_yaml, loss_yaml = blocks(ROUTING, "yaml")
    assert shown_gate_code == gate_code
    assert all(f"`{line}`" in README for line in gate_yaml.splitlines())
    examples = ((gate, "gate", gate_code, gate_yaml), (loss, "balance", loss_code, loss_yaml))
    for package, group, code, content in examples:
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.py").write_text(code)
        (tmp_path / f"package/configs/{group}/mine.yaml").write_text(content)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / group)])
    importlib.invalidate_caches()
    packaged_targets.cache_clear()
    yield
    monkeypatch.undo()
    packaged_targets.cache_clear()
    for package in (gate, loss):
        sys.modules.pop(f"{package.__name__}.mine", None)
        vars(package).pop("mine", None)


def test_example_gate_and_loss_train(pasted):
    """Two steps with the overrides that the pages print, and the example loss added."""
    assert "mine" in choices("gate")
    [overrides] = set(re.findall(r"`(gate@model.layers.middle.gate=mine '[^`]*)`", README + ROUTING))
    where, losses = shlex.split(overrides)
    words = [where, losses.replace("]", ",mine]"), "training.num_words=400"]
    assert call("train", *with_overrides(TRAINING, *words)) == 0
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) >= 2
    assert all(line["balance_mine"] >= 0 for line in lines if "split" not in line)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    """Each file that a page links to or names is in the repository, and so is each heading."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", PAGES[name]):
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target
    for target in re.findall(r"\b(?:moe_lm|tests|scripts|configs|docs)/[\w/.]+\.(?:py|yaml|sh|md)\b", PAGES[name]):
        assert (ROOT / target).is_file() or Path(target).stem in ("mine", "x"), target


def test_pages_hold_no_conflict_markers():
    for name, page in PAGES.items():
        assert not re.search(r"^(<{7}|>{7}) ", page, re.MULTILINE), name


def test_the_readme_is_short_and_links_to_every_page():
    assert len(README.splitlines()) <= 130
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))
    assert PAGES.keys() - {"README.md"} <= linked
