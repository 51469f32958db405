"""Recipes: what they set, that an override wins, and that the README's line learns with its recipe."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.cli.config import composed, default_name, resolved
from moe_lm.cli.sweep import jobs_of
from moe_lm.config_files import choices, flatten

ROOT = Path(__file__).parent.parent
DATA = "corpus.train=text/train.txt corpus.valid=text/valid.txt corpus.test=text/test.txt vocabulary.min_count=1"
SHORT = f"{DATA} model.width=32 model.expert_hidden=32 batch.words=128 training.num_words=26_000 machine.threads=1"


def config_of(*overrides):
    return resolved(composed("train", list(overrides)))


def test_every_recipe_sets_existing_keys_only():
    """A misspelt key in a recipe would be a new key that nobody reads; `describe` takes what `train` takes."""
    assert choices("recipe") == ["paper", "small_batch"]
    for command in ("train", "describe"):
        keys = flatten(resolved(composed(command, []))).keys()
        for recipe in choices("recipe"):
            assert flatten(resolved(composed(command, [f"recipe={recipe}"]))).keys() == keys


def test_null_is_taken_whatever_the_recipe_or_the_schedule_says():
    """Keys that may be null by default may be so again."""
    config = config_of("recipe=small_batch", "model.gate_init_std=null", "schedule.max_warmup_fraction=null")
    assert (config["model"]["gate_init_std"], config["schedule"]["max_warmup_fraction"]) == (None, None)
    assert (
        config_of("schedule=constant", "schedule.max_warmup_fraction=null")["schedule"]["max_warmup_fraction"] is None
    )


def test_runs_of_two_recipes_have_two_names():
    """So that they do not take each other's directory, and a grid over recipes works."""
    assert default_name("moe_4", ["recipe=small_batch", "seed=2"]) == "moe_4,recipe=small_batch,seed=2"
    jobs = jobs_of(["model=moe_4", "recipe=paper,small_batch"])
    assert {job.folder.name for job in jobs} == {"moe_4,recipe=paper", "moe_4,recipe=small_batch"}


def test_help_lists_the_keys_of_a_recipe_by_their_names(moe_lm):
    """A recipe sets keys of other groups."""
    text = moe_lm("train", "--help").out
    assert "recipe=small_batch  model.output_activation=none" in text
    assert "recipe.model" not in text


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
    assert "203 updates of 128 words, of which 20 are warm-up" in outcome.err
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
    """A longer run would have had other learning rates, or other noise, from the start; the run stays as it is."""
    (tmp_path / "text").symlink_to(trained_once / "text")
    monkeypatch.chdir(tmp_path)
    chosen = override if "=" in override else "model.layers.middle.gate.noise_schedule=linear"
    arguments = with_overrides(list(TRAINING), chosen, "training.num_words=600")
    assert moe_lm("train", *arguments).code == 0
    before = Path("runs/tiny/result.json").read_bytes()
    outcome = moe_lm("train", *with_overrides(arguments, "training.num_words=900"))
    assert outcome.code == 2
    assert "ends: to train further, choose another name=... and init_from=runs/tiny" in outcome.err
    assert Path("runs/tiny/result.json").read_bytes() == before


def test_another_recipe_is_another_run_and_says_so(own_trained, moe_lm):
    """Even with more words: the stored run, without a schedule that ends, could grow."""
    longer = with_overrides(list(TRAINING), "training.num_words=9000", "recipe=small_batch")
    outcome = moe_lm("train", *longer)
    assert outcome.code == 2
    assert "runs/tiny holds another run: " in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_run_that_grows_forgets_the_validation_at_its_end(trainer):
    """Neither the line nor the best perplexity of a step that an uninterrupted run would not have validated."""
    short = trainer(torch.device("cpu"), "training.num_words=700")
    assert short.train()
    step = short.progress.step
    assert step % 5
    assert short.progress.best["step"] == step
    lines = [json.loads(line) for line in Path("runs/cpu/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "split" in line] == [step]
    longer = trainer(torch.device("cpu"), "training.num_words=1500")
    assert longer.resume()
    assert longer.progress.best is None
    assert longer.train()
    lines = [json.loads(line) for line in Path("runs/cpu/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "split" in line] == [5, longer.progress.step]


def test_the_remaining_time_is_that_of_the_timed_steps(trainer):
    """Nine steps of 200 words in 10 s each, after a slow first one: 12,000 words more take ten minutes."""
    found = trainer(torch.device("cpu"), "training.num_words=14_000")
    said = []
    found._log, found._timed = said.append, [(200, 30.0), *[(200, 10.0)] * 9]
    found.progress.words = 2_000
    found._log_remaining_time(SimpleNamespace(clear=lambda: None))
    assert said == ["about 10 min left at 20 words/s"]


@pytest.mark.parametrize("gate", ["noisy_top_k model.layers.middle.gate.noise_schedule=linear", "hash balance=[]"])
def test_a_stopped_run_resumes_exactly(trainer, gate):
    """Rates of groups, final decay and falling noise depend on the update alone: two halves make the whole."""
    recipe = ["recipe=small_batch", "schedule.warmup_steps=3", f"gate@model.layers.middle.gate={gate}"]
    overrides = [part for text in recipe for part in text.split()]
    whole = trainer(torch.device("cpu"), *overrides)
    assert whole.train()
    steps = whole.progress.step
    assert whole.progress.skipped == 0
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
