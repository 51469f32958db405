"""Every file of configs/ composes, builds and is read; layers can be swapped, inserted and left out by override."""

import ast
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class

import moe_lm
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.cli.type_check import OPTIONAL
from moe_lm.config_files import choices, flatten, folder
from moe_lm.run import IDENTITY

COMMANDS = sorted(path.stem for path in folder().glob("*.yaml"))
# Groups whose choices are parts of a training, and the override that selects a choice.
PLACES = {
    "corpus": "corpus={}",
    "vocabulary": "vocabulary={}",
    "softmax": "softmax={}",
    "optimizer": "optimizer={}",
    "schedule": "schedule={}",
    "balance": "balance=[{}]",
    "layer": "layer@model.layers.middle={}",
    "gate": "gate@model.layers.middle.gate={}",
}
PARTS = [(group, choice) for group in PLACES for choice in choices(group)]
# Further overrides that a choice needs.
NEEDS = {"hierarchical_moe": ["model.num_groups=2", "model.k=2"]}
# Constructor arguments that are known only when the model is built.
RUNTIME = {
    "gate": {"width", "num_experts", "k", "num_groups", "init_std", "temperature", "noise_scale"},
    "softmax": {"width", "vocabulary_size", "held"},
}


def config_of(*overrides: str) -> dict:
    return resolved(composed("train", list(overrides)))


def model_of(*overrides: str):
    with torch.device("meta"):
        return build_model(config_of(*overrides), vocabulary_size=1000)


@cache
def node_of(group: str, choice: str) -> dict:
    """The part of a composed configuration that a choice sets."""
    together = ",".join(choices(group)) if group == "balance" else choice
    config = config_of(PLACES[group].format(together), *NEEDS.get(choice, []))
    if group == "layer":
        return config["model"]["layers"]["middle"]
    if group == "gate":
        return config["model"]["layers"]["middle"]["gate"]
    return config["balance"][choice] if group == "balance" else config[group]


def kinds_of(model) -> list[str]:
    return [type(layer).__name__ for layer in model.layers.values()]


def test_every_group_is_tested():
    groups = {path.name for path in folder().iterdir() if path.is_dir()}
    assert groups - {"model", "recipe", "study"} == set(PLACES)


def test_presets_set_nothing_inside_their_layers():
    """Otherwise a swapped layer would inherit keys that it does not know."""
    for name in choices("model"):
        preset = yaml.safe_load((folder() / "model" / f"{name}.yaml").read_text())
        assert "layers" not in preset, name
        assert not [key for key in preset if "." in key], name


@pytest.mark.parametrize(("group", "choice"), PARTS)
def test_every_choice_composes_and_builds(group, choice):
    node = node_of(group, choice)
    with torch.device("meta"):
        part = build(node)
        if group in ("gate", "softmax"):
            only_k = getattr(part.func, "only_k", None)
            sizes = dict.fromkeys(RUNTIME[group] - {"held"}, 8)
            part(**sizes | ({"k": only_k} if only_k else {}))


