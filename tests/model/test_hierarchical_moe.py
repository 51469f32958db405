"""The hierarchical mixture of experts against the double sum of Appendix B, written out as loops.

Shape suffixes: T tokens, D width, G groups, E experts (of a group or of all), R rows sent to groups, A assignments.
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hierarchical_layer import GATE, HIDDEN, WIDTH, by_hand, make, replayed, sentences, tokens
from omegaconf import OmegaConf

from moe_lm.cli.machine import build
from moe_lm.config_files import folder
from moe_lm.loss.objective import Batchwise
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.moe import MoE

GATES = sorted(path.stem for path in (folder() / "gate").glob("*.yaml"))


def partial_of(name):
    """A gate as its YAML describes it, for the layer to complete."""
    return build(OmegaConf.to_container(OmegaConf.load(folder() / "gate" / f"{name}.yaml")))


# tokens, groups, experts of a group, k; with everything chosen at one level or at both, and groups without tokens
CASES = [
    (0, 2, 3, 1),
    (1, 2, 3, 2),
    (2, 4, 4, 2),
    (40, 4, 4, 2),
    (40, 2, 3, 1),
    (15, 4, 4, 3),
    (12, 3, 2, 2),
    (12, 2, 4, 2),
    (10, 3, 3, 3),
    (5, 16, 4, 2),
    (9, 1, 4, 1),
    (9, 4, 1, 1),
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "groups", "experts", "k"), CASES)
def test_layer_is_the_double_sum(num_tokens, groups, experts, k, train):
    """Output, importance, load, and the gradients of each to x and every parameter, are those of eq. 12-14."""
    layer, x_TD = make(groups, experts, k, train=train), tokens(num_tokens).requires_grad_()
    y_TD, gating, noise_TG, noise_RE = replayed(layer, x_TD)
    inputs = (x_TD, *layer.parameters())
    found = (y_TD, gating.importance_E, gating.load_E)
    for got, want in zip(found, by_hand(layer, x_TD, noise_TG, noise_RE), strict=True):
        torch.testing.assert_close(got, want)
        factor = torch.randn(want.shape, dtype=want.dtype)
        grads = [
            torch.autograd.grad((part * factor).sum(), inputs, retain_graph=True, materialize_grads=True)
            if part.requires_grad
            else [torch.zeros_like(p) for p in inputs]
            for part in (got, want)
        ]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert_k_experts_in_each_of_k_groups(gating, num_tokens, experts, k)
    assert (gating.num_tokens, gating.num_dropped, gating.num_experts) == (num_tokens, 0, groups * experts)


def assert_k_experts_in_each_of_k_groups(gating, num_tokens, experts, k):
    """The list ascends by expert and then token, none twice; k * k experts a token, whose weights sum to 1."""
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert len(pairs) == gating.num_requested == num_tokens * k * k
    for token in range(num_tokens):
        per_group = Counter(expert // experts for expert, t in pairs if t == token)
        assert list(per_group.values()) == [k] * k
        assert gating.gate_A[gating.token_A == token].sum().item() == pytest.approx(1, abs=1e-12)


def test_the_parameters_are_the_gates_and_the_experts():
    names = [name for name, _ in make(4, 4, 2).named_parameters()]
    gates = ["primary_gate.gate_DE", "primary_gate.noise_DE", "gate.gate_DE", "gate.noise_DE"]
    assert names == [*gates, "experts.w1_EDH", "experts.w2_EHD"]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_group_is_the_flat_layer(k, train):
    """One group gives the flat layer's output, gating and gradients, for the same noise."""
    layer, x_TD = make(1, 5, k, 1, train=train), tokens(25).requires_grad_()
    flat = MoE(width=WIDTH, hidden=HIDDEN, num_experts=5, k=k, gate=GATE).double().train(train)
    with torch.no_grad():
        flat.gate.gate_DE.copy_(layer.gate.gate_DE[0])
        flat.gate.noise_DE.copy_(layer.gate.noise_DE[0])
        flat.experts.load_state_dict(layer.experts.state_dict())
    torch.manual_seed(3)
    if train:
        torch.randn(25, 1, dtype=torch.float64)  # what the primary gate draws
    want = flat(x_TD, sentences(25))
    torch.manual_seed(3)
    got = layer(x_TD, sentences(25))
    grads = []
    for (y_TD, gating), model in ((got, layer), (want, flat)):
        total = (y_TD.square().sum() + gating.load_E.square().sum()) + gating.importance_E.square().sum()
        wanted = (x_TD, model.gate.gate_DE, model.gate.noise_DE, *model.experts.parameters())
        grads.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    torch.testing.assert_close(got[0], want[0])
    assert_same_gating(got[1], want[1])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs)


