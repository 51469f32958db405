"""Every wrong input ends in one line that starts with `moe-lm: ` and says how to correct it; never a traceback."""

import io
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm import cli
from moe_lm.config_files import folder

# Commands on a finished run.
OTHERS = [
    ("", ""),
    ("trian", "no command 'trian'", "did you mean train?"),
    ("evaluate", "needs run=..."),
    ("evaluate run=runs/none", "runs/none does not exist"),
    ("evaluate run=text", "text is no run"),
    ("evaluate run=text/train.txt", "text/train.txt does not exist"),
    ("evaluate run=runs/tiny split=dev", "split=dev", "train, valid, test"),
    ("evaluate run=runs/tiny split=3", "split=3"),
    ("evaluate run=runs/tiny checkpoint=7", "no checkpoint 7", "last, best or 10, 11, 12"),
    ("evaluate run=runs/tiny checkpoint=newest", "no checkpoint newest"),
    ("evaluate run=runs/tiny checkpoint=-1", "no checkpoint -1"),
    ("evaluate run=runs/tiny checkpoint=²", "checkpoint=²"),
    ("evaluate run=runs/tiny checkpoint=null", "checkpoint"),
    ("evaluate run=runs/tiny batch.sentences=0", "batch.sentences=0", "at least 1"),
    ("evaluate run=runs/tiny batch.words=-1", "batch.words=-1", "at least 1"),
    ("evaluate run=runs/tiny batch=1", "batch=1"),
    ("evaluate run=runs/tiny machine.device=tpu", "machine.device=tpu"),
    ("evaluate run=runs/tiny json=maybe", "json=maybe", "true or false"),
    ("evaluate run=runs/tiny splt=test", "unknown key splt", "did you mean split?"),
    ("evaluate runs/tiny", "'runs/tiny' is no override", "key=value"),
    ("score", "needs run=..."),
    ("score run=runs/none text/test.txt", "runs/none does not exist"),
    ("score run=runs/tiny none.txt", "none.txt", "No such file"),
    ("score run=runs/tiny text", "text", "directory"),
    ("score run=runs/tiny empty.txt", "empty.txt holds no sentence"),
    ("score run=runs/tiny file=null", "standard input holds no sentence"),
    ("score run=runs/tiny bad.txt", "bad.txt, line 2: not UTF-8"),
    ("score run=runs/tiny cut.gz", "cut.gz", "damaged"),
    ("score run=runs/tiny batch.sentences=0 text/test.txt", "batch.sentences", "at least 1"),
    ("score run=runs/tiny checkpoint=3 text/test.txt", "no checkpoint 3"),
    ("prepare corpus=txt", "corpus=txt", "did you mean text?"),
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
    ("prepare corpus=lm1b corpus.folder=none", "corpus.folder=none is no folder"),
    ("prepare corpus=lm1b corpus.folder=text", "text lacks training-monolingual.tokenized.shuffled"),
    ("prepare corpus=lm1b corpus.path=none", "corpus.path=none", "no such folder"),
    ("prepare corpus=lm1b corpus.path=text", "text/train holds no .parquet"),
    ("prepare seed=3", "unknown key seed"),
    ("report", "needs runs=..."),
    ("report runs=none", "none"),
    ("report runs=text", "no run in text"),
    ("sweep study=none", "study=none", "no such study"),
    ("sweep", "study=..."),
]


