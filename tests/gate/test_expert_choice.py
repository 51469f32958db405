"""Expert-choice gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math
from fractions import Fraction
from itertools import chain

import pytest
import torch

from moe_lm.gate.expert_choice import ExpertChoice
from moe_lm.mistake import Mistake

SIZES = [(0, 4, 2, None), (1, 1, 1, None), (1, 4, 2, None), (30, 6, 2, None), (9, 5, 1, None), (9, 3, 3, None)]
SIZES += [(10, 4, 1, None), (3, 16, 2, None), (12, 4, 2, 1.5), (20, 8, 1, 0.5), (9, 4, 1, 4.0)]
"""Tokens, experts, experts a token and capacity factor; the fifth from the end has m = 2.5, so 3."""
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)
SUMS = {"cut_E", "num_cuts_E", "log_z_squared", "num_tokens"}


def make(num_experts, k=1, factor=None, num_groups=None, dtype=torch.float64, train=True, width=5, **options):
    """A gate with a random matrix and the thresholds of one batch, as after some training."""
    gate = ExpertChoice(
        width=width, num_experts=num_experts, k=k, capacity_factor=factor, num_groups=num_groups, **options
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=generator)
    gate = gate.to(dtype).train(train)
    experts = num_experts * (num_groups or 1)
    cut_E = torch.rand(experts, generator=generator, dtype=torch.float64) / num_experts + 0.5 / num_experts
    gate.adapt({"cut_E": cut_E, "num_cuts_E": torch.ones(experts)})
    return gate


def of_logits(num_experts, **options):
    """A new gate whose tokens are the logits."""
    gate = ExpertChoice(width=num_experts, num_experts=num_experts, **options).double()
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(num_experts))
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def by_hand(x_TD, w_DE, threshold_E, c, train):
    """Return the table of gate values, the cuts, their numbers and the sum of squares of log Z."""
    num_tokens, num_experts = len(x_TD), w_DE.shape[1]
    share, log_z_squared = [], ZERO
    for x_D in x_TD:
        e = [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))).exp() for i in range(num_experts)]
        share.append([value / sum(e) for value in e])
        log_z_squared = log_z_squared + sum(e).log() ** 2
    m = min(max(math.floor(Fraction(c) * num_tokens / num_experts + Fraction(1, 2)), 1), num_tokens)
    table = [[ZERO] * num_experts for _ in x_TD]
    cut_E = [0.0] * num_experts
    for i in range(num_experts):
        order = sorted(range(num_tokens), key=lambda j: (-share[j][i].item(), j))
        taken = order[:m] if train else [j for j in order if share[j][i] > threshold_E[i]]
        for j in taken:
            table[j][i] = share[j][i]
        if order:
            cut_E[i] = sum(share[j][i].item() for j in order[m - 1 : m + 1]) / len(order[m - 1 : m + 1])
    rows = [torch.stack(row) for row in table]
    table_TE = torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
    return table_TE, cut_E, [float(num_tokens > 0)] * num_experts, log_z_squared


def by_hand_in_groups(x_TD, w_GDE, threshold_E, c, train):
    """The same for each group's rows, matrix and thresholds: the table has a block for each group."""
    parts = zip(x_TD.split(ROWS), w_GDE, threshold_E.view(len(ROWS), -1), strict=True)
    tables, cuts, numbers, log_z = zip(*(by_hand(*part, c, train) for part in parts), strict=True)
    return torch.block_diag(*tables), [*chain(*cuts)], [*chain(*numbers)], sum(log_z)