def assert_same_gating(got, want):
    """All the numbers of two gatings agree."""
    assert got.token_A.tolist() == want.token_A.tolist()
    assert got.expert_A.tolist() == want.expert_A.tolist()
    for name in ("gate_A", "importance_E", "load_E"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    for name in ("num_tokens", "num_requested", "num_dropped", "num_experts"):
        assert getattr(got, name) == getattr(want, name)


def test_autocast_leaves_the_gating_in_float32():
    """Under bfloat16 autocast both levels' gating is bit for bit that of float32."""
    layer, x_TD = make(4, 4, 2, dtype=torch.float32), tokens(20, torch.float32)
    _, plain, *_ = replayed(layer, x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast, *_ = replayed(layer, x_TD)
    assert torch.equal(cast.expert_A, plain.expert_A)
    for name in ("gate_A", "importance_E", "load_E"):
        assert getattr(cast, name).dtype == torch.float32
        assert torch.equal(getattr(cast, name), getattr(plain, name))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_any_gate_may_stand_at_either_level(train):
    """The output is the sum of the list's weighted experts, and its numbers agree, whatever the gates."""
    gates = {name: partial_of(name) for name in GATES}
    for names in product(GATES, repeat=2):
        first, second = (gates[name] for name in names)
        ks = [getattr(gate.func, "only_k", None) or 2 for gate in (second, first)]
        layer, x_TD = make(4, 3, *ks, train=train, primary_gate=first, gate=second), tokens(20).requires_grad_()
        y_TD, gating = layer(x_TD, replace(sentences(20), input_T=torch.arange(20)))
        assert len(gating.expert_A) == gating.num_requested - gating.num_dropped, names
        rows_AD = x_TD[gating.token_A].unsqueeze(1)
        hidden_AH = (rows_AD @ layer.experts.w1_EDH[gating.expert_A]).clamp(min=0)
        answer_AD = gating.gate_A.unsqueeze(1) * (hidden_AH @ layer.experts.w2_EHD[gating.expert_A]).squeeze(1)
        answers_TD = torch.zeros_like(x_TD).index_add(0, gating.token_A, answer_AD)
        torch.testing.assert_close(y_TD, answers_TD.sigmoid(), msg=lambda text, names=names: f"{names}: {text}")
        if "strictly_balanced" in names and train:
            Batchwise(weight=1.0)(gating).backward()
            thresholds = [p for name, p in layer.named_parameters() if "threshold" in name]
            assert thresholds, names
            assert all(p.grad.isfinite().all() for p in thresholds), names
        if not train:
            counted_E = torch.bincount(gating.expert_A, minlength=12).double()
            torch.testing.assert_close(gating.load_E, counted_E, msg=lambda text, names=names: f"{names}: {text}")


def test_operations_are_the_primary_gate_k_gates_and_k_times_k_experts():
    """Table 7's MoE-256-h: 16 x 16 experts of 1024, 2 and 2 chosen, 4.19 M in the experts and 0.05 M in the gates."""
    with torch.device("meta"):
        layer = HierarchicalMoE(
            width=512, hidden=1024, num_experts=256, num_groups=16, k=2, primary_gate=GATE, gate=GATE
        )
    assert layer.operations_per_timestep() == 4 * 2 * 512 * 1024 + 3 * 2 * 512 * 16
    assert sum(p.numel() for p in layer.parameters()) == 256 * 2 * 512 * 1024 + 17 * 2 * 512 * 16


SIZES = {"width": 4, "hidden": 4, "num_experts": 6, "num_groups": 2, "k": 2, "primary_gate": GATE, "gate": GATE}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"width": 0}, "model.width=0"),
        ({"hidden": 0}, "model.expert_hidden=0"),
        ({"num_experts": 0}, "model.num_experts=0"),
        ({"num_groups": -2}, "model.num_groups=-2"),
        ({"num_experts": 7}, "model.num_experts=7: must be a multiple of model.num_groups=2"),
        ({"k": 0}, "model.k=0"),
        ({"k": 3}, "model.k=3 at each level"),
        ({"k": 3, "primary_k": 3}, "model.k=3"),
        ({"k": 1, "primary_k": 3}, "model.k=1 and primary_k=3"),
        ({"num_groups": 3, "k": 3}, "2 experts of a group"),
    ],
)
def test_wrong_sizes_are_mistakes(wrong, named):
    """Sizes below one, groups of unequal size, or more than there is at either level, are refused in one line."""
    with pytest.raises(ValueError, match=named) as caught:
        HierarchicalMoE(**SIZES | wrong)
    assert "\n" not in str(caught.value)
