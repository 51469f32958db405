"""Weights & Biases as a view of metrics.jsonl: which run, which lines, online or not, what keeps it from starting."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_training import with_overrides


class Stand:
    """In the place of the package: keeps what it is told."""

    def __init__(self):
        self.started, self.lines, self.finished, self.error = [], [], 0, None
        self.server = "https://wandb.example:8080/path"

    def Settings(self):
        return SimpleNamespace(base_url=self.server)

    def init(self, **options):
        if self.error is not None:
            raise self.error
        self.started.append(options)
        return self

    def log(self, numbers, step):
        self.lines.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Nobody is logged in."""
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return stand


def test_every_line_at_its_step(workspace, moe_lm, training, wandb):
    """By split, and a resumed run goes on as the same one."""
    half = with_overrides(training, "logging.wandb=true", "training.num_words=1000")
    for arguments in (half, with_overrides(training, "logging.wandb=true")):
        assert moe_lm("train", *arguments).code == 0
    written = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert len(wandb.lines) >= len(written)  # the first part's last, partial interval was taken up again
    for line in written:
        prefix = "valid/" if "split" in line else "train/"
        assert (line["step"], {prefix + key: x for key, x in line.items() if key != "split"}) in wandb.lines
    first, second = wandb.started
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"], first["name"]) == ("allow", "offline", "tiny")
    assert first["config"]["model"]["num_experts"] == 4
    assert wandb.finished == 2


def test_another_run_of_the_same_name_is_another(workspace, moe_lm, training, wandb):
    """But one begun by a version that made the id of its path keeps that."""
    arguments = with_overrides(training, "logging.wandb=true", "training.num_words=300")
    for _ in range(2):
        assert moe_lm("train", *arguments).code == 0
        shutil.rmtree("runs/tiny")
    first, second = (options["id"] for options in wandb.started)
    assert first != second
    Path("runs/tiny/wandb").mkdir(parents=True)
    assert moe_lm("train", *arguments).code == 0
    assert wandb.started[-1]["id"] == "runs-tiny"


@pytest.mark.parametrize(
    ("variables", "machine", "mode"),
    [
        ({"WANDB_API_KEY": "x"}, None, "online"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        ({}, "wandb.example:8080", "online"),
        ({}, "wandb.example", "offline"),
        ({}, "api.wandb.ai", "offline"),
        ({"SERVER": "https://api.wandb.ai"}, "api.wandb.ai", "online"),
        ({"SERVER": "https://api.forge.coreweave.com"}, "api.wandb.ai", "online"),
        ({"SERVER": "https://api.forge.coreweave.com"}, "api.forge.coreweave.com", "online"),
        ({"WANDB_MODE": "disabled"}, "wandb.example:8080", "disabled"),
    ],
)
def test_online_for_who_is_logged_in(workspace, moe_lm, training, wandb, monkeypatch, variables, machine, mode):
    """By a key, or at the server that the package talks to, as it does itself; what WANDB_MODE says comes first."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wandb.server = variables.get("SERVER", wandb.server)
    if machine:
        (Path.home() / "logins").write_text(f"machine {machine} login user password key\n")
        monkeypatch.setenv("NETRC", "~/logins")
    assert moe_lm("train", *with_overrides(training, "logging.wandb=true")).code == 0
    assert [options["mode"] for options in wandb.started] == [mode]


@pytest.mark.parametrize("error", [OSError("no\nroute"), ValueError("mode")], ids=repr)
def test_what_keeps_it_from_starting_is_told_in_a_line(workspace, moe_lm, training, wandb, error):
    wandb.error = error
    outcome = moe_lm("train", *with_overrides(training, "logging.wandb=true"))
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moe-lm: logging.wandb=true: ")
    assert f"{type(error).__name__}: {' '.join(str(error).split())}" in last
    assert "WANDB_MODE=offline" in last
    assert "Traceback" not in outcome.err


def test_ctrl_c_while_it_starts_is_no_mistake(workspace, moe_lm, training, wandb):
    wandb.error = KeyboardInterrupt()
    assert moe_lm("train", *with_overrides(training, "logging.wandb=true")).code == 130


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"machine\n", None])
def test_logins_that_cannot_be_read_are_none(workspace, moe_lm, training, wandb, monkeypatch, content):
    monkeypatch.setenv("NETRC", "~/logins")
    if content is not None:
        (Path.home() / "logins").write_bytes(content)
    assert moe_lm("train", *with_overrides(training, "logging.wandb=true", "training.num_words=100")).code == 0
    assert wandb.started[0]["mode"] == "offline"


def test_a_missing_package_is_told_in_a_line(workspace, moe_lm, training, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = moe_lm("train", *with_overrides(training, "logging.wandb=true"))
    assert outcome.code == 2
    assert "logging.wandb=true" in outcome.err.splitlines()[-1]
