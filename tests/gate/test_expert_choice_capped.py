"""Expert choice with at most b experts a token, against exact solutions of the problem that it states.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math
from itertools import combinations, product

import naive
import numpy as np
import pytest
import torch

from moe_lm.gate import TokenGroups
from moe_lm.gate.capped_choice import transport_plan
from moe_lm.gate.expert_choice import ExpertChoice

# Tokens, experts, experts a token, at most so many, in each case with room for m tokens of every expert.
FEASIBLE = [(3, 3, 2, 2), (4, 4, 1.5, 2), (7, 4, 2, 3), (12, 8, 2, 2), (20, 5, 2, 3), (33, 3, 2, 2), (30, 6, 1, 1)]
FEASIBLE += [(9, 4, 2, 4), (9, 5, 0.5, 1), (2, 6, 1, 3), (1, 3, 2, 3), (0, 3, 1, 2), (40, 8, 2, 3)]


def make(num_experts, c, b, num_groups=None, train=True, width=5, seed=0, scale=1.0, **options):
    """A gate with a random matrix."""
    sizes = {"width": width, "num_experts": num_experts, "num_groups": num_groups}
    gate = ExpertChoice(**sizes, k=1, capacity_factor=c, max_experts=b, **options).double().train(train)
    return naive.randomized(gate, seed, scale)


def of_logits(num_experts, c, b, **options):
    """A gate whose tokens are the logits."""
    return naive.reading_logits(make(num_experts, c, b, width=num_experts, **options))


def taken(gating):
    """Who takes whom, as a table of 0 and 1, tokens by experts."""
    table = torch.zeros(gating.num_tokens, gating.num_experts, dtype=torch.int64)
    return table.index_put((gating.token_A, gating.expert_A), torch.ones_like(gating.token_A))


def tokens_of_each(num_tokens, num_experts, c):
    return min(max(int(c * num_tokens / num_experts + 0.5), 1), num_tokens)


def root(is_low, size):
    """Where `is_low`, true on the left and false on the right, changes, for each of several numbers."""
    low, high = np.full(size, -50.0), np.full(size, 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        left = is_low(middle)
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    return (low + high) / 2


def optimum(score_ET, m, b, weight):
    """Return A (E, T) by ascent on the multipliers of the sums, one block after the other; its gap proves it.

    Stationarity: A = min(1, exp((S - u_i - v_j) / weight)), u free, v >= 0. A dual value bounds every feasible A's.
    """
    u_E, v_T = np.zeros(len(score_ET)), np.zeros(len(score_ET[0]))

    def plan(u_E, v_T):
        return np.exp(np.minimum((score_ET - u_E[:, None] - v_T) / weight, 0))

    for _ in range(700):
        u_E = root(lambda u, v_T=v_T: plan(u, v_T).sum(axis=1) > m, len(u_E))
        v_T = np.maximum(root(lambda v, u_E=u_E: plan(u_E, v).sum(axis=0) > b, len(v_T)), 0)
        a_ET = plan(u_E, v_T)
        if abs(a_ET.sum(axis=1) - m).max() < 1e-9:
            break
    entropy = -(a_ET * np.log(np.maximum(a_ET, 1e-300))).sum()
    value = (score_ET * a_ET).sum() + weight * entropy
    price_ET = score_ET - (u_E - weight)[:, None] - v_T
    bound = (price_ET * a_ET).sum() + weight * entropy + m * (u_E - weight).sum() + b * v_T.sum()
    assert abs(bound - value) < 1e-4
    assert abs(a_ET.sum(axis=1) - m).max() < 1e-3
    assert a_ET.sum(axis=0).max() < b + 1e-6
    return a_ET


@naive.each("seed", range(2))
@naive.each(
    ("num_tokens", "num_experts", "c", "b", "weight", "scale"),
    [(8, 4, 2, 2, 0.1, 1), (8, 4, 2, 3, 0.1, 3), (12, 4, 1, 1, 0.1, 3), (9, 3, 1, 2, 0.3, 5), (20, 5, 2, 3, 0.02, 5)],
)
def test_the_plan_is_the_optimum(num_tokens, num_experts, c, b, weight, scale, seed):
    """Dykstra's projections arrive at the maximum of <S, A> + weight H(A), where the caps and A <= 1 matter."""
    score_TE = (naive.tokens(num_tokens, num_experts, seed) * scale).softmax(dim=1)
    m = tokens_of_each(num_tokens, num_experts, c)
    want_ET = optimum(score_TE.t().numpy(), m, b, weight)
    groups = TokenGroups(num_tokens, num_experts)
    got_TE = transport_plan(score_TE, float(c), b, groups, entropy_weight=weight, max_iterations=20_000)
    torch.testing.assert_close(got_TE.t(), torch.from_numpy(want_ET), rtol=0, atol=5e-3)


