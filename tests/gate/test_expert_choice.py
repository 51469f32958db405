"""Expert-choice gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math
from fractions import Fraction

import naive
import pytest
import torch

from moe_lm.gate.expert_choice import ExpertChoice

SIZES = [(0, 4, 2, None), (1, 1, 1, None), (1, 4, 2, None), (30, 6, 2, None), (9, 5, 1, None), (9, 3, 3, None)]
SIZES += [(10, 4, 1, None), (3, 16, 2, None), (12, 4, 2, 1.5), (20, 8, 1, 0.5), (9, 4, 1, 4.0)]
"""Tokens, experts, experts a token and capacity factor; the fifth from the end has m = 2.5, so 3."""
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, k, factor=None, num_groups=None, train=True):
    """A gate with a random matrix and the thresholds of one batch, as after some training."""
    gate = ExpertChoice(width=5, num_experts=num_experts, k=k, capacity_factor=factor, num_groups=num_groups)
    gate = naive.randomized(gate).double().train(train)
    factor_E = torch.rand(len(gate.log_threshold_E), generator=torch.Generator().manual_seed(1)).double() + 0.5
    gate.log_threshold_E += factor_E.log()
    return gate


def by_hand(x_TD, w_DE, threshold_E, c, train):
    """Return the table of gate values and the sums."""
    num_tokens, num_experts = len(x_TD), w_DE.shape[1]
    share, log_z_squared = [], naive.ZERO
    for x_D in x_TD:
        e = [value.exp() for value in naive.logits(x_D, w_DE)]
        share.append([value / sum(e) for value in e])
        log_z_squared = log_z_squared + sum(e).log() ** 2
    m = min(max(math.floor(Fraction(c) * num_tokens / num_experts + Fraction(1, 2)), 1), num_tokens)
    table = [[naive.ZERO] * num_experts for _ in x_TD]
    above_E = [0.0] * num_experts
    for i in range(num_experts):
        order = sorted(range(num_tokens), key=lambda j: (-share[j][i].item(), j))
        above = [j for j in order if share[j][i] > threshold_E[i]]
        above_E[i] = float(len(above))
        for j in order[:m] if train else above:
            table[j][i] = share[j][i]
    counts = {"above_E": above_E, "share_E": [float(m)] * num_experts, "num_tokens": float(num_tokens)}
    sums = {name: torch.tensor(value).double() for name, value in counts.items()}
    return naive.stacked(table, num_experts), {**sums, "log_z_squared": log_z_squared}


def reference(gate, x_TD, c, train, grouped):
    """What the loops give: of the whole, or of each group's rows with its matrix and thresholds."""
    if grouped:
        parts = [x_TD.split(ROWS), gate.gate_DE, gate.threshold_E.view(len(ROWS), -1)]
        return naive.in_groups(by_hand, parts, c, train)
    return by_hand(x_TD, gate.gate_DE, gate.threshold_E, c, train)


