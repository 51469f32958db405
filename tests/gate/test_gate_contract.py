"""What every gate under configs/gate promises, found by its YAML; a new gate is tested by being there.

Shape suffixes: T tokens, D width, E experts, A assignments, G groups.
"""

import inspect
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import moe_lm
from moe_lm.cli.config import folder
from moe_lm.cli.machine import build

WIDTH = 6
GATES = sorted(path.stem for path in (folder() / "gate").glob("*.yaml"))


def partial_of(name):
    """The gate as its YAML describes it, for the layer to complete."""
    return build(OmegaConf.to_container(OmegaConf.load(folder() / "gate" / f"{name}.yaml")))


BY_EXPERT = {"expert_choice", "strictly_balanced"}
"""Gates whose experts choose tokens; of all others the tokens choose experts."""
GROUPED = [name for name in GATES if "num_groups" in inspect.signature(partial_of(name).func).parameters]
"""Gates that can be the second level of a hierarchical mixture."""


def make(name, num_experts, train, **groups):
    """A gate with random parameters (a new gate's may all be zero), adapted to a batch where it adapts."""
    gate = partial_of(name)(width=WIDTH, num_experts=num_experts, k=k_of(name, num_experts), **groups).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    if hasattr(gate, "adapt"):
        x_TD, num_groups = tokens(40, seed=3), groups.get("num_groups", 1)
        group_T = torch.arange(num_groups).repeat_interleave(-(-40 // num_groups))[:40]
        gate.adapt((gate(x_TD, group_T) if groups else gate(x_TD)).statistics())
    return gate.train(train)


def k_of(name, num_experts):
    """Two experts a token, or as many as the gate is defined for."""
    return min(getattr(partial_of(name).func, "only_k", None) or 2, num_experts)


def tokens(num_tokens, seed=1):
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_gates_are_found():
    """The folder of configurations is the right one."""
    assert "noisy_top_k" in GATES
    assert {"noisy_top_k", "strictly_balanced"} <= set(GROUPED)


def check(gate, gating, x_TD, num_experts, train):
    """Types, order, ranges, counts and sums of a gating are as `Gating` says; gradients are finite."""
    num_tokens = len(x_TD)
    assert gating.token_A.dtype == gating.expert_A.dtype == torch.int64
    assert gating.gate_A.dtype == gating.importance_E.dtype == gating.load_E.dtype == torch.float32
    assert gating.token_A.shape == gating.expert_A.shape == gating.gate_A.shape
    assert gating.importance_E.shape == gating.load_E.shape == (num_experts,)
    assert (gating.num_tokens, gating.num_experts) == (num_tokens, num_experts)

    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs)), "ascending by expert, then by token, none twice"
    assert all(0 <= expert < num_experts and 0 <= token < num_tokens for expert, token in pairs)
    assert isinstance(gating.num_requested, int)
    assert isinstance(gating.num_dropped, int)
    assert len(pairs) == gating.num_requested - gating.num_dropped
    assert gating.num_dropped >= 0

    importance, count = [0.0] * num_experts, [0] * num_experts
    for (expert, _), value in zip(pairs, gating.gate_A.tolist(), strict=True):
        importance[expert] += value
        count[expert] += 1
    assert gating.gate_A.isfinite().all()
    torch.testing.assert_close(gating.importance_E, torch.tensor(importance), rtol=1e-4, atol=1e-5)
    assert gating.load_E.isfinite().all()
    assert (gating.load_E >= 0).all()
    assert gating.load_E.sum() <= gating.num_tokens * num_experts + 1e-3
    if not train and not gating.num_dropped:
        assert gating.load_E.tolist() == count
    assert all(isinstance(x, torch.Tensor) and x.isfinite().all() for x in gating.sums.values())

    total = gating.gate_A.square().sum() + gating.importance_E.square().sum() + gating.load_E.square().sum()
    if total.requires_grad:
        total.backward()
    for parameter in (x_TD, *gate.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert isinstance(gate.operations_per_timestep(), int)
    assert gate.operations_per_timestep() >= 0


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_tokens", [0, 1, 200])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
@pytest.mark.parametrize("name", GATES)
def test_contract(name, num_experts, num_tokens, train):
    """Types, order, ranges, counts and sums of a gating are as `Gating` says; gradients are finite."""
    gate, x_TD = make(name, num_experts, train), tokens(num_tokens).requires_grad_()
    check(gate, gate(x_TD), x_TD, num_experts, train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_tokens", [0, 1, 200])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
@pytest.mark.parametrize("name", GATES)
def test_assignments_are_as_many_as_asked_for(name, num_experts, num_tokens, train):
    """Token choice: k * T; expert choice in training: E * m, every expert m; kept + dropped = asked."""
    gate, k = make(name, num_experts, train), k_of(name, num_experts)
    gating = gate(tokens(num_tokens))
    counts = torch.bincount(gating.expert_A, minlength=num_experts)
    assert len(gating.token_A) + gating.num_dropped == gating.num_requested
    if name not in BY_EXPERT:
        assert gating.num_requested == k * num_tokens
        assert gating.num_dropped == 0 or (train and name in ("switch", "gshard"))
        if not gating.num_dropped:
            assert torch.bincount(gating.token_A, minlength=num_tokens).tolist() == [k] * num_tokens
    elif train:
        m = min(max(math.floor(k * num_tokens / num_experts + 0.5), 1), num_tokens)
        assert counts.tolist() == [m] * num_experts
        assert gating.num_requested == num_experts * m


@pytest.mark.parametrize("num_experts", [2, 7, 64])
@pytest.mark.parametrize("name", GATES)
def test_evaluation_decides_about_each_token_alone(name, num_experts):
    """In eval mode a batch's choices, importance, load and sums are those of its two parts together."""
    gate, x_TD = make(name, num_experts, train=False), tokens(120)
    whole, parts = gate(x_TD), [gate(x_TD[:50]), gate(x_TD[50:])]
    pairs = {
        (token + offset, expert)
        for part, offset in zip(parts, (0, 50), strict=True)
        for token, expert in zip(part.token_A.tolist(), part.expert_A.tolist(), strict=True)
    }
    assert pairs == set(zip(whole.token_A.tolist(), whole.expert_A.tolist(), strict=True))
    torch.testing.assert_close(whole.importance_E, parts[0].importance_E + parts[1].importance_E)
    torch.testing.assert_close(whole.load_E, parts[0].load_E + parts[1].load_E)
    assert whole.num_requested == parts[0].num_requested + parts[1].num_requested
    assert set(whole.sums) == set(parts[0].sums) == set(parts[1].sums)
    for key, value in whole.sums.items():
        torch.testing.assert_close(value, parts[0].sums[key] + parts[1].sums[key])


# Rows of each group: none, one row, empty groups, one group alone, very unequal ones.
ROWS = [[0, 0, 0], [0, 1, 0], [5, 0, 0, 40], [30], [100, *[2] * 15]]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("name", GROUPED)
def test_contract_with_groups(name, num_experts, rows, train):
    """The contract over all groups' experts; a row is offered the experts of its group alone."""
    num_groups, group_T = len(rows), torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    gate, x_TD = make(name, num_experts, train, num_groups=num_groups), tokens(sum(rows)).requires_grad_()
    gating = gate(x_TD, group_T)
    check(gate, gating, x_TD, num_groups * num_experts, train)
    assert torch.equal(gating.expert_A // num_experts, group_T[gating.token_A])
    assert gate.operations_per_timestep() == make(name, num_experts, train).operations_per_timestep()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_gates_of_their_own(monkeypatch, name, num_experts, rows, train):
    """A group's gate decides, counts and learns as the gate without groups does on the group's rows alone."""
    noise_TE = tokens(sum(rows), seed=2)[:, :1] * torch.linspace(-1, 1, num_experts).double()
    draws = iter([noise_TE, *noise_TE.split(rows)])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    chance_T1 = (noise_TE[:, :1] / 8 + 0.5).clamp(0.01, 0.99)
    chances = iter([chance_T1, *chance_T1.split(rows)])
    monkeypatch.setattr(torch, "rand_like", lambda x: next(chances).expand(-1, 2)[:, 0 if x.dim() == 1 else slice(1)])
    group_T = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    gate, x_TD = make(name, num_experts, train, num_groups=len(rows)).double(), tokens(sum(rows)).double()
    together = gate(x_TD, group_T)
    value_of(together).backward()
    gatings = []
    for g, part_TD in enumerate(x_TD.split(rows)):
        alone = make(name, num_experts, train).double()
        with torch.no_grad():
            for key, value in alone.state_dict().items():
                value.copy_(gate.state_dict()[key].view(len(rows), *value.shape)[g])
        gating, mine = alone(part_TD), together.expert_A // num_experts == g
        value_of(gating).backward()
        gatings.append(gating)
        assert torch.equal(together.expert_A[mine], gating.expert_A + g * num_experts)
        assert torch.equal(together.token_A[mine], gating.token_A + sum(rows[:g]))
        torch.testing.assert_close(together.gate_A[mine], gating.gate_A)
        for key, parameter in alone.named_parameters():
            whole = gate.get_parameter(key)
            assert (whole.grad is None) == (parameter.grad is None)  # in eval mode some have no part in it
            if whole.grad is not None:
                grad = whole.grad.view(len(rows), *parameter.shape)[g]
                assert torch.allclose(grad, parameter.grad, rtol=1e-9, atol=1e-12)
    assert together.num_requested == sum(gating.num_requested for gating in gatings)
    assert together.num_dropped == sum(gating.num_dropped for gating in gatings)
    torch.testing.assert_close(together.importance_E, torch.cat([gating.importance_E for gating in gatings]))
    torch.testing.assert_close(together.load_E, torch.cat([gating.load_E for gating in gatings]))
    assert all(set(together.sums) == set(gating.sums) for gating in gatings)
    for key, value in together.sums.items():
        parts = [gating.sums[key] for gating in gatings]
        torch.testing.assert_close(value, torch.cat(parts) if key.endswith("_E") else sum(parts))


def value_of(gating):
    """A number that depends on every part of a gating and adds up over groups."""
    parts = [gating.gate_A.square(), gating.importance_E.square(), gating.load_E.square()]
    return sum(part.sum() for part in [*parts, *gating.sums.values()])


NEW_GATE = '''"""Every token goes to the first k experts, in equal parts."""

import torch
from torch import nn

from moe_lm.gate import Gating


class FirstK(nn.Module):
    def __init__(self, *, width, num_experts, k, share):
        super().__init__()
        self.num_experts, self.k, self.share = num_experts, k, share

    def forward(self, x_TD):
        expert_A = torch.arange(self.k).repeat_interleave(len(x_TD))
        gate_A = torch.full((len(expert_A),), self.share / self.k)
        zeros_E = torch.zeros(self.num_experts)
        return Gating(
            token_A=torch.arange(len(x_TD)).repeat(self.k),
            expert_A=expert_A,
            gate_A=gate_A,
            num_tokens=len(x_TD),
            importance_E=zeros_E.index_add(0, expert_A, gate_A),
            load_E=zeros_E.index_add(0, expert_A, torch.ones_like(gate_A)),
            num_asked=len(expert_A),
        )

    def operations_per_timestep(self):
        return 0
'''
NEW_YAML = "_target_: moe_lm.gate.first_k.FirstK\n_partial_: true\nshare: 1.0\n"
USE_IT = """
import sys
import pytest
import moe_lm
from moe_lm.data.micro_batch import micro_batch
from moe_lm.cli.machine import build_model
from moe_lm.cli.config import composed, resolved
print("PACKAGE", moe_lm.__file__)
choice = ["gate@model.layers.middle.gate=first_k", "model.layers.middle.gate.share=0.5"]
config = resolved(composed("train", [*choice, "model.width=4", "model.expert_hidden=3", "model.num_experts=6"]))
print("COMPOSED", config["model"]["layers"]["middle"]["gate"])
print("BUILT", type(build_model(config, 11).layers["middle"].gate).__name__)
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "-k", "first_k", "test_gate_contract.py"]))
"""


def test_adding_a_gate_takes_one_module_and_one_yaml(tmp_path):
    """With a module and a YAML dropped in, the contract tests run over the new gate and `train` can choose it."""
    package, here = Path(moe_lm.__file__).parent, Path(__file__)
    shutil.copytree(package, tmp_path / "moe_lm", ignore=shutil.ignore_patterns("__pycache__", "configs"))
    shutil.copytree(folder(), tmp_path / "configs")
    shutil.copy(here, tmp_path / here.name)
    (tmp_path / "moe_lm" / "gate" / "first_k.py").write_text(NEW_GATE, encoding="utf-8")
    (tmp_path / "configs" / "gate" / "first_k.yaml").write_text(NEW_YAML, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE_IT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PACKAGE {tmp_path}" in done.stdout
    assert "'_target_': 'moe_lm.gate.first_k.FirstK'" in done.stdout
    assert "'share': 0.5" in done.stdout
    assert "noise_epsilon" not in done.stdout
    assert "BUILT FirstK" in done.stdout
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line and "[first_k-" in line]
    assert len(passed) == 24 + 24 + 3, done.stdout
