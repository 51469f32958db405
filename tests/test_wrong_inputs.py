"""Every wrong input ends in one line that starts with `moe-lm: ` and says how to correct it; never a traceback."""

import io
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm import cli, load
from moe_lm.config_files import folder, read_choice
from moe_lm.errors import UserError
from moe_lm.run import Run
from moe_lm.train.trainer import Trainer

# Commands, in a folder with a finished run and wrong files, and words that the line must contain.
OTHERS = [
    ("evaluate", "needs run=..."),
    ("evaluate run=runs/none", "runs/none does not exist"),
    ("evaluate run=text", "text is no run"),
    ("evaluate run=runs/tiny split=dev", "split=dev", "train, valid, test"),
    ("evaluate run=runs/tiny checkpoint=7", "no checkpoint 7", "last, best or 10, 11, 12"),
    ("evaluate run=runs/tiny checkpoint=newest", "no checkpoint newest"),
    ("evaluate run=runs/tiny checkpoint=²", "checkpoint=²"),
    ("evaluate run=runs/tiny batch.words=-1", "batch.words=-1", "at least 1"),
    ("evaluate run=runs/tiny machine.device=tpu", "machine.device=tpu"),
    ("evaluate runs/tiny", "'runs/tiny' is no override", "key=value"),
    ("score run=runs/tiny text", "text", "directory"),
    ("score run=runs/tiny empty.txt", "empty.txt holds no sentence"),
    ("score run=runs/tiny file=null", "standard input holds no sentence"),
    ("score run=runs/tiny bad.txt", "bad.txt, line 2: not UTF-8"),
    ("score run=runs/tiny cut.gz", "cut.gz", "damaged"),
    ("score run=runs/tiny batch.sentences=0 text/test.txt", "batch.sentences", "at least 1"),
    ("score run=runs/tiny checkpoint=3 text/test.txt", "no checkpoint 3"),
    ("prepare corpus=text", "corpus.train=[...]"),
    (
        "prepare corpus=text corpus.train=[empty.txt] corpus.valid=[text/valid.txt] corpus.test=[text/test.txt]",
        "train split",
    ),
    (
        "prepare corpus=text corpus.train=[bad.txt] corpus.valid=[text/valid.txt] corpus.test=[text/test.txt]",
        "bad.txt, line 2",
    ),
    (
        "prepare corpus=text corpus.train=[text/train.txt] corpus.valid=[empty.txt] corpus.test=[text/test.txt]",
        "valid split",
    ),
    ("prepare vocabulary=subwords vocabulary.size=3", "vocabulary.size=3"),
    ("prepare processes=0", "processes=0", "at least 1"),
    ("prepare corpus=lm1b corpus.folder=text", "text lacks training-monolingual.tokenized.shuffled"),
    ("prepare corpus=lm1b corpus.path=text", "text/train holds no .parquet"),
    ("report runs=none", "none"),
    ("report runs=text", "no run in text"),
    ("sweep study=none", "study=none", "no such study"),
]
# One a command, called as a user calls it.
WHOLE = [
    ("trian", "no command 'trian'", "did you mean train?"),
    ("evaluate run=runs/tiny splt=test", "unknown key splt", "did you mean split?"),
    ("score run=runs/tiny none.txt", "none.txt", "No such file"),
    ("prepare corpus=txt", "corpus=txt", "did you mean text?"),
    ("report", "needs runs=..."),
    ("sweep", "study=..."),
]


def rows(table):
    return pytest.mark.parametrize(("command", "expected"), [(r[0], r[1:]) for r in table], ids=lambda x: str(x)[:60])


@pytest.fixture
def wrong_files(trained, tmp_path, monkeypatch) -> Path:
    """The working directory holds the finished run, its text, and files that are wrong."""
    for name in ("runs", "text"):
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.txt").write_bytes(b"a b\n\xff\xfe c\n")
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@rows(OTHERS)
def test_other_commands_refuse(wrong_files, set_threads, command, expected):
    name, *arguments = command.split()
    with pytest.raises((UserError, OSError)) as caught:
        import_module(f"moe_lm.cli.{name}").main(arguments)
    [line] = str(caught.value).splitlines()
    for words in expected:
        assert words in line, line


