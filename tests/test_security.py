"""No configuration, stored or given, makes the program call anything outside the packaged targets."""

import re
from pathlib import Path

import pytest
from tiny_run import change
from tiny_training import TRAINING

import moe_lm
from moe_lm.cli.machine import build
from moe_lm.config_files import packaged_targets
from moe_lm.errors import UserError

FOREIGN = [
    "moe_lm.train.trainer.torch.load",
    "moe_lm.run.os.system",
    "moe_lm.checkpoint.checkpoint.os.system",
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.run",
    "moe_lm.model.lstm.Lstm.__init__",
    "moe_lm.model.lstm",
    " moe_lm.model.lstm.Lstm",
    "moe_lm.model.lstm.Lstm\n",
    "MOE_LM.model.lstm.Lstm",
    "moe_lm.layer.lstm",
    " moe_lm.layer.lstm.Lstm",
    "moe_lm.layer.lstm.Lstm\n",
    ["os.system"],
    {"os": "system"},
    None,
    3,
]
ARGUMENTS = {"command": "touch canary", "args": "touch canary", "f": "canary", "source": "open('canary', 'w')"}


def refused(outcome) -> None:
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("moe-lm: ")
    assert "Traceback" not in outcome.err
    assert not Path("canary").exists()


PLACES = [("model", "layers", "middle", "gate"), ("vocabulary",), ("corpus",), ("optimizer",), ("balance", "load")]


@pytest.mark.parametrize(
    ("place", "target"),
    [(("model", "layers", "middle"), target) for target in FOREIGN] + [(place, "os.system") for place in PLACES],
    ids=str,
)
def test_a_stored_target_that_is_not_packaged_is_refused(own_trained, moe_lm, place, target):
    change(*place, value={"_target_": target, **ARGUMENTS})
    refused(moe_lm("evaluate", "run=runs/tiny"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("name",), "${oc.env:HOME}"),
        (("model", "width"), "${oc.env:HOME}"),
        (("model", "order"), ["${oc.env:HOME}"]),
        (("model", "layers", "middle", "_args_"), ["touch canary"]),
        (("model", "layers", "middle", "_recursive_"), False),
        (("model", "layers", "middle", "_convert_"), "none"),
        (("extra",), {"_target_": "os.system", "command": "touch canary"}),
        (("extra",), [[{"_target_": "os.system", "command": "touch canary"}]]),
        (("model", "layers", "middle", "hidden"), {"_target_": "os.system", "command": "touch canary"}),
        (("model", "layers", "middle", "hidden"), "???"),
        (("model", "layers", "middle", "hidden"), "many"),
        (("model", "layers", "middle"), {}),
        (("model", "layers"), {}),
        (("vocabulary",), {}),
        (("vocabulary",), {"_target_": "moe_lm.model.lstm.Lstm", "width": 3}),
        (("corpus",), {"_target_": "moe_lm.model.lstm.Lstm", "width": 3}),
        (("softmax",), {"_target_": "moe_lm.optim.schedule.InverseSquareRoot", "warmup_steps": 3}),
        (("model", "layers", "middle"), {"_target_": "moe_lm.loss.objective.load.Load", "weight": 3}),
        (("model", "order"), 3),
        (("model", "order"), [["lower"]]),
        (("model", "width"), None),
    ],
)
def test_a_stored_configuration_that_was_tampered_with_is_refused(own_trained, moe_lm, place, value):
    change(*place, value=value)
    refused(moe_lm("evaluate", "run=runs/tiny"))
    refused(moe_lm("score", "run=runs/tiny", "text/test.txt"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system", "!x 3"])
def test_yaml_tags_are_refused(own_trained, moe_lm, tag):
    file = Path("runs/tiny/config.yaml")
    file.write_text(file.read_text() + f"extra: {tag}\n")
    refused(moe_lm("evaluate", "run=runs/tiny"))
    refused(moe_lm("score", "run=runs/tiny", "text/test.txt"))


@pytest.mark.parametrize(
    "override",
    [
        "model.layers.middle._target_=os.system",
        "model.layers.middle._target_=moe_lm.train.trainer.torch.load",
        "model.layers.middle.gate._target_=moe_lm.run.os.system",
        "vocabulary._target_=builtins.eval",
        "corpus._target_=os.system",
        "balance.load._target_=os.system",
        "+model.layers.middle._args_=[a]",
        "model.width={_target_: os.system, command: touch canary}",
        "vocabulary.max_size={_target_: os.system, command: touch canary}",
    ],
)
def test_an_override_cannot_name_a_foreign_target(workspace, moe_lm, override):
    refused(moe_lm("train", *TRAINING, override))
    assert not Path("runs").exists()


def test_the_targets_are_those_of_the_packaged_files():
    targets = packaged_targets()
    assert "moe_lm.model.moe.MoE" in targets
    assert packaged_targets("layer") < targets
    assert all(re.fullmatch(r"moe_lm(\.[a-z_0-9]+)+\.[A-Z]\w+", target) for target in targets)


def test_build_refuses_without_running(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in FOREIGN:
        with pytest.raises(UserError, match="refused"):
            build({"_target_": target, **ARGUMENTS})
    assert list(tmp_path.iterdir()) == []


def test_no_source_file_loads_a_pickle_or_runs_text():
    forbidden = re.compile(
        r"torch\.(load|save)\b|\bpickle\b|\bmarshal\b|(?<![\w.])(eval|exec)\(|yaml\.(load|unsafe_load)\("
    )
    for path in Path(moe_lm.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = re.sub(r'""".*?(?:"""|$)|#.*', "", line)
            assert not forbidden.search(code), f"{path}:{number}: {line}"
