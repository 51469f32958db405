"""Both levels' gating as one: what a group's gate sees, what is dropped, and what the load of Appendix B estimates.

Shape suffixes: T tokens, D width, G groups, E experts of all groups, R rows sent to groups, A assignments, N draws.
"""

import math

import pytest
import torch
from hierarchical_layer import GATE, make, replayed, sentences, tokens
from made import Made

from moe_lm.gate import Gating
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.loss.objective import Batchwise
from moe_lm.model.hierarchical_moe import HierarchicalGating
from moe_lm.ops.token_dispatch import dispatch


def test_the_load_teaches_the_primary_gate_too():
    """Load_H has gradients to both gates' matrices; Load_i(X^(i))_j alone, which the paper rejects, has none above."""
    layer = make(4, 4, 2)
    _, gating, *_ = replayed(layer, tokens(30))
    matrices = tuple(layer.primary_gate.parameters()) + tuple(layer.gate.parameters())
    grads = torch.autograd.grad(gating.load_E.square().sum(), matrices, retain_graph=True)
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    alone = gating.parts["secondary_load_E"].square().sum()
    first, _, second, _ = torch.autograd.grad(alone, matrices, allow_unused=True)
    assert first is None
    assert second.abs().max() > 1e-3


@pytest.mark.parametrize("secondary", [GATE, StrictlyBalanced], ids=["noisy", "balanced"])
def test_a_groups_gate_sees_only_what_it_is_sent(secondary):
    """It gets the rows of its group's tokens, ascending, and no other token has a part in its load or weights."""
    layer, x_TD = make(4, 3, 2, gate=secondary), tokens(12).requires_grad_()
    seen = []
    layer.gate.register_forward_hook(lambda module, given, gating: seen.extend([*given, gating]))
    _, gating, *_ = replayed(layer, x_TD)
    rows_RD, group_R, _, second = seen
    for i in range(4):
        sent = gating.token_A[gating.expert_A // 3 == i]
        received = [t for t in range(12) if any(torch.equal(x_TD[t], row) for row in rows_RD[group_R == i])]
        assert torch.equal(rows_RD[group_R == i], x_TD[received])
        assert len(received) == gating.parts["num_received_G"][i]
        assert set(sent.tolist()) <= set(received)
        mine = second.gate_A[second.expert_A // 3 == i].square().sum() + second.load_E.view(4, 3)[i].square().sum()
        (grad_TD,) = torch.autograd.grad(mine, x_TD, retain_graph=True)
        assert not grad_TD[[t for t in range(12) if t not in received]].any()
        assert grad_TD[received].any()


@pytest.mark.parametrize("gate", [GATE, StrictlyBalanced], ids=["noisy", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["unpadded", "padded"])
def test_gating_takes_as_many_operators_for_31_groups_as_for_4(dtype, gate):
    """Forward and backward of both levels dispatch the same operators whatever the number of groups."""
    counts = []
    for groups in (4, 31):  # from 32 choices on the noisy choice has another way to find the largest
        layer, x_TD = make(groups, 4, 2, dtype=dtype, gate=gate), tokens(100, dtype).requires_grad_()
        with Made() as made:
            gating = gating_of(layer, x_TD, layer.primary_gate(x_TD))
            parts = (gating.gate_A, gating.importance_E, gating.load_E)
            sum(part.square().sum() for part in parts).backward()
        assert layer.gate.gate_DE.grad.any()
        counts.append(made.calls)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) < 400


def test_a_row_that_the_primary_gate_drops_loses_k_assignments():
    """Drops of both levels are counted in assignments, and the rest of the list is joined as ever."""
    primary = Gating(
        token_A=torch.tensor([0, 2, 1]),
        expert_A=torch.tensor([0, 0, 1]),
        gate_A=torch.tensor([0.5, 0.25, 0.125]),
        num_tokens=3,
        importance_E=torch.tensor([0.75, 0.125]),
        load_E=torch.tensor([3.0, 1.0]),
        num_requested=6,
        num_dropped=3,
        sums={"log_z": torch.tensor(1.0), "above": torch.tensor(5.0)},
    )
    secondary = Gating(
        token_A=torch.tensor([0, 1, 1, 2]),
        expert_A=torch.tensor([0, 0, 1, 3]),
        gate_A=torch.tensor([1.0, 0.5, 0.5, 1.0]),
        num_tokens=3,
        importance_E=torch.tensor([1.5, 0.5, 0.0, 1.0]),
        load_E=torch.tensor([1.0, 2.0, 0.0, 4.0]),
        num_requested=6,
        num_dropped=2,
        sums={"log_z": torch.tensor(10.0), "below": torch.tensor(7.0)},
    )
    gating = HierarchicalGating.of_levels(primary, secondary, 2)
    assert (gating.num_requested, gating.num_dropped, len(gating.expert_A)) == (12, 8, 4)
    assert gating.token_A.tolist() == [0, 2, 2, 1]
    assert gating.gate_A.tolist() == [0.5, 0.125, 0.125, 0.125]
    assert gating.importance_E.tolist() == [0.625, 0.125, 0.0, 0.125]
    assert gating.load_E.tolist() == [1.5, 3.0, 0.0, 4.0]  # 3 / 2 * (1, 2) and 1 / 1 * (0, 4)
    sums = {name: value.tolist() for name, value in gating.sums.items()}
    assert {name: sums[name] for name in ("log_z", "above", "below")} == {"log_z": 11.0, "above": 5.0, "below": 7.0}
    assert "load_E" not in gating.statistics()  # which is not additive


def hard_count(gating):
    return torch.bincount(gating.expert_A, minlength=gating.num_experts).double()


def assert_averages_zero(gap_NX):
    """The mean of the draws is within four standard errors of 0."""
    error_X = gap_NX.std(dim=0) / math.sqrt(len(gap_NX))
    assert (gap_NX.mean(dim=0).abs() < 4 * error_X).all()
    assert (error_X < 0.5).all()


def gating_of(layer, x_TD, primary):
    """The joined gating of one draw, without the experts' work."""
    return HierarchicalGating.of_levels(primary, layer.gate(dispatch(x_TD, primary.token_A), primary.expert_A), layer.k)


@torch.no_grad()
def test_load_estimates_the_hard_count_of_what_the_primary_gate_sent():
    """For one primary choice, mean load * |X^(i)| / Load_primary_i is each expert's mean number of tokens."""
    layer, x_TD = make(4, 4, 2), tokens(12)
    torch.manual_seed(0)
    primary = layer.primary_gate(x_TD)
    ratio_E = (hard_count(primary) / primary.load_E).repeat_interleave(4)
    assert (ratio_E - 1).abs().max() > 0.1  # else the factor of eq. 14 would not show
    gatings = [gating_of(layer, x_TD, primary) for _ in range(300)]
    assert_averages_zero(torch.stack([gating.load_E * ratio_E - hard_count(gating) for gating in gatings]))


@torch.no_grad()
def test_load_of_a_group_estimates_the_hard_count_of_all_draws():
    """With both levels drawn again, a group's load minus its tokens' assignments averages 0, as no group is empty."""
    layer, x_TD = make(3, 4, 2), tokens(40)
    torch.manual_seed(0)
    gatings = [gating_of(layer, x_TD, layer.primary_gate(x_TD)) for _ in range(300)]
    assert all(gating.parts["num_received_G"].all() for gating in gatings)
    assert_averages_zero(
        torch.stack([(gating.load_E - hard_count(gating)).view(3, 4).sum(dim=1) for gating in gatings])
    )


@torch.no_grad()
def test_a_group_without_tokens_has_no_load():
    """Eq. 14 is biased by construction: one token between two equal groups gives each 1/3, not the chance 1/2.

    The group's chance P is uniform on (0, 1) over the noise, and counts only if the token goes there: E[P^2] = 1/3.
    """
    layer, x_TD = make(2, 2, 1), tokens(1)
    layer.primary_gate.gate_DE.zero_()
    layer.primary_gate.noise_DE.zero_()
    torch.manual_seed(0)
    gatings = [gating_of(layer, x_TD, layer.primary_gate(x_TD)) for _ in range(600)]
    load_NG = torch.stack([gating.load_E.view(2, 2).sum(dim=1) for gating in gatings])
    error_G = load_NG.std(dim=0) / math.sqrt(len(gatings))
    assert ((load_NG.mean(dim=0) - 1 / 3).abs() < 4 * error_G).all()
    assert (error_G < 0.03).all()


@pytest.mark.parametrize(
    ("first", "second", "tokens_of_loss"), [(StrictlyBalanced, GATE, 30), (GATE, StrictlyBalanced, 60)]
)
def test_the_thresholds_loss_is_a_mean_over_their_own_tokens(first, second, tokens_of_loss):
    """30 tokens at the primary level, at the secondary the 60 rows of 2 groups each; the other level has no part."""
    layer = make(4, 3, 2, primary_gate=first, gate=second)
    gating = layer(tokens(30), sentences(30))[1]
    level = "primary" if first is StrictlyBalanced else "secondary"
    want = gating.parts[f"{level}_threshold_gap"] / tokens_of_loss
    torch.testing.assert_close(Batchwise(weight=1.0)(gating), want)
