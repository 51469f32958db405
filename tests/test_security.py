"""No configuration, stored or given, makes the program call anything outside the packaged targets."""

import re
from pathlib import Path

import pytest
from tiny_run import change
from tiny_training import TRAINING

import moe_lm
from moe_lm.cli import train
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


CONFIG = Path("runs/tiny/config.yaml")
MIDDLE = ("model", "layers", "middle")
PLACES = [MIDDLE, (*MIDDLE, "gate"), ("vocabulary",), ("corpus",), ("optimizer",), ("balance", "load")]
TAMPERED = [
    (("name",), "${oc.env:HOME}"),
    (("model", "order"), ["${oc.env:HOME}"]),
    ((*MIDDLE, "_args_"), ["touch canary"]),
    ((*MIDDLE, "_recursive_"), False),
    ((*MIDDLE, "gate", "_partial_"), "os.system"),
    (("extra",), {"_target_": "os.system", "command": "touch canary"}),
    (("extra",), [[{"_target_": "os.system", "command": "touch canary"}]]),
    ((*MIDDLE, "hidden"), {"_target_": "os.system", "command": "touch canary"}),
    ((*MIDDLE, "hidden"), "many"),
    (MIDDLE, {}),
    (("model", "layers"), {}),
    (("vocabulary",), {}),
    (("vocabulary",), {"_target_": "moe_lm.model.lstm.Lstm", "width": 3}),
    (("corpus",), {"_target_": "moe_lm.model.lstm.Lstm", "width": 3}),
    (("softmax",), {"_target_": "moe_lm.optim.schedule.InverseSquareRoot", "warmup_steps": 3}),
    (MIDDLE, {"_target_": "moe_lm.loss.objective.load.Load", "weight": 3}),
    (("model", "order"), 3),
    (("model", "order"), [["lower"]]),
    (("model", "width"), None),
]
TAGS = ["!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system", "!x 3"]
OVERRIDES = [
    "model.layers.middle._target_=os.system",
    "model.layers.middle._target_=moe_lm.train.trainer.torch.load",
    "model.layers.middle.gate._target_=moe_lm.run.os.system",
    "vocabulary._target_=builtins.eval",
    "balance.load._target_=os.system",
    "+model.layers.middle._args_=[a]",
    "model.width={_target_: os.system, command: touch canary}",
    "vocabulary.max_size={_target_: os.system, command: touch canary}",
]


def refused_in_python(function, what: object) -> None:
    line = "not refused"
    try:
        function()
    except UserError as error:
        line = str(error)
    assert len(line.splitlines()) == 1, what
    assert line != "not refused", what
    assert not Path("canary").exists(), what


def test_a_stored_target_that_is_not_packaged_is_refused(own_trained):
    sound = CONFIG.read_text()
    for place, target in [(MIDDLE, target) for target in FOREIGN] + [(place, "os.system") for place in PLACES]:
        CONFIG.write_text(sound)
        change(*place, value={"_target_": target, **ARGUMENTS})
        refused_in_python(lambda: moe_lm.load("runs/tiny"), (place, target))


def test_a_stored_configuration_that_was_tampered_with_is_refused(own_trained):
    sound = CONFIG.read_text()
    for place, value in TAMPERED:
        CONFIG.write_text(sound)
        change(*place, value=value)
        refused_in_python(lambda: moe_lm.load("runs/tiny"), (place, value))


def test_yaml_tags_are_refused(own_trained):
    sound = CONFIG.read_text()
    for tag in TAGS:
        CONFIG.write_text(f"{sound}extra: {tag}\n")
        refused_in_python(lambda: moe_lm.load("runs/tiny"), tag)


@pytest.mark.parametrize(
    "arguments",
    [["evaluate"], ["score", "text/test.txt"], ["sample"], ["inspect"], ["audit"], ["export", "to=x"]],
    ids=lambda arguments: arguments[0],
)
def test_every_command_refuses_a_stored_target(own_trained, moe_lm, arguments):
    change(*MIDDLE, value={"_target_": "os.system", **ARGUMENTS})
    refused(moe_lm(*arguments, "run=runs/tiny"))


def test_an_override_cannot_name_a_foreign_target(workspace, moe_lm):
    for override in OVERRIDES:
        refused_in_python(lambda override=override: train.main([*TRAINING, override]), override)
    refused(moe_lm("train", *TRAINING, OVERRIDES[0]))
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
