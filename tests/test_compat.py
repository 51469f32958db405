"""Names of commit 5ce4160: command lines, stored configurations and metrics are read under their current names."""

from pathlib import Path

import pytest
import yaml
from tiny_training import TRAINING, with_overrides

from moe_lm import compat
from moe_lm.cli.config import composed, default_name, resolved
from moe_lm.cli.data import data_folder
from moe_lm.config_files import flatten, packaged_targets

OLD = ["machine.divide_vocabulary=true", "machine.expert_processes=1", "balance.exact=false", "softmax.max_logits=900"]
NEW = ["parallel.vocab=true", "parallel.expert_size=1", "balance.global_batch=false", "softmax.chunk_logits=900"]


def as_stored(config: dict) -> dict:
    """The configuration as 5ce4160 would have stored it."""
    config = compat.stored_targets(config)
    flat = flatten(config)
    for old, new in compat.KEYS.items():
        for key, remove in ((old, False), (new, True)):
            *path, name = key.split(".")
            node = config
            for part in path:
                node = node[part]
            if remove:
                del node[name]
            else:
                node[name] = flat[new]
    del config["parallel"]
    return config


def test_an_old_key_works_and_is_logged_once(capsys):
    assert compat.current_overrides([*OLD, OLD[0], "init=runs/a=b", "training.max_skipped=3", "seed=2", "-m"]) == [
        *NEW,
        NEW[0],
        "init_from=runs/a=b",
        "training.max_skipped_steps=3",
        "seed=2",
        "-m",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "moe-lm: machine.divide_vocabulary is deprecated, use parallel.vocab"
    assert len(lines) == 6


def test_every_current_name_is_a_key():
    assert set(compat.KEYS.values()) <= flatten(resolved(composed("train", []))).keys()
    assert not set(compat.KEYS) & flatten(resolved(composed("train", []))).keys()


def test_only_the_first_process_logs(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert compat.current_overrides(OLD) == NEW
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (["balance.exact=false", "balance.global_batch=false"], "moe_4,balance.exact=false"),
        (["softmax.max_logits=9", "softmax.chunk_logits=9"], "moe_4,softmax.max_logits=9"),
        (["init=a", "init_from=a"], "moe_4,init=a"),
        (["machine.divide_vocabulary=true", "parallel.vocab=true", "training.max_skipped=2"], "moe_4"),
    ],
)
def test_the_default_name_is_that_of_the_old_spelling(spelling, name):
    assert {default_name("moe_4", [override]) for override in spelling} == {name}


def test_a_stored_configuration_is_translated_whole():
    config = resolved(composed("train", []))
    stored = as_stored(config)
    assert "exact" in stored["balance"]
    assert stored["corpus"]["_target_"] == "moe_lm.corpus.sotu.Sotu"
    assert flatten(compat.current_config(stored)).keys() == flatten(config).keys()
    assert {k: v for k, v in flatten(compat.current_config(stored)).items() if "_target_" not in k} == {
        k: v for k, v in flatten(config).items() if "_target_" not in k
    }
    for damaged in ({}, {"machine": 3, "balance": None}, {"parallel": 3, "machine": {"divide_vocabulary": True}}):
        assert isinstance(compat.current_config(damaged), dict)


def test_every_stored_target_has_a_successor():
    """Those of losses and softmaxes are built by test_stored_by_5ce4160."""
    successors = {target for target in compat.TARGETS.values() if not target.startswith("moe_lm.loss.")}
    assert successors <= packaged_targets()


def test_metrics():
    assert compat.current_metrics({"dropped": 0.5, "unserved": 0, "step": 3}) == {
        "dropped_fraction": 0.5,
        "unrouted_fraction": 0,
        "step": 3,
    }


def test_prepared_data_lie_where_5ce4160_put_them():
    """The hash is that of the old spelling: nothing is prepared twice."""
    assert str(data_folder(resolved(composed("prepare", [])))) == "data/sotu-words-efce8ace"


def test_an_old_run_is_resumed_and_evaluated(own_trained, moe_lm):
    file = Path("runs/tiny/config.yaml")
    file.write_text(yaml.safe_dump(as_stored(yaml.safe_load(file.read_text())), sort_keys=False))
    outcome = moe_lm("evaluate", "run=runs/tiny")
    assert outcome.code == 0, outcome.err
    [line] = [line for line in outcome.err.splitlines() if line.startswith("moe-lm: ")]
    assert line.startswith("moe-lm: runs/tiny/config.yaml was written by an earlier version: balance.exact is now")
    outcome = moe_lm("train", *with_overrides(TRAINING, "balance.exact=true", "training.num_words=3000"))
    assert outcome.code == 0, outcome.err
    assert "resumed at step" in outcome.err
    assert "global_batch: true" in file.read_text()
    assert "exact" not in file.read_text()