@rows(WHOLE)
def test_a_refusal_is_one_line(wrong_files, moe_lm, command, expected):
    assert_one_line(moe_lm(*command.split()), *expected)


def test_without_a_command_the_usage_is_printed(moe_lm):
    outcome = moe_lm()
    assert outcome.code == 2
    assert "train" in outcome.out


COMMANDS = {
    "train": ["train", *TRAINING],
    "more": ["train", *with_overrides(list(TRAINING), "training.num_words=5000")],
    "evaluate": ["evaluate", "run=runs/tiny"],
    "score": ["score", "run=runs/tiny", "text/test.txt"],
    "report": ["report", "runs=runs"],
}
DAMAGE = [
    ("config.yaml", b"a: [", "train"),
    ("config.yaml", None, "score"),
    ("result.json", b"{", "train"),
    ("result.json", b"[]", "report"),
    ("metrics.jsonl", b'{"step": 1\n', "more"),
    ("metrics.jsonl", b"[]\n", "report"),
    ("vocabulary/vocabulary.txt", b"", "evaluate"),
    ("vocabulary/vocabulary.txt", None, "score"),
]


def damage(file: str, content: bytes | None) -> Path:
    """Replace a file of the run, or delete it."""
    path = Path("runs/tiny") / file
    path.unlink() if content is None else path.write_bytes(content)
    return path


@pytest.mark.parametrize(("file", "content", "command"), DAMAGE)
def test_damaged_files_of_a_run_are_named(own_trained, moe_lm, file, content, command):
    path = damage(file, content)
    assert_one_line(moe_lm(*COMMANDS[command]), path.name)
    assert not path.exists() if content is None else path.read_bytes() == content


READERS = {
    "config.yaml": lambda: Run(Path("runs/tiny")).config(),
    "result.json": lambda: Run(Path("runs/tiny")).result(),
    "metrics.jsonl": lambda: Run(Path("runs/tiny")).cut_metrics(12),
    "vocabulary/vocabulary.txt": lambda: load("runs/tiny"),
}
FURTHER = {
    "config.yaml": [b"3", b"model: 3", b"\xff\xfe"],
    "result.json": [b"{}", b"[]"],
    "metrics.jsonl": [b"[]\n", b'{"words": 3}\n', b"\xff\n"],
    "vocabulary/vocabulary.txt": [b"a b c d\n", b"<S>\n</S>\n<UNK>\na\n"],
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file in FURTHER for content in FURTHER[file]])
def test_every_kind_of_damage_is_refused_by_what_reads_the_file(own_trained, file, content):
    path = damage(file, content)
    with pytest.raises(UserError) as caught:
        READERS[file]()
    [line] = str(caught.value).splitlines()
    assert ("does not fit" if content.startswith(b"<S>") else path.name) in line
    assert path.read_bytes() == content


def test_a_run_without_checkpoint_cannot_be_evaluated(own_trained, moe_lm):
    Path("runs/tiny/checkpoints").rename("elsewhere")
    for command in ("evaluate", "score"):
        assert_one_line(moe_lm(*COMMANDS[command]), "runs/tiny has no checkpoint")


def test_a_best_checkpoint_needs_a_validation(workspace, moe_lm, monkeypatch):
    """A run of an earlier version may have none: this version validates at the end at the latest."""
    monkeypatch.setattr(Trainer, "_validate", lambda self, bar: None)
    assert moe_lm("train", *with_overrides(list(TRAINING), "training.num_words=300")).code == 0
    assert_one_line(moe_lm("evaluate", "run=runs/tiny", "checkpoint=best"), "never validated", "checkpoint=last")


