"""A training that starts from another run's or an export's weights."""

import json
from pathlib import Path

import pytest
import torch
from shards import whole
from tiny_training import assert_one_line, with_overrides


def started(moe_lm, training, name: str, *overrides: str):
    """A training of one tiny update, so that its weights stay close to the initial ones."""
    small = ("optimizer.learning_rate=1e-12", "training.num_words=1", "checkpoint.every_seconds=1000")
    return moe_lm("train", *with_overrides(training, *small, f"name={name}", *overrides))


def weights(name: str) -> dict[str, torch.Tensor]:
    return whole(max(Path("runs", name, "checkpoints").glob("[0-9]*")) / "model")


@pytest.mark.parametrize("source", ["run", "export"])
def test_it_starts_from_the_weights_and_counts_from_zero(own_trained, moe_lm, training, source):
    folder = "runs/tiny"
    if source == "export":
        assert moe_lm("export", "run=runs/tiny", "to=exports/tiny").code == 0
        folder = "exports/tiny"
    outcome = started(moe_lm, training, "other", f"init_from={folder}", "seed=9")
    assert outcome.code == 0, outcome.err
    assert f"starts from the weights of {folder}" in outcome.err
    result = json.loads(Path("runs/other/result.json").read_text())
    assert result["steps"] == 1
    first, second = weights("tiny"), weights("other")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-9)
    trained = json.loads(Path("runs/tiny/result.json").read_text())
    assert result["perplexity"]["test"] == pytest.approx(trained["perplexity"]["test"], rel=1e-6)


def test_without_init_from_the_weights_differ(own_trained, moe_lm, training):
    """A negative control of the test above."""
    assert started(moe_lm, training, "fresh", "seed=9").code == 0
    assert any(not torch.allclose(weights("fresh")[name], tensor) for name, tensor in weights("tiny").items())


def test_a_resumed_run_goes_on_from_its_own_checkpoint(own_trained, moe_lm, training):
    """The other run's weights are read at the first start only and may be deleted afterwards."""
    shorter = with_overrides(training, "training.num_words=1000", "name=other", "init_from=runs/tiny")
    longer = with_overrides(training, "name=other", "init_from=runs/tiny")
    unbroken = with_overrides(training, "name=at_once", "init_from=runs/tiny")
    assert moe_lm("train", *unbroken).code == 0
    assert moe_lm("train", *shorter).code == 0
    Path("runs/tiny").rename("runs/elsewhere")
    outcome = moe_lm("train", *longer)
    assert "resumed at step" in outcome.err
    ours, theirs = weights("other"), weights("at_once")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init_from=nowhere"], ["init_from=nowhere", "is no folder"]),
        (["init_from=text"], ["text"]),
        (["init_from=runs/tiny", "corpus.max_words=8"], ["init_from=runs/tiny", "another vocabulary"]),
        (["init_from=runs/tiny", "model.width=16"], ["does not fit the model"]),
        (["init_from=runs/tiny", "model.num_experts=5"], ["does not fit the model"]),
    ],
    ids=str,
)
def test_unsuitable_sources_are_refused(own_trained, moe_lm, training, overrides, words):
    assert_one_line(moe_lm("train", *with_overrides(training, "name=other", *overrides)), *words)


def test_init_from_is_part_of_the_identity(own_trained, moe_lm, training):
    assert started(moe_lm, training, "other", "init_from=runs/tiny").code == 0
    assert_one_line(started(moe_lm, training, "other"), "runs/other holds another run", "init")
