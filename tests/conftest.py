"""Fixtures: a folder with the small corpus, one with a finished run, and the command line."""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports Triton: without a GPU its interpreter runs the kernels.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from tiny_training import TRAINING, Outcome, call, signal_handlers, with_overrides, working_in, write_corpus

from moe_lm.cli import job_runner
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.cli.training import trainer_of
from moe_lm.run import Run
from moe_lm.train.trainer import Trainer

WIDTH = ["model.width=16", "model.expert_hidden=32", "model.num_experts=8"]
"""Of `trainer`: rows of 16 bytes, as a GPU's products want them."""
UNREAD = {
    "softmax=full": ["softmax.num_sampled"],
    "layer@model.layers.middle=feed_forward": ["model.num_experts", "model.k"],
}
"""What nobody reads, so that it would be refused, with these choices."""
SLOW_FIXTURES = ("test_one_update_on_many", "test_resume_on_other_numbers", "test_studies")
"""Modules whose tests share the result of half a minute's work or more."""


def pytest_collection_modifyitems(items):
    """Begin with these modules; scripts/test gives each module to one process."""
    items.sort(key=lambda item: item.path.stem not in SLOW_FIXTURES)


@pytest.fixture(autouse=True)
def same_signals():
    """A test leaves no signal ignored: the processes that later ones start would ignore it too."""
    before = signal_handlers()
    yield
    assert signal_handlers() == before


@pytest.fixture
def set_threads():
    """Sets by how many threads torch works, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """A folder with the corpus, its prepared data and the finished run runs/tiny; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "text")
    with working_in(folder):
        assert call("train", *TRAINING) == 0
    return folder


@pytest.fixture(scope="session")
def subwords_once(tmp_path_factory, trained_once) -> Path:
    """The same training with subwords."""
    folder = tmp_path_factory.mktemp("subwords")
    (folder / "text").symlink_to(trained_once / "text")
    arguments = [a for a in TRAINING if not a.startswith("vocabulary.")]
    with working_in(folder):
        assert call("train", *arguments, "vocabulary=subwords", "vocabulary.size=300") == 0
    return folder


@pytest.fixture(params=["words", "subwords"])
def either(request, monkeypatch) -> Path:
    """The working directory holds a run with the one or the other vocabulary."""
    folder = request.getfixturevalue("trained_once" if request.param == "words" else "subwords_once")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(trained_once, monkeypatch) -> Path:
    """The working directory is the shared folder of the finished run, for reading only."""
    monkeypatch.chdir(trained_once)
    return trained_once


@pytest.fixture
def own_trained(trained_once, tmp_path, monkeypatch) -> Path:
    """The working directory is a copy of the finished run's folder, to do damage in."""
    folder = tmp_path / "own"
    shutil.copytree(trained_once, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """The working directory is a fresh folder that holds the corpus in text/."""
    write_corpus(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trainer(workspace):
    """Make a trainer of the tiny training, on a device and with a precision."""

    def made(on: torch.device, *overrides: str, precision: str = "float32") -> Trainer:
        machine = [f"machine.device={on.type}", f"machine.precision={precision}"]
        arguments = with_overrides(TRAINING, *WIDTH, "model.dropout=0", *overrides, *machine, f"name={on.type}")
        unread = {key for choice, keys in UNREAD.items() if choice in arguments for key in keys}
        config = resolved(composed("train", [a for a in arguments if a.partition("=")[0] not in unread]))
        run = Run(Path("runs") / on.type)
        run.folder.mkdir(parents=True, exist_ok=True)
        data = prepared_data(config, log=lambda line: None)
        make.be_deterministic(on)
        found, _ = trainer_of(config, data, run, on, lambda line: None)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in found.model.named_parameters():
            if name.endswith(("gate_DE", "noise_DE")):  # at zero all logits would tie
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return found

    return made


@pytest.fixture
def moe_lm(capsys):
    """The command line: arguments in, exit code and both outputs out."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = call(*arguments)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def jobs_in_this_process(monkeypatch) -> None:
    """The runs of a sweep are calls in this process: starting one of its own takes longer than a tiny training."""

    def start(job: job_runner.Job, environment: dict[str, str]) -> SimpleNamespace:
        with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = call(job.command, *job.arguments)
        return SimpleNamespace(returncode=code, poll=lambda: code, terminate=lambda: None, wait=lambda: code)

    monkeypatch.setattr(job_runner, "_start", start)


@pytest.fixture
def training() -> list[str]:
    """The arguments of the tiny training."""
    return list(TRAINING)