def test_changed_text_is_refused(own_trained, moe_lm):
    """The training's token ids are used while they exist; ids prepared again from other text are refused."""
    Path("text/test.txt").write_text("w1 w2\n")
    assert moe_lm("evaluate", "run=runs/tiny").code == 0
    shutil.rmtree("data")
    assert_one_line(moe_lm("evaluate", "run=runs/tiny"), "the text changed")
    assert_one_line(moe_lm(*COMMANDS["more"]), "data have changed")
    shutil.rmtree("data")
    Path("text/train.txt").write_text(Path("text/train.txt").read_text() + "words never seen before\n" * 9)
    assert_one_line(moe_lm(*COMMANDS["more"]), "data have changed")  # although the vocabulary's size has, too


def test_a_read_only_run_directory_is_named(own_trained, moe_lm, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "runs/tiny/.config.yaml.partial")

    monkeypatch.setattr("moe_lm.run.write_text", refuse)
    assert_one_line(moe_lm(*COMMANDS["more"]), "runs/tiny", "Permission denied")


def test_a_closed_pipe_is_no_error(trained):
    command = [sys.executable, "-m", "moe_lm", "score", "run=runs/tiny", "text/train.txt", "machine.threads=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


def test_out_of_memory_is_one_line(workspace, moe_lm):
    outcome = moe_lm("train", *with_overrides(list(TRAINING), "model.expert_hidden=1_000_000_000_000"))
    assert_one_line(outcome, "out of memory")


@pytest.mark.parametrize("override", ["model.k=5", "batch.micro_words=201"])
def test_sizes_are_refused_before_anything_is_written(workspace, moe_lm, override):
    """Nothing is prepared and no run claims its name, so the corrected command starts."""
    before = sorted(Path().rglob("*"))
    assert_one_line(moe_lm("train", *with_overrides(list(TRAINING), override)), override.split("=")[0].split(".")[1])
    assert sorted(Path().rglob("*")) == before


def test_help_is_made_from_the_configuration(moe_lm):
    for command in cli.COMMANDS:
        out = cli.help_text(command)
        assert f"moe-lm {command}" in out
        assert (folder() / f"{command}.yaml").read_text().splitlines()[-1] in out, command
    outcome = moe_lm("train", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == cli.help_text("train") + "\n"


def test_the_help_of_train_names_the_keys_of_the_choices():
    out = cli.help_text("train")
    assert "softmax=sampled  softmax.num_sampled=8192" in out
    assert "gate@model.layers.NAME.gate=noisy_top_k  model.layers.NAME.gate.noise_epsilon=0.01" in out
    assert "balance=load  balance.load.weight=0.1" in out


def test_a_syntax_error_in_a_yaml_file_is_one_line(moe_lm, tmp_path, monkeypatch):
    """As in the file of a new gate, whichever command and library reads it."""
    (tmp_path / "mine.yaml").write_text("_target_: moe_lm.gate.mine.Mine\n  _partial_: true\n")
    expected = f"{tmp_path / 'mine.yaml'}, line 2, is no valid YAML"
    monkeypatch.setattr("moe_lm.config_files.folder", lambda: tmp_path.parent)
    for read in (lambda: OmegaConf.load(tmp_path / "mine.yaml"), lambda: read_choice(tmp_path.name, "mine")):
        monkeypatch.setattr("moe_lm.__main__._run", lambda *arguments, read=read: read())
        assert_one_line(moe_lm("train"), expected)


def test_usage_and_version(moe_lm):
    assert moe_lm("--version").out.strip() == version("moe-lm")
    for arguments in (["--help"], ["-h"], ["help"]):
        outcome = moe_lm(*arguments)
        assert outcome.code == 0
        assert all(f"\n  {name} " in outcome.out for name in cli.COMMANDS)


def test_help_imports_nothing_heavy():
    """Usage and every command's help, in one fresh process: no torch, NumPy or Hydra, which take seconds."""
    program = (
        "import sys\nfrom moe_lm.__main__ import main\nfrom moe_lm.cli import COMMANDS\n"
        "for arguments in [['--help'], *([name, '--help'] for name in COMMANDS)]:\n    assert main(arguments) == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'datasets', 'hydra', 'omegaconf'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
