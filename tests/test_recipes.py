"""Recipes: what they set, that an override wins, and that the README's line learns with its recipe."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.cli.config import composed, resolved
from moe_lm.config_files import choices, flatten

ROOT = Path(__file__).parent.parent
DATA = "corpus.train=text/train.txt corpus.valid=text/valid.txt corpus.test=text/test.txt vocabulary.min_count=1"
SHORT = f"{DATA} model.width=32 model.expert_hidden=32 batch.words=128 training.num_words=26_000 machine.threads=1"


def config_of(*overrides):
    return resolved(composed("train", list(overrides)))


def test_every_recipe_sets_existing_keys_only():
    """A misspelt key in a recipe would be a new key that nobody reads."""
    keys = flatten(config_of()).keys()
    assert choices("recipe") == ["paper", "small_batch"]
    for recipe in choices("recipe"):
        assert flatten(config_of(f"recipe={recipe}")).keys() == keys


def test_the_papers_recipe_is_the_default_and_states_the_paper():
    """Sigmoid, gates that begin at zero under full noise, one rate, no final decay: Appendices A and C.1."""
    config = config_of()
    assert config_of("recipe=paper") == config
    layer = config["model"]["layers"]["middle"]
    assert (layer["output_activation"], layer["gate_init_std"], layer["gate_noise_scale"]) == ("sigmoid", None, 1.0)
    assert set(config["optimizer"]["rates"].values()) == {1.0}
    assert (config["optimizer"]["sparsity_exponent"], config["schedule"]["decay_fraction"]) == (0.0, 0.0)


def test_overrides_win_over_a_recipe():
    """Whatever their order, and for every layer of the model."""
    given = ["model.gate_init_std=0.5", "optimizer.rates.gates=3", "batch.words=7", "model=moe_256_h"]
    for overrides in ([*given, "recipe=small_batch"], ["recipe=small_batch", *given]):
        config = config_of(*overrides)
        assert config["model"]["layers"]["middle"]["gate_init_std"] == 0.5
        assert (config["optimizer"]["rates"]["gates"], config["batch"]["words"]) == (3.0, 7)
        assert config["optimizer"]["rates"]["experts"] == 2.0
        assert config["model"]["layers"]["middle"]["output_activation"] == "none"


def readme_line():
    """The README's command that trains on one's own text."""
    [line] = re.findall(r"^moe-lm (train corpus=text .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return shlex.split(line)


def test_the_readme_line_learns(trained_once, tmp_path, monkeypatch, moe_lm):
    """Shortened to 26,000 words, it ends far below the unigram model and is validated on the way and at the end.

    Each word of the text has four successors, so a perplexity of 4 to 6 is the best there is; the unigram has 41.8.
    """
    (tmp_path / "text").symlink_to(trained_once / "text")
    monkeypatch.chdir(tmp_path)
    command, *overrides = with_overrides(readme_line(), *SHORT.split())
    outcome = moe_lm(command, *overrides)
    assert outcome.code == 0, outcome.err
    assert "WARNING" not in outcome.err
    assert "203 updates of 128 words, warm-up 20" in outcome.err
    result = json.loads(Path("runs/news/result.json").read_text())
    assert result["perplexity"]["test"] < 41.8 / 4
    lines = [json.loads(line) for line in Path("runs/news/metrics.jsonl").read_text().splitlines()]
    validated = [line["step"] for line in lines if line.get("split") == "valid"]
    assert len(validated) >= 10
    assert validated[-1] == result["steps"]
    assert moe_lm("evaluate", "run=runs/news", "checkpoint=best").code == 0


def test_a_warm_up_that_outlasts_the_training_is_told(trained_once, tmp_path, monkeypatch, moe_lm):
    (tmp_path / "text").symlink_to(trained_once / "text")
    monkeypatch.chdir(tmp_path)
    outcome = moe_lm("train", *with_overrides(list(TRAINING), "schedule.warmup_steps=1000"))
    assert outcome.code == 0
    assert "WARNING: the warm-up of 1,000 updates outlasts this training of 11: schedule.max_warmup_f" in outcome.err


@pytest.mark.parametrize("override", ["schedule.decay_fraction=0.3", "schedule.max_warmup_fraction=0.1", "noise"])
def test_a_run_laid_out_for_its_length_cannot_grow(trained_once, tmp_path, monkeypatch, moe_lm, override):
    """Its earlier learning rates, or its noise, would have been others; the run stays as it is."""
    (tmp_path / "text").symlink_to(trained_once / "text")
    monkeypatch.chdir(tmp_path)
    chosen = override if "=" in override else "model.layers.middle.gate.noise_schedule=linear"
    arguments = with_overrides(list(TRAINING), chosen, "training.num_words=600")
    assert moe_lm("train", *arguments).code == 0
    before = Path("runs/tiny/result.json").read_bytes()
    outcome = moe_lm("train", *with_overrides(arguments, "training.num_words=900"))
    assert outcome.code == 2
    assert "laid out for them: to train on, choose another name=... and init_from=runs/tiny" in outcome.err
    assert Path("runs/tiny/result.json").read_bytes() == before


@pytest.mark.parametrize("gate", ["noisy_top_k model.layers.middle.gate.noise_schedule=linear", "hash balance=[]"])
def test_a_stopped_run_resumes_exactly(trainer, gate):
    """Rates of groups, final decay and falling noise depend on the update alone: two halves make the whole."""
    recipe = ["recipe=small_batch", "schedule.warmup_steps=3", f"gate@model.layers.middle.gate={gate}"]
    overrides = [part for text in recipe for part in text.split()]
    whole = trainer(torch.device("cpu"), *overrides)
    assert whole.train()
    steps = whole.progress.step
    shutil.rmtree("runs")

    first = trainer(torch.device("cpu"), *overrides)
    stops = iter([False] * (steps // 2) + [True] * steps)
    assert not first.train(lambda: next(stops))
    second = trainer(torch.device("cpu"), *overrides)
    assert second.resume()
    assert 0 < second.progress.step < steps
    assert second.train()
    assert second.progress.step == steps
    for (name, one), (_, two) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name