@naive.each("train", [True, False])
@naive.each(("num_tokens", "num_experts", "k", "factor"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, factor, train):
    """Gates, importance, load, cuts and sums are those of the loops."""
    gate, x_TD = make(num_experts, k, factor, train=train), naive.tokens(num_tokens)
    table_TE, sums = reference(gate, x_TD, k if factor is None else factor, train, False)
    naive.check(gate(x_TD), table_TE, sums, int((table_TE > 0).sum()), train)


@naive.each("train", [True, False])
@naive.each(("num_experts", "k", "factor"), [(5, 2, None), (4, 4, None), (1, 1, None), (6, 1, 1.5)])
def test_groups_follow_the_equations_each_by_itself(num_experts, k, factor, train):
    """Each group's experts take m of its own rows, in evaluation those above their own thresholds."""
    gate, x_TD = make(num_experts, k, factor, num_groups=4, train=train), naive.tokens(sum(ROWS))
    table_TE, sums = reference(gate, x_TD, k if factor is None else factor, train, True)
    naive.check(gate(x_TD, GROUP), table_TE, sums, int((table_TE > 0).sum()), train)


@naive.each("what", ["gate", "importance", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each("k", [1, 2, 5])
def test_gradients_are_those_of_the_equations(what, grouped, k):
    """Gradients to x and W_g equal those of the loops, where the choice is a constant."""
    gate, x_TD = make(5, k, num_groups=4 if grouped else None), naive.tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP if grouped else None)
    naive.check_gradients(what, gating, *reference(gate, x_TD, k, True, grouped), (x_TD, gate.gate_DE))


def test_by_hand_on_paper():
    """Four tokens, three experts, m = 1 x 4 / 3, so 1: token 0 is taken twice, tokens 1 and 3 never.

    Above the first thresholds of 1/3 lie 3, 1 and 2 tokens: 2, 0 and 1 more than m.
    """
    share_TE = torch.tensor([[0.6, 0.35, 0.05], [0.5, 0.3, 0.2], [0.25, 0.2, 0.55], [0.4, 0.2, 0.4]]).double()
    gate = naive.reading_logits(ExpertChoice(width=3, num_experts=3, k=1, threshold_rate=0.25).double())
    gating = gate(share_TE.log())
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 1, 2], [0, 0, 2])
    assert gating.gate_A.tolist() == pytest.approx([0.6, 0.35, 0.55])
    assert gating.sums["above_E"].tolist() == [3, 1, 2]
    assert gating.sums["share_E"].tolist() == [1, 1, 1]
    plain = gate.eval()(share_TE.log())
    assert (plain.expert_A.tolist(), plain.token_A.tolist()) == ([0, 0, 0, 1, 2, 2], [0, 1, 3, 0, 2, 3])
    gate.adapt(gating.sums)
    e = math.e
    assert gate.threshold_E.tolist() == pytest.approx([e**0.5 / 3, 1 / 3, e**0.25 / 3])
    again = gate(share_TE.log())  # thresholds 0.55, 0.33, 0.43
    assert (again.expert_A.tolist(), again.token_A.tolist()) == ([0, 1, 2], [0, 0, 2])


def test_thresholds_follow_the_load_of_their_own_rule():
    """log threshold += rate * (above - m) / m, at most 0.5 at a time; nothing where there were no tokens."""
    gate = ExpertChoice(width=3, num_experts=2, k=1, threshold_rate=0.2, num_groups=2).double()
    assert gate.threshold_E.tolist() == pytest.approx([0.5] * 4)
    assert not gate.threshold_E.requires_grad
    above_E, share_E = torch.tensor([6.0, 2.0, 0.0, 400.0]).double(), torch.tensor([4.0, 4.0, 0.0, 4.0]).double()
    gate.adapt({"above_E": above_E, "share_E": share_E, "load_E": torch.zeros(4)})
    want = [0.5 * math.exp(x) for x in (0.2 * 0.5, -0.2 * 0.5, 0, 0.5)]
    assert gate.threshold_E.tolist() == pytest.approx(want)
    # The sums of three micro-batches: the same step.
    gate.adapt({"above_E": 3 * share_E, "share_E": 3 * share_E})
    assert gate.threshold_E.tolist() == pytest.approx(want)
    other = ExpertChoice(width=3, num_experts=2, k=1, threshold_rate=0.2, num_groups=2).double()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.threshold_E, gate.threshold_E)


@naive.each("most", [None, 3])
def test_learnt_thresholds_let_k_experts_through(most):
    """After 300 batches new tokens get k experts on average, and each expert k / E of them; also with a limit."""
    gate = ExpertChoice(width=5, num_experts=8, k=2, max_experts=most, max_iterations=2)
    torch.manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_()
    for step in range(300):
        gate.threshold_rate = 0.1 if step < 150 else 0.02
        gate.adapt(gate(torch.randn(400, 5)).sums)
    gating = gate.eval()(torch.randn(40_000, 5))
    assert gating.num_requested / 40_000 == pytest.approx(2, rel=0.03)
    assert (gating.load_E / 40_000 - 2 / 8).abs().max() < 0.02
    assert torch.bincount(gating.token_A).max() <= (most or 8)
