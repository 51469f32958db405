"""moe_lm.load opens a run in Python, without Hydra, and its numbers are those of the commands."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import PROGRAM, evaluated, scored

from moe_lm import load
from moe_lm.errors import UserError


def lines(split: str = "test") -> list[str]:
    return Path(f"text/{split}.txt").read_text().splitlines()


def test_three_lines_without_hydra(trained, moe_lm, tmp_path):
    program = PROGRAM.replace("FOLDER", "'runs/tiny'")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    perplexity, log10 = map(float, done.stdout.split())
    assert perplexity == evaluated(moe_lm)["perplexity"]
    (tmp_path / "three.txt").write_text("w1 w2 zebra\n")
    assert log10 == pytest.approx(scored(moe_lm, str(tmp_path / "three.txt"))["log10"], abs=1e-6)


def test_perplexity_equals_evaluate(either, moe_lm):
    lm = load("runs/tiny")
    for split in ("train", "valid", "test"):
        assert lm.perplexity(lines(split)) == evaluated(moe_lm, f"split={split}")["perplexity"]
    assert lm.perplexity(["", *lines(), " \n"]) == evaluated(moe_lm)["perplexity"]


def test_log10_equals_score(either, moe_lm):
    lm = load("runs/tiny")
    blocks = "\n".join(scored(moe_lm, "text/test.txt")["before"]).split("\n\n")
    for sentence, block in zip(lines(), blocks, strict=False):
        printed = [float(line.split("[")[1].split("]")[0]) for line in block.splitlines() if line.startswith("\t")]
        found = lm.score(sentence)
        assert found.words == sentence.split()
        assert found.log10_of_words == pytest.approx(printed, abs=2e-6)
        assert lm.log10(sentence) == found.log10 == math.fsum(found.log10_of_words)


def test_a_checkpoint_by_name_and_by_step(trained, moe_lm):
    for which in ("best", 11, "11"):
        lm = load(Path("runs/tiny"), checkpoint=which)
        assert lm.perplexity(lines()) == evaluated(moe_lm, f"checkpoint={which}")["perplexity"]
        assert json.dumps(lm.step)


def test_the_empty_sentence_ends_at_once(trained):
    lm = load("runs/tiny")
    assert lm.score("").words == []
    assert lm.log10(" ") == lm.log10("") < 0


def test_unknown_words_are_counted(trained):
    assert load("runs/tiny").score("w1 zebra <UNK>").unknown == 2


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda lm: lm.perplexity([]), "needs a sentence"),
        (lambda lm: lm.perplexity(["", " "]), "needs a sentence"),
        (lambda lm: lm.perplexity("w1 w2"), "a list of sentences"),
        (lambda lm: load("runs/none"), "runs/none does not exist"),
        (lambda lm: load("text"), "text is no run"),
        (lambda lm: load("runs/tiny", checkpoint=7), "has no checkpoint 7"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_error_is_one_line(trained, call, expected):
    with pytest.raises(UserError, match=expected):
        call(load("runs/tiny"))


@pytest.mark.parametrize("text", ["extra: &a [*a]\n", "a: &a [1]\nb: [*a, *a]\n", "extra: " + 5000 * "[" + "\n"])
def test_a_configuration_with_aliases_is_refused(own_trained, text):
    file = Path("runs/tiny/config.yaml")
    file.write_text(file.read_text() + text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load("runs/tiny")
