"""Names and paths are taken literally, and a run's default name holds the overrides that change its result."""

import re

import pytest

from moe_lm.cli.config import composed, default_name, preset_of, quoted, resolved


@pytest.mark.parametrize(
    "text", ["a,b=c", "it's", "a 'b' c", "with space", "back\\slash\\", "[x]", "{a: b}", "a#b", "ü"]
)
def test_names_and_paths_are_taken_literally(text):
    assert resolved(composed("train", [f"name={text}"]))["name"] == text
    assert resolved(composed("score", ["run=x", f"file={text}"]))["file"] == text


def test_a_quoted_text_stays_as_hydra_reads_it():
    assert quoted("name='a'") == "name='a'"
    assert resolved(composed("train", ["name=null"]))["name"] is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "moe_4"),
        (["seed=2"], "moe_4,seed=2"),
        (["seed=3", "seed=2"], "moe_4,seed=2"),
        (["model=moe_32", "model.k=2"], "moe_32,model.k=2"),
        (["seed=2", "batch.words=100"], "moe_4,batch.words=100,seed=2"),
        (["training.num_words=10", "machine.device=cpu", "checkpoint.keep_last=1", "logging.wandb=true"], "moe_4"),
        (["runs=elsewhere", "data=elsewhere", "valid.max_sentences=3"], "moe_4"),
        (["balance=[importance]"], "moe_4,balance=[importance]"),
        (["+layer@model.layers.extra=lstm"], "moe_4,layer@model.layers.extra=lstm"),
        (["gate@model.layers.middle.gate=noisy_top_k"], "moe_4,gate@model.layers.middle.gate=noisy_top_k"),
    ],
)
def test_the_default_name_holds_what_changes_the_result(arguments, name):
    assert default_name(preset_of(arguments), arguments) == name


def test_unusual_values_are_hashed_into_a_valid_folder_name():
    names = [
        default_name("moe_4", [f"corpus.train=[{value}]"])
        for value in ("a/b", "a/c", "a b", "a,b", 100 * "x", "../..", "ü/")
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"moe_4,corpus\.train=[0-9a-f]{8}", name) for name in names)