@pytest.mark.parametrize(("group", "choice"), PARTS)
def test_every_key_of_a_choice_is_an_argument_that_is_read(group, choice):
    node = node_of(group, choice)
    constructor = get_class(node["_target_"]).__init__
    parameters = inspect.signature(constructor).parameters.values()
    arguments = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
    assert node.keys() - {"_target_", "_partial_"} == arguments - RUNTIME.get(group, set())
    assert bool(node.get("_partial_")) == (group in ("gate", "softmax"))
    source = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    read = {n.id for n in ast.walk(source) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert arguments <= read


def test_every_key_of_a_command_is_read_by_the_source():
    source = "\n".join(path.read_text() for path in Path(moe_lm.__file__).parent.rglob("*.py"))
    files = [(folder() / f"{command}.yaml").read_text() for command in COMMANDS]
    for key in {key for file in files for key in flatten(yaml.safe_load(file))}:
        last = key.split(".")[-1]
        if key != "defaults":
            assert re.search(rf"""["']{last}["']|^    {last}: (int|float|bool)$""", source, re.MULTILINE), key


def test_every_key_with_a_null_default_has_a_type():
    nulls = set()
    for command in COMMANDS:
        nulls |= {
            key
            for key, value in flatten(yaml.safe_load((folder() / f"{command}.yaml").read_text())).items()
            if value is None
        }
    for group, choice in PARTS:
        nulls |= {f"{group}.{key}" for key, value in node_of(group, choice).items() if value is None}
    assert nulls == OPTIONAL.keys()


def test_more_experts():
    model = model_of("model.num_experts=64")
    assert model.layers["middle"].experts.w1_EDH.shape == (64, 512, 1024)
    assert model.layers["middle"].gate.gate_DE.shape == (512, 64)


def test_width_reaches_every_layer():
    model = model_of("model.width=32", "model.expert_hidden=48")
    assert {p.shape[-1] for name, p in model.named_parameters() if "w2" in name or "embedding" in name} == {32}
    assert model.layers["middle"].experts.w1_EDH.shape == (4, 32, 48)
    assert model.layers["lower"].lstm.weight_hh_l0.shape == (128, 32)


def test_another_layer_in_the_middle():
    model = model_of("layer@model.layers.middle=feed_forward", "model.expert_hidden=4096")
    assert kinds_of(model) == ["Lstm", "FeedForward", "Lstm"]
    assert [tuple(w.shape) for w in model.layers["middle"].weights] == [(512, 4096), (4096, 512)]


def test_a_mixture_in_a_dense_preset():
    model = model_of("model=moe_1_wide", "layer@model.layers.middle=moe", "model.num_experts=8", "model.k=2")
    assert kinds_of(model) == ["Lstm", "MoE", "Lstm"]
    assert model.layers["middle"].experts.w1_EDH.shape == (8, 512, 4096)


def test_another_gate():
    overrides = ["gate@model.layers.middle.gate=noisy_top_k", "model.layers.middle.gate.noise_epsilon=0.5"]
    assert model_of(*overrides).layers["middle"].gate.noise_epsilon == 0.5


def test_an_inserted_layer():
    model = model_of("model.order=[lower,extra,middle,upper]", "+layer@model.layers.extra=lstm")
    assert list(model.layers) == ["lower", "extra", "middle", "upper"]
    assert kinds_of(model) == ["Lstm", "Lstm", "MoE", "Lstm"]


def test_an_inserted_mixture_has_a_gate_of_its_own():
    model = model_of("model.order=[lower,middle,extra,upper]", "+layer@model.layers.extra=moe")
    assert model.layers["extra"].gate is not model.layers["middle"].gate
    assert kinds_of(model) == ["Lstm", "MoE", "MoE", "Lstm"]


def test_a_name_left_out_of_the_order_removes_the_layer():
    assert kinds_of(model_of("model.order=[lower,upper]")) == ["Lstm", "Lstm"]
    assert kinds_of(model_of("model.order=[]")) == []
    assert kinds_of(model_of("model.order=middle")) == ["MoE"]


def test_layers_in_another_order():
    assert kinds_of(model_of("model.order=[middle,lower,upper]")) == ["MoE", "Lstm", "Lstm"]


def test_balance_losses_are_chosen_and_weighted():
    assert config_of("balance=[importance]")["balance"].keys() == {"importance", "global_batch"}
    assert config_of("balance=[]")["balance"].keys() == {"global_batch"}
    assert config_of("balance.load.weight=0.01")["balance"]["load"]["weight"] == 0.01
    assert config_of("balance.load.weight=1")["balance"]["load"]["weight"] == 1.0


def test_values_are_converted_to_the_type_of_their_key():
    config = config_of("training.num_words=1e6", "corpus=text", "corpus.train=news.txt", "schedule.warmup_steps=10")
    assert config["training"]["num_words"] == 1_000_000
    assert isinstance(config["training"]["num_words"], int)
    assert config["corpus"]["train"] == ["news.txt"]
    assert resolved(composed("evaluate", ["run=x", "checkpoint=0000000100"]))["checkpoint"] in ("100", "0000000100")


def test_micro_words_follow_words():
    assert config_of("batch.words=100")["batch"]["micro_words"] is None  # train divides the words by the processes


def test_every_group_that_changes_the_result_is_part_of_the_identity():
    config = config_of()
    parts = {key for key, value in config.items() if isinstance(value, dict) and "_target_" in str(value)}
    assert parts <= set(IDENTITY)
