"""A new gate is one module and one YAML: it meets the contract and trains from the command line."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import test_gate_contract as contract
from tiny_training import with_overrides

from moe_lm import config_files
from moe_lm.config_files import choices, folder, packaged_targets

MODULE = '''"""Top-k gating whose weights are sigmoids."""

from moe_lm.gate import Gate


class SigmoidTopK(Gate):
    """G(x)_i = scale * sigmoid(x W_g)_i for the k largest, else 0."""

    differentiable_stats = Gate.differentiable_stats | {"probability_E"}

    def __init__(self, *, scale: float, **sizes: int | None):
        super().__init__(**sizes)
        self.scale = scale

    def choose(self, logit_TE, groups):
        top_TK, expert_TK = logit_TE.topk(self.k, dim=1)
        return self.token_choice(expert_TK, self.scale * top_TK.sigmoid(), logit_TE, groups)
'''
YAML = "_target_: sigmoid_top_k.SigmoidTopK\n_partial_: true\nscale: 1.0\n"


@pytest.fixture
def new_gate(tmp_path, monkeypatch):
    """The module on the path, the YAML in a copy of the configurations that the package then takes for its own."""
    shutil.copytree(folder(), tmp_path / "package/configs")
    (tmp_path / "package/configs/gate/sigmoid_top_k.yaml").write_text(YAML)
    (tmp_path / "sigmoid_top_k.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config_files, "__file__", str(tmp_path / "package/moe_lm/config_files.py"))
    packaged_targets.cache_clear()
    yield "sigmoid_top_k"
    monkeypatch.undo()
    packaged_targets.cache_clear()


TESTS = [test for name, test in vars(contract).items() if name.startswith("test_") and name != "test_gates_are_found"]


def test_a_new_gate_meets_the_contract(new_gate, monkeypatch):
    """Every test of the contract, each of which takes a gate's name."""
    assert new_gate in choices("gate")
    assert len(TESTS) == 12
    for test in TESTS:
        with monkeypatch.context() as own:
            test(name=new_gate, **({"monkeypatch": own} if "monkeypatch" in inspect.signature(test).parameters else {}))


@pytest.mark.parametrize("model", [["model=moe_4"], ["model=moe_256_h", "model.num_groups=2", "model.num_experts=4"]])
def test_a_new_gate_trains_from_the_command_line(workspace, new_gate, moe_lm, training, model):
    """Two steps, flat and hierarchical, with its balance loss, its option and its name in the stored configuration."""
    gate = [f"gate@model.layers.middle.gate={new_gate}", "model.layers.middle.gate.scale=0.5", "balance=[switch]"]
    words = ["training.num_words=300", "training.log_every=1"]
    outcome = moe_lm("train", *with_overrides(training, *model, *gate, *words))
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) >= 2
    assert all(line["balance_switch"] > 0 for line in lines if "split" not in line)
    assert "sigmoid_top_k.SigmoidTopK" in Path("runs/tiny/config.yaml").read_text()