@naive.each("seed", range(2))
@naive.each(("num_experts", "c", "b", "weight"), [(4, 2, 2, 0.05), (5, 2, 3, 0.02), (4, 1, 1, 0.1)])
def test_experts_take_the_m_largest_of_the_plan(num_experts, c, b, weight, seed):
    """Where the exact plan's m largest are clear and nobody has more than b, they are the choice; gates stay S."""
    num_tokens, m = 20, tokens_of_each(20, num_experts, c)
    gate = of_logits(num_experts, c, b, entropy_weight=weight, max_iterations=20_000)
    logit_TE = naive.tokens(num_tokens, num_experts, seed) * 2
    share_TE = logit_TE.softmax(dim=1)
    a_ET = optimum(share_TE.t().numpy(), m, b, weight)
    order_ET = np.argsort(-a_ET, axis=1)
    chosen_TE = np.zeros((num_tokens, num_experts), dtype=int)
    for i in range(num_experts):
        chosen_TE[order_ET[i, :m], i] = 1
    gating = gate(logit_TE)
    clear_E = a_ET[range(num_experts), order_ET[:, m - 1]] - a_ET[range(num_experts), order_ET[:, m]] > 0.02
    fits_T, got_TE = chosen_TE.sum(axis=1) <= b, taken(gating).numpy()
    if fits_T.all():
        assert (got_TE == chosen_TE)[:, clear_E].all()
    # A token asked by too many keeps b of those that asked, so it has at least as many as it may have.
    assert (got_TE.sum(axis=1)[~fits_T] == b).all()
    torch.testing.assert_close(gating.gate_A, share_TE[gating.token_A, gating.expert_A])


@naive.each(("num_tokens", "num_experts", "m", "b"), [(3, 3, 1, 1), (4, 4, 2, 2), (6, 3, 4, 2), (4, 3, 2, 2)])
def test_a_small_weight_gives_the_best_choice(num_tokens, num_experts, m, b):
    """With little entropy the chosen scores sum to the largest sum of all choices that the caps allow."""
    checked = 0
    for seed in range(6):
        share_TE = (naive.tokens(num_tokens, num_experts, seed) * 2).softmax(dim=1)
        share, values = share_TE.tolist(), []
        for picks in product(combinations(range(num_tokens), m), repeat=num_experts):
            if max(sum(j in pick for pick in picks) for j in range(num_tokens)) <= b:
                values.append(sum(share[j][i] for i, pick in enumerate(picks) for j in pick))
        best, second = sorted(values, reverse=True)[:2]
        if best - second >= 0.03:  # else two choices are about as good
            gate = of_logits(num_experts, m * num_experts / num_tokens, b, entropy_weight=0.003, max_iterations=5000)
            assert gate(share_TE.log()).gate_A.sum().item() == pytest.approx(best)
            checked += 1
    assert checked >= 2


def test_by_hand_on_paper():
    """Three tokens, three experts, one each: token 0 goes to expert 1 though expert 0 scores it higher.

    Expert 0 with token 0 and expert 1 with token 1 have 0.5 + 0.3, the other way round 0.4 + 0.45.
    """
    share_TE = torch.tensor([[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.4, 0.1, 0.5]]).double()
    logit_TE = share_TE.log().requires_grad_()
    gate = of_logits(3, 1, 1, entropy_weight=0.01, max_iterations=1000)
    gating = gate(logit_TE)
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 1, 2], [1, 0, 2])
    assert gating.gate_A.tolist() == pytest.approx([0.4, 0.45, 0.5])
    assert (gating.num_requested, gating.num_dropped) == (3, 0)
    gating.gate_A[0].backward()  # 0.4 (1 - 0.4), -0.4 x 0.3 and -0.4 x 0.3: the choice is a constant
    assert logit_TE.grad[1].tolist() == pytest.approx([0.24, -0.12, -0.12])
    assert logit_TE.grad[[0, 2]].abs().max() == 0


