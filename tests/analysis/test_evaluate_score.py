"""Perplexity does not depend on batching, and score's sums are evaluate's."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from tiny_run import RUN, evaluated, scored
from tiny_training import with_overrides

from moe_lm import load
from moe_lm.analysis.perplexity import evaluate
from moe_lm.cli.data import data_of


def test_the_batch_changes_no_perplexity_and_every_sentence_counts_once(either):
    """Each split has one perplexity; on valid and test it is the one that training measured."""
    lm, result = load("runs/tiny"), json.loads(Path("runs/tiny/result.json").read_text())
    for split, part in data_of(lm, "runs/tiny", None, print).splits.items():
        lines, expected = Path(f"text/{split}.txt").read_text().splitlines(), result["perplexity"].get(split)
        for sentences, words in ((1, 1000), (7, 1000), (1000, 100_000), (100, 1)):
            found = evaluate(lm.model, part, start=lm.vocabulary.start, max_sentences=sentences, max_words=words)
            assert found.sentences == len(lines)
            assert found.words == sum(len(line.split()) + 1 for line in lines)
            assert found.perplexity == math.exp(found.nats / found.words)
            expected = expected or found.perplexity
            assert found.perplexity == pytest.approx(expected, rel=1e-6), (split, sentences, words)
        assert result["predicted_words"].get(split, found.words) == found.words


def test_the_command_finds_the_same_for_every_split_and_batch(trained, moe_lm):
    lm = load("runs/tiny")
    for split, batch in (("train", "batch.sentences=7"), ("valid", "batch.words=1"), ("test", "batch.sentences=1000")):
        lines = Path(f"text/{split}.txt").read_text().splitlines()
        figures = evaluated(moe_lm, f"split={split}", batch)
        assert (figures["split"], figures["step"], figures["sentences"]) == (split, 12, len(lines))
        assert figures["predicted_words"] == sum(len(line.split()) + 1 for line in lines)
        assert figures["perplexity"] == pytest.approx(lm.perplexity(lines), rel=1e-6)


def test_the_line_for_people_says_the_same(trained, moe_lm):
    figures = evaluated(moe_lm)
    out = moe_lm("evaluate", RUN).out
    assert f"runs/tiny step 12, test: perplexity {figures['perplexity']:.4f}" in out
    assert f"{figures['predicted_words']:,} words" in out


def test_checkpoints_by_name_and_by_step(trained, moe_lm):
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "split" in line), key=lambda line: line["perplexity"])["step"]
    assert evaluated(moe_lm, "checkpoint=best")["step"] == best
    last, eleventh = evaluated(moe_lm), evaluated(moe_lm, "checkpoint=11")
    assert evaluated(moe_lm, "checkpoint=last") == evaluated(moe_lm, "checkpoint=12") == last
    assert eleventh["step"] == 11
    assert eleventh["nats"] != last["nats"]
    assert scored(moe_lm, "checkpoint=11", "text/test.txt")["log10"] != scored(moe_lm, "text/test.txt")["log10"]


def test_periodic_validation_counts_the_first_sentences_only(trained, moe_lm, tmp_path):
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    [at_step_10] = [line for line in lines if line["step"] == 10 and "split" in line]
    first = Path("text/valid.txt").read_text().splitlines()[:10]
    assert at_step_10["predicted_words"] == sum(len(line.split()) + 1 for line in first)
    (tmp_path / "first.txt").write_text("\n".join(first))
    sums = scored(moe_lm, "checkpoint=10", str(tmp_path / "first.txt"))
    assert -sums["log10"] * math.log(10) == pytest.approx(at_step_10["nats"], rel=1e-6)


def test_score_adds_up_to_evaluate(either, moe_lm):
    figures = evaluated(moe_lm)
    for size in (1, 7):
        sums = scored(moe_lm, "text/test.txt", f"batch.sentences={size}")
        assert sums["file"] == "text/test.txt"
        assert sums["sentences"] == figures["sentences"]
        assert sums["words"] + sums["sentences"] == figures["predicted_words"]
        assert -sums["log10"] * math.log(10) == pytest.approx(figures["nats"], rel=1e-6), size
        assert sums["ppl"] == pytest.approx(figures["perplexity"], rel=1e-6), size


def test_score_reads_standard_input_alike(trained, moe_lm, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(Path("text/test.txt").read_bytes()))
    from_file = scored(moe_lm, "file=text/test.txt")
    monkeypatch.setattr(sys, "stdin", stream)
    from_input = scored(moe_lm)
    assert from_input.pop("file") == "-"
    assert from_file.pop("file") == "text/test.txt"
    assert from_input == from_file


def test_the_words_add_up_to_the_sentences_and_these_to_the_file(either, moe_lm):
    sums = scored(moe_lm, "text/test.txt")
    log10 = words = 0
    blocks = "\n".join(sums["before"]).split("\n\n")
    for block, sentence in zip(blocks, Path("text/test.txt").read_text().splitlines(), strict=False):
        first, *of_words, counts, _ = block.strip("\n").splitlines()
        assert first == sentence
        assert [line.split()[1] for line in of_words] == [*sentence.split(), "</S>"]
        values = [float(line.split("[")[1].split("]")[0]) for line in of_words]
        probabilities = [float(line.split("=")[1].split("[")[0]) for line in of_words]
        assert probabilities == pytest.approx([10**value for value in values], rel=1e-4)
        assert counts.startswith(f"1 sentences, {len(values) - 1} words")
        log10, words = log10 + sum(values), words + len(values)
    assert sums["log10"] == pytest.approx(log10, abs=1e-6 * words)
    assert sums["ppl"] == pytest.approx(10 ** (-log10 / words), rel=1e-5)
    assert sums["ppl1"] == pytest.approx(10 ** (-log10 / (words - sums["sentences"])), rel=1e-5)


def test_sentences_alone(trained, moe_lm):
    sums = scored(moe_lm, "text/test.txt", "words=false")
    values = [line.split("\t") for line in sums["before"]]
    assert [sentence for _, sentence in values] == Path("text/test.txt").read_text().splitlines()
    assert sum(float(value) for value, _ in values) == pytest.approx(sums["log10"], abs=1e-4)


def test_unknown_words_are_counted_and_scored(trained, moe_lm, tmp_path):
    file = tmp_path / "odd's, file=1.txt"
    file.write_text("w1 zebra w2\n\n  <UNK>   zebra  \n")
    sums = scored(moe_lm, str(file))
    assert (sums["sentences"], sums["words"], sums["unknown"]) == (2, 5, 3)
    assert math.isfinite(sums["log10"])
    assert any(line.startswith("\tp( zebra | w1 ...)") for line in sums["before"])


def test_subwords_know_every_word(subwords_once, moe_lm, monkeypatch, tmp_path):
    monkeypatch.chdir(subwords_once)
    (tmp_path / "file.txt").write_text("w1 zebra ü\n")
    sums = scored(moe_lm, str(tmp_path / "file.txt"))
    assert (sums["sentences"], sums["words"], sums["unknown"]) == (1, 3, 0)


def test_a_run_can_be_moved_and_scored_without_its_text(own_trained, moe_lm):
    Path("runs/tiny").rename("elsewhere")
    (own_trained / "test.txt").write_bytes(Path("text/test.txt").read_bytes())
    for path in Path("text").iterdir():
        path.unlink()
    assert moe_lm("score", "run=elsewhere", "test.txt").code == 0


def test_evaluate_reads_what_training_prepared_wherever_that_is(workspace, moe_lm, training):
    """The run knows where its data lie; nothing is prepared a second time."""
    assert moe_lm("train", *with_overrides(training, "data=elsewhere", "training.num_words=300")).code == 0
    for text in Path("text").iterdir():
        text.unlink()
    outcome = moe_lm("evaluate", "run=runs/tiny", "json=true")
    assert outcome.code == 0, outcome.err
    assert not Path("data").exists()