def check(gating, table_TE, cut_E, num_cuts_E, log_z_squared, train):
    """Everything in the gating is that of the loops."""
    torch.testing.assert_close(dense(gating), table_TE)
    torch.testing.assert_close(gating.importance_E, table_TE.sum(dim=0))
    assert gating.load_E.tolist() == (table_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_asked == len(gating.token_A) == int((table_TE > 0).sum())
    assert gating.num_dropped == 0
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(gating.sums) == (SUMS if train else set())
    if train:
        assert gating.sums["cut_E"].tolist() == pytest.approx(cut_E, abs=1e-12)
        assert gating.sums["num_cuts_E"].tolist() == num_cuts_E
        assert not gating.sums["cut_E"].requires_grad
        torch.testing.assert_close(gating.sums["log_z_squared"], log_z_squared)
        assert gating.sums["num_tokens"].item() == gating.num_tokens


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k", "factor"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, factor, train):
    """Gates, importance, load, cuts and sums are those of the loops."""
    gate, x_TD = make(num_experts, k, factor, train=train), tokens(num_tokens)
    want = by_hand(x_TD, gate.gate_DE, gate.threshold_E, k if factor is None else factor, train)
    check(gate(x_TD), *want, train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_experts", "k", "factor"), [(5, 2, None), (4, 4, None), (1, 1, None), (6, 1, 1.5)])
def test_groups_follow_the_equations_each_by_itself(num_experts, k, factor, train):
    """Each group's experts take m of its own rows, in evaluation those above their own thresholds."""
    gate, x_TD = make(num_experts, k, factor, num_groups=4, train=train), tokens(sum(ROWS))
    want = by_hand_in_groups(x_TD, gate.gate_DE, gate.threshold_E, k if factor is None else factor, train)
    check(gate(x_TD, GROUP), *want, train)


@pytest.mark.parametrize("what", ["gate", "importance", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gradients_are_those_of_the_equations(what, grouped, k):
    """Gradients to x and W_g equal those of the loops, where the choice is a constant."""
    gate, x_TD = make(5, k, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    reference = by_hand_in_groups if grouped else by_hand
    table_TE, _, _, log_z_squared = reference(x_TD, gate.gate_DE, gate.threshold_E, k, True)
    factor_TE = torch.randn(table_TE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, want = {
        "gate": ((dense(gating) * factor_TE).sum(), (table_TE * factor_TE).sum()),
        "importance": ((gating.importance_E * factor_TE[0]).sum(), (table_TE.sum(dim=0) * factor_TE[0]).sum()),
        "log_z_squared": (gating.sums["log_z_squared"], log_z_squared),
    }[what]
    inputs = (x_TD, gate.gate_DE)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 1e-6


def test_by_hand_on_paper():
    """Four tokens, three experts, m = 1 x 4 / 3, so 1: token 0 is taken twice, tokens 1 and 3 never.

    The cuts are half way to the next: (0.6 + 0.5) / 2, (0.35 + 0.3) / 2, (0.55 + 0.4) / 2. These thresholds let an
    expert take in evaluation what it took in training.
    """
    share_TE = torch.tensor([[0.6, 0.35, 0.05], [0.5, 0.3, 0.2], [0.25, 0.2, 0.55], [0.4, 0.2, 0.4]]).double()
    gate = of_logits(3, k=1)
    gating = gate(share_TE.log())
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 1, 2], [0, 0, 2])
    assert gating.gate_A.tolist() == pytest.approx([0.6, 0.35, 0.55])
    assert gating.sums["cut_E"].tolist() == pytest.approx([0.55, 0.325, 0.475])
    assert gating.sums["num_cuts_E"].tolist() == [1, 1, 1]
    plain = gate.eval()(share_TE.log())  # of thresholds 1/3 yet
    assert (plain.expert_A.tolist(), plain.token_A.tolist()) == ([0, 0, 0, 1, 2, 2], [0, 1, 3, 0, 2, 3])
    gate.adapt({"cut_E": 2 * gating.sums["cut_E"], "num_cuts_E": torch.tensor([2.0, 2.0, 2.0])})
    assert gate.threshold_E.tolist() == pytest.approx([0.55, 0.325, 0.475])
    again = gate(share_TE.log())
    assert (again.expert_A.tolist(), again.token_A.tolist()) == ([0, 1, 2], [0, 0, 2])
    assert again.gate_A.tolist() == pytest.approx([0.6, 0.35, 0.55])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "factor", "m"),
    [
        *[(0, 4, 2, None, 0), (1, 4, 2, None, 1), (12, 4, 2, None, 6), (10, 4, 1, None, 3), (9, 4, 1, None, 2)],
        *[(8, 3, 3, None, 8), (3, 100, 2, None, 1), (8, 4, 1, 0.5, 1), (12, 8, 1, 3.0, 5), (4, 8, 8, 0.1, 1)],
    ],
)
@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
def test_every_expert_takes_m_tokens(num_tokens, num_experts, k, factor, m, equal):
    """m = c T / E, a half upwards, at least 1 and at most T; of equal scores the earlier tokens' are taken."""
    gate = make(num_experts, k, factor)
    gating = gate(torch.ones(num_tokens, 5).double() if equal else tokens(num_tokens))
    assert gating.load_E.tolist() == [m] * num_experts
    assert gating.num_asked == num_experts * m
    if equal:
        assert gating.token_A.tolist() == list(range(m)) * num_experts


def test_thresholds_are_decayed_means_of_the_cuts():
    """After cuts c1, c2, c3 the threshold is (d^2 c1 + d c2 + c3) / (d^2 + d + 1); before any it is 1/E."""
    gate = ExpertChoice(width=3, num_experts=2, k=1, decay=0.5, num_groups=2).double()
    assert gate.threshold_E.tolist() == [0.5] * 4
    assert not gate.threshold_E.requires_grad
    cuts = torch.tensor([[0.2, 0.4, 0.0, 0.9], [0.6, 0.4, 0.0, 0.1], [0.4, 0.8, 0.0, 0.5]]).double()
    for cut_E in cuts:  # the third expert has none; the others' are of three micro-batches each
        gate.adapt({"cut_E": 3 * cut_E, "num_cuts_E": torch.tensor([3.0, 3.0, 0.0, 3.0]), "load_E": torch.zeros(4)})
    want = ((0.25 * cuts[0] + 0.5 * cuts[1] + cuts[2]) / 1.75).tolist()
    want[2] = 0.5
    assert gate.threshold_E.tolist() == pytest.approx(want)
    gate.adapt({"cut_E": torch.zeros(4), "num_cuts_E": torch.zeros(4)})
    assert gate.threshold_E.tolist() == pytest.approx(want)
    other = ExpertChoice(width=3, num_experts=2, k=1, decay=0.5, num_groups=2).double()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.threshold_E, gate.threshold_E)


def test_evaluation_looks_at_one_token_and_training_at_all():
    """In evaluation the first tokens alone are gated as among the others, in training not."""
    gate, x_TD = make(6, 2), tokens(60)
    assert not torch.equal(dense(gate(x_TD))[:20] > 0, dense(gate(x_TD[:20])) > 0)
    gate.eval()
    torch.testing.assert_close(dense(gate(x_TD))[:20], dense(gate(x_TD[:20])))


def test_learnt_thresholds_let_k_experts_through():
    """After 300 batches' cuts, new tokens get k experts on average, and each expert about k / E of them."""
    gate = ExpertChoice(width=5, num_experts=8, k=2, decay=0.98)
    torch.manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_()
    for _ in range(300):
        gate.adapt(gate(torch.randn(400, 5)).sums)
    gating = gate.eval()(torch.randn(40_000, 5))
    assert gating.num_asked / 40_000 == pytest.approx(2, rel=0.02)
    assert (gating.load_E / 40_000 - 2 / 8).abs().max() < 0.0125


def test_autocast_leaves_the_gate_in_float32():
    """Under bfloat16 autocast the gating is bit for bit that of float32, and costs one matrix in any case."""
    gate, x_TD = make(6, 2, dtype=torch.float32), tokens(20, dtype=torch.float32)
    torch.manual_seed(0)
    want = gate(x_TD)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x_TD)
    assert got.gate_A.dtype == torch.float32
    assert torch.equal(dense(got), dense(want))
    assert torch.equal(got.sums["log_z_squared"], want.sums["log_z_squared"])
    assert gate.operations_per_timestep() == 5 * 6


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 5), (0, 1)])
def test_a_wrong_k_is_a_mistake_of_one_line(num_experts, k):
    """More experts a token than there are, or none, is refused."""
    with pytest.raises(Mistake) as caught:
        ExpertChoice(width=3, num_experts=num_experts, k=k)
    assert f"model.k={k}" in str(caught.value)
    assert "\n" not in str(caught.value)