def test_the_load_above_is_that_of_the_limited_rule():
    """What thresholds follow is what evaluation would take: of a token's experts above theirs the b best."""
    gate, x_TD = make(4, 2, 2, entropy_weight=0.01), naive.tokens(24)
    gate.log_threshold_E.fill_(math.log(0.05))
    gating = gate(x_TD)
    assert torch.equal(gating.sums["above_E"], gate.eval()(x_TD).load_E)
    assert gating.sums["above_E"].sum() < ((x_TD @ gate.gate_DE).softmax(dim=1) > 0.05).sum()
    assert gating.sums["share_E"].tolist() == [12] * 4


INPUTS = list(product((0, 0.01, 1, 10, 100), (1, 100)))
"""Scale of the logits and most iterations: equal to peaked scores, projections that converge or hardly begin."""


@naive.each(("scale", "iterations"), INPUTS)
@naive.each(("num_tokens", "num_experts", "c", "b"), FEASIBLE)
def test_every_expert_has_m_tokens_and_no_token_more_than_b_experts(num_tokens, num_experts, c, b, scale, iterations):
    """Exactly m of each expert, with the raw scores as gates, and at most b of each token, as there is room."""
    m = tokens_of_each(num_tokens, num_experts, c)
    assert num_experts * m <= min(b, num_experts) * num_tokens
    for seed in range(5):
        gate = make(num_experts, c, b, seed=seed, scale=scale, max_iterations=iterations)
        x_TD = naive.tokens(num_tokens, seed=seed + 10)
        gating = gate(x_TD)
        assert gating.load_E.tolist() == [m] * num_experts
        assert gating.num_requested == len(gating.token_A) == num_experts * m
        assert gating.num_dropped == 0
        share_TE = (x_TD @ gate.gate_DE).softmax(dim=1)
        torch.testing.assert_close(gating.gate_A, share_TE[gating.token_A, gating.expert_A])
        assert all(count <= b for count in taken(gating).sum(dim=1).tolist())


def test_groups_are_capped_each_by_itself():
    """A group's experts take what the flat gate takes of the group's rows alone."""
    rows = [7, 0, 12, 2]
    grouped = make(4, 2, 3, num_groups=4, entropy_weight=0.05)
    x_TD = naive.tokens(sum(rows))
    gating = grouped(x_TD, naive.groups(rows))
    tables, above = [], []
    for g, part_TD in enumerate(x_TD.split(rows)):
        flat = make(4, 2, 3, entropy_weight=0.05)
        with torch.no_grad():
            flat.gate_DE.copy_(grouped.gate_DE[g])
        alone = flat(part_TD)
        tables.append(taken(alone))
        above.append(alone.sums["above_E"])
    assert torch.equal(taken(gating), torch.block_diag(*tables))
    assert torch.equal(gating.sums["above_E"], torch.cat(above))
    # m = 2 * tokens / 4 of 7, 0, 12 and 2 rows: 3.5 upwards, none, 6 and 1.
    assert gating.sums["share_E"].tolist() == [4] * 4 + [0] * 4 + [6] * 4 + [1] * 4


def test_evaluation_is_capped_too():
    """Where a token passes more than b thresholds, 1/4 here, the b experts with its largest scores take it."""
    gate = of_logits(4, 1, 2).eval()
    share_TE = torch.tensor([[0.3, 0.26, 0.28, 0.16], [0.9, 0.05, 0.03, 0.02], [0.1, 0.4, 0.1, 0.4]]).double()
    gating = gate(share_TE.log())
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 0, 1, 2, 3], [0, 1, 2, 0, 2])
    assert gating.gate_A.tolist() == pytest.approx([0.3, 0.9, 0.4, 0.28, 0.4])
    assert gating.num_requested - gating.num_dropped == 5


def test_a_cap_that_binds_nobody_changes_nothing():
    """With b = E and little entropy the choice is that without a cap: the m largest scores."""
    x_TD = naive.tokens(30)
    plain, capped = make(6, 2, None), make(6, 2, 6)
    assert torch.equal(taken(plain(x_TD)), taken(capped(x_TD)))


@naive.each(("c", "b"), [(2, 1), (1.5, 1), (3.0, 2)])
def test_a_cap_below_the_average_is_a_mistake_of_one_line(c, b):
    """No token can have fewer experts at most than all have on average."""
    with pytest.raises(ValueError, match="max_experts") as caught:
        make(4, c, b)
    assert "\n" not in str(caught.value)