@pytest.mark.parametrize(("command", "expected"), [(row[0], row[1:]) for row in OTHERS], ids=lambda x: str(x)[:60])
def test_other_commands_refuse(own_trained, moe_lm, monkeypatch, command, expected):
    Path("empty.txt").write_text("\n \n")
    Path("bad.txt").write_bytes(b"a b\n\xff\xfe c\n")
    Path("cut.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    outcome = moe_lm(*command.split())
    if not command:
        assert outcome.code == 2
        assert "train" in outcome.out
        return
    assert_one_line(outcome, *expected)


DAMAGE = [
    ("config.yaml", b"a: [", "config.yaml", ("train", "evaluate", "score")),
    ("config.yaml", b"3", "config.yaml", ("train", "evaluate", "score")),
    ("config.yaml", b"model: 3", "config.yaml", ("evaluate", "score")),
    ("config.yaml", b"\xff\xfe", "config.yaml", ("train", "evaluate", "score")),
    ("config.yaml", None, "config.yaml", ("evaluate", "score")),
    ("result.json", b"{", "result.json", ("train", "report")),
    ("result.json", b"[]", "result.json", ("train", "report")),
    ("result.json", b"{}", "result.json", ("train", "report")),
    ("metrics.jsonl", b'{"step": 1\n', "metrics.jsonl", ("more", "report")),
    ("metrics.jsonl", b"[]\n", "metrics.jsonl", ("more", "report")),
    ("metrics.jsonl", b'{"words": 3}\n', "metrics.jsonl", ("more", "report")),
    ("metrics.jsonl", b"\xff\n", "metrics.jsonl", ("more", "report")),
    ("vocabulary/vocabulary.txt", b"a b c d\n", "vocabulary.txt", ("evaluate", "score")),
    ("vocabulary/vocabulary.txt", b"", "vocabulary.txt", ("evaluate", "score")),
    ("vocabulary/vocabulary.txt", None, "vocabulary.txt", ("evaluate", "score")),
    ("vocabulary/vocabulary.txt", b"<S>\n</S>\n<UNK>\na\n", "does not fit", ("evaluate", "score")),
]
COMMANDS = {
    "train": ["train", *TRAINING],
    "more": ["train", *with_overrides(list(TRAINING), "training.num_words=5000")],
    "evaluate": ["evaluate", "run=runs/tiny"],
    "score": ["score", "run=runs/tiny", "text/test.txt"],
    "report": ["report", "runs=runs"],
}


@pytest.mark.parametrize(
    ("file", "content", "expected", "command"),
    [(file, content, expected, command) for file, content, expected, commands in DAMAGE for command in commands],
)
def test_damaged_files_of_a_run_are_named(own_trained, moe_lm, file, content, expected, command):
    path = Path("runs/tiny") / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert_one_line(moe_lm(*COMMANDS[command]), expected)
    assert not path.exists() if content is None else path.read_bytes() == content


def test_a_run_without_checkpoint_cannot_be_evaluated(own_trained, moe_lm):
    Path("runs/tiny/checkpoints").rename("elsewhere")
    for command in ("evaluate", "score"):
        assert_one_line(moe_lm(*COMMANDS[command]), "runs/tiny has no checkpoint")


def test_a_best_checkpoint_needs_a_validation(workspace, moe_lm):
    assert moe_lm("train", *with_overrides(list(TRAINING), "training.valid_every=100")).code == 0
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


WRONG_SIZES = [
    *("model.k=5", "model.width=0", "optimizer.experts=adm", "schedule.warmup_steps=0", "training.valid_every=0"),
    *("valid.max_sentences=0", "checkpoint.keep_last=0", "checkpoint.every_seconds=-1", "batch.micro_words=201"),
]


@pytest.mark.parametrize("override", WRONG_SIZES)
def test_sizes_are_refused_before_anything_is_written(workspace, moe_lm, override):
    """Nothing is prepared and no run claims its name, so the corrected command starts."""
    before = sorted(Path().rglob("*"))
    assert_one_line(moe_lm("train", *with_overrides(list(TRAINING), override)), override.split("=")[0].split(".")[1])
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("command", ["prepare", "train", "sweep", "evaluate", "score", "report", "sample", "export"])
def test_help_is_made_from_the_configuration(moe_lm, command):
    outcome = moe_lm(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"moe-lm {command}" in outcome.out
    assert (folder() / f"{command}.yaml").read_text().splitlines()[-1] in outcome.out


def test_the_help_of_train_names_the_keys_of_the_choices(moe_lm):
    out = moe_lm("train", "--help").out
    assert "softmax=sampled  softmax.num_sampled=8192" in out
    assert "gate@model.layers.NAME.gate=noisy_top_k  model.layers.NAME.gate.noise_epsilon=0.01" in out
    assert "balance=load  balance.load.weight=0.1" in out


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
