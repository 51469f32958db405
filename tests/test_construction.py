"""construction.build returns the same objects as Hydra's instantiate, from packaged configs only."""

import copy
import functools

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from moe_lm import config_files
from moe_lm.cli.config import composed, resolved
from moe_lm.config_files import choices
from moe_lm.construction import build, build_model
from moe_lm.errors import UserError

LSTM = {"_target_": "moe_lm.model.lstm.Lstm", "width": 4}
MOE = {
    "_target_": "moe_lm.model.moe.MoE",
    "width": 4,
    "hidden": 4,
    "num_experts": 2,
    "k": 1,
    "gate": {"_target_": "moe_lm.gate.noisy_top_k.NoisyTopK", "_partial_": True, "noise_epsilon": 0.5},
}


def shapes(module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("preset", choices("model"))
def test_every_preset_builds_as_hydra_instantiates_it(preset):
    config = resolved(composed("train", [f"model={preset}"]))
    with torch.device("meta"):
        model = build_model(config, 100)
        layers = {
            name: instantiate(OmegaConf.create(config["model"]["layers"][name]), _convert_="all")
            for name in config["model"]["order"]
        }
    assert list(model.layers) == list(layers)
    for name, layer in layers.items():
        assert type(model.layers[name]) is type(layer)
        assert shapes(model.layers[name]) == shapes(layer)
        assert repr(model.layers[name]) == repr(layer)


def test_partial_parts_inside_a_part():
    layer = build(MOE)
    assert layer.gate.noise_epsilon == 0.5
    partial = build(MOE["gate"])
    assert isinstance(partial, functools.partial)
    assert partial.keywords == {"noise_epsilon": 0.5}
    assert type(build({**LSTM, "_partial_": False})) is type(build(LSTM))


def test_plain_data_are_copied_and_lists_are_searched(monkeypatch):
    seen = {}
    monkeypatch.setattr("moe_lm.model.lstm.Lstm", lambda **arguments: seen.update(arguments))
    config = {"_target_": "moe_lm.model.lstm.Lstm", "data": {"a": [1, {"b": None}]}, "parts": [MOE["gate"], "text"]}
    before = copy.deepcopy(config)
    build(config)
    assert seen["data"] == {"a": [1, {"b": None}]}
    assert seen["data"]["a"] is not config["data"]["a"]
    assert isinstance(seen["parts"][0], functools.partial)
    assert seen["parts"][1] == "text"
    assert config == before


def raising(error: Exception):
    def constructor(**arguments):
        raise error

    return constructor


@pytest.mark.parametrize("error", [UserError("width=0: mend it"), RuntimeError("out of memory"), MemoryError()])
def test_an_error_of_the_constructor_is_raised_unchanged(monkeypatch, error):
    monkeypatch.setattr("moe_lm.model.lstm.Lstm", raising(error))
    with pytest.raises(type(error)) as caught:
        build(LSTM)
    assert caught.value is error


def test_a_value_error_keeps_its_message(monkeypatch):
    monkeypatch.setattr("moe_lm.model.lstm.Lstm", raising(ValueError("width=0: must be at least 1")))
    with pytest.raises(UserError, match=r"^width=0: must be at least 1$"):
        build(LSTM)


@pytest.mark.parametrize("error", [TypeError("two\nlines"), KeyError("key"), ZeroDivisionError(), OSError(2, "gone")])
def test_any_other_exception_is_an_error_of_one_line(monkeypatch, error):
    monkeypatch.setattr("moe_lm.model.lstm.Lstm", raising(error))
    with pytest.raises(UserError, match=r"^cannot build moe_lm\.model\.lstm\.Lstm: .+$") as caught:
        build(LSTM)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "part",
    [
        {**LSTM, "_partial_": "true"},
        {**LSTM, "_partial_": 1},
        {**LSTM, "_args_": [3]},
        {**LSTM, "_recursive_": False},
        {**LSTM, "width": "${oc.env:HOME}"},
        {**LSTM, "width": {"_target_": "os.getcwd"}},
        {**LSTM, "width": [[{"_target_": "os.getcwd"}]]},
    ],
    ids=str,
)
def test_a_part_that_could_run_other_code_is_refused(part):
    with pytest.raises(UserError, match="refused"):
        build(part)


@pytest.mark.parametrize("part", [{}, {"width": 3}, None, [LSTM], "moe_lm.model.lstm.Lstm"], ids=str)
def test_a_part_needs_a_target(part):
    with pytest.raises(UserError, match="no _target_"):
        build(part)


@pytest.mark.parametrize("arguments", [{}, {"widht": 3}, {"width": "many"}, {3: 4}], ids=str)
def test_wrong_arguments_are_an_error(arguments):
    with pytest.raises(UserError, match=r"^cannot build moe_lm\.model\.lstm\.Lstm: "):
        build({"_target_": "moe_lm.model.lstm.Lstm", **arguments})


def test_the_configuration_is_found():
    assert (config_files.folder() / "train.yaml").is_file()
