"""Sinkhorn gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import naive
import pytest
import torch

from moe_lm.gate.sinkhorn import Sinkhorn

SIZES = [(0, 4, 2), (1, 1, 1), (2, 4, 2), (30, 6, 2), (40, 5, 1), (9, 5, 4), (9, 3, 3), (3, 16, 2)]
"""Tokens, experts and experts a token."""
ROUNDS = [(1e-4, 100), (1e-30, 1), (1e-30, 3), (1e9, 100), (0.3, 100)]
"""Tolerance and largest number of rounds: to the end, one or three rounds, one by the tolerance, and a few."""
ROWS = [9, 0, 14, 2]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, k, tolerance=1e-4, max_iterations=100, num_groups=None, width=5, **cast):
    """A gate with a random matrix whose first expert is the best for most of the tokens below."""
    sizes = {"width": width, "num_experts": num_experts, "k": k, "num_groups": num_groups}
    gate = Sinkhorn(**sizes, tolerance=tolerance, max_iterations=max_iterations)
    with torch.no_grad():
        naive.randomized(gate).gate_DE[..., 0, 0] += 2
    return gate.to(cast.get("dtype", torch.float64)).train(cast.get("train", True))


def lopsided(num_tokens, dtype=torch.float64):
    """Random tokens most of which the gate above sends to its first expert."""
    x_TD = naive.tokens(num_tokens, dtype=dtype)
    x_TD[:, 0] += 1
    return x_TD


def weights(k_TE, tolerance, max_iterations):
    """Return d1 and the number of rounds, from the table K = exp(logits) of floats."""
    num_tokens, num_experts = len(k_TE), len(k_TE[0])
    d1, rounds, change = [1.0] * num_experts, 0, math.inf
    while rounds < max_iterations and change >= tolerance:
        d0 = [1 / num_tokens / sum(row[i] * d1[i] for i in range(num_experts)) for row in k_TE]
        new = [1 / num_experts / sum(k_TE[t][i] * d0[t] for t in range(num_tokens)) for i in range(num_experts)]
        change = sum(abs(a - b) for a, b in zip(new, d1, strict=True)) / num_experts
        d1, rounds = new, rounds + 1
    return d1, rounds


def by_hand(x_TD, w_DE, k, tolerance, max_iterations, train):
    """Return the table of gate values and the sums."""
    num_experts = w_DE.shape[1]
    logit = [naive.logits(x_D, w_DE) for x_D in x_TD]
    k_TE = [[math.exp(z.item()) for z in row] for row in logit]
    d1 = weights(k_TE, tolerance, max_iterations)[0] if train and k_TE else [1.0] * num_experts
    rows, log_z_squared = [], naive.ZERO
    for z, k_E in zip(logit, k_TE, strict=True):
        total = sum(value.exp() for value in z)
        chosen = sorted(range(num_experts), key=lambda i: -d1[i] * k_E[i])[:k]
        gate = [1 / (1 + (-value).exp()) if k == 1 else value.exp() / total for value in z]
        rows.append([gate[i] if i in chosen else naive.ZERO for i in range(num_experts)])
        log_z_squared = log_z_squared + total.log() ** 2
    num_tokens = torch.tensor(float(len(x_TD))).double()
    return naive.stacked(rows, num_experts), {"log_z_squared": log_z_squared, "num_tokens": num_tokens}


def reference(gate, x_TD, grouped, *options):
    """What the loops give: of the whole, or of each group's rows with its matrix."""
    if grouped:
        return naive.in_groups(by_hand, [x_TD.split(ROWS), gate.gate_DE], *options)
    return by_hand(x_TD, gate.gate_DE, *options)


@naive.each("train", [True, False])
@naive.each("rounds", ROUNDS)
@naive.each(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, rounds, train):
    """Choice, gates, importance, load and sums are those of the loops; evaluation takes the k largest logits."""
    gate, x_TD = make(num_experts, k, *rounds, train=train), lopsided(num_tokens)
    naive.check(gate(x_TD), *reference(gate, x_TD, False, k, *rounds, train), k * num_tokens, train)


def test_the_rounds_of_the_tests_differ():
    """One round, a few and all of them choose differently, so that the tests above see when the loop ends."""
    x_TD = lopsided(400)
    gate = make(5, 1)
    k_TE = (x_TD @ gate.gate_DE).exp().tolist()
    assert weights(k_TE, 1e-30, 1)[1] < weights(k_TE, 0.3, 100)[1] < weights(k_TE, 1e-4, 100)[1] < 100
    choices = []
    for rounds in [*ROUNDS[:3], ROUNDS[4]]:
        gating = make(5, 1, *rounds)(x_TD)
        naive.check(gating, *by_hand(x_TD, gate.gate_DE, 1, *rounds, True), 400, True)
        choices.append(gating.expert_A[gating.token_A.argsort()].tolist())
    assert len(set(map(tuple, choices))) == 4


@naive.each("train", [True, False])
@naive.each("rounds", ROUNDS)
@naive.each(("num_experts", "k"), [(5, 1), (5, 2), (4, 4), (1, 1), (16, 3)])
def test_groups_follow_the_equations_each_by_itself(num_experts, k, rounds, train):
    """Each group's rows and experts are balanced by themselves, and stop by themselves."""
    gate, x_TD = make(num_experts, k, *rounds, num_groups=4, train=train), lopsided(sum(ROWS))
    naive.check(gate(x_TD, GROUP), *reference(gate, x_TD, True, k, *rounds, train), k * len(x_TD), train)


@naive.each("what", ["gate", "importance", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each(("num_experts", "k"), [(5, 2), (5, 1), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g equal those of the loops, where the choice is a constant."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), lopsided(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP if grouped else None)
    want = reference(gate, x_TD, grouped, k, 1e-4, 100, True)
    naive.check_gradients(what, gating, *want, (x_TD, gate.gate_DE))


def test_by_hand_on_paper():
    """Four tokens of K = (4, 1), (3, 1), (3, 2), (1, 2): one round moves the third from expert 0 to expert 1.

    d0 = 1/20, 1/16, 1/20, 1/12, so expert 0's sum is 0.6208 and expert 1's 0.3792: d1_1 / d1_0 = 1.637, above 3/2.
    Gate values are e^z / (1 + e^z): 4/5 and 3/4, then 2/3 of expert 1 twice.
    """
    logit_TE = torch.tensor([[4.0, 1.0], [3.0, 1.0], [3.0, 2.0], [1.0, 2.0]]).double().log()
    gate = naive.reading_logits(make(2, 1, 1e-4, 1, width=2))
    gating = gate(logit_TE)
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 0, 1, 1], [0, 1, 2, 3])
    assert gating.gate_A.tolist() == pytest.approx([4 / 5, 3 / 4, 2 / 3, 2 / 3])
    plain = gate.eval()(logit_TE)
    assert (plain.expert_A.tolist(), plain.token_A.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 3])
    assert plain.gate_A.tolist() == pytest.approx([4 / 5, 3 / 4, 3 / 4, 2 / 3])


@naive.each("k", [1, 2])
def test_training_spreads_what_evaluation_crowds(k):
    """Plain top-k gives one expert more than 1.7 times its share, training none more than 1.35 times."""
    gate, x_TD = make(8, k, 1e-6, 500), lopsided(2000)
    share = k * 2000 / 8
    assert gate(x_TD).load_E.max() < 1.35 * share
    assert gate.eval()(x_TD).load_E.max() > 1.7 * share


@naive.each("rounds", ROUNDS)
@naive.each("k", [1, 2])
def test_a_token_alone_gets_k_experts(k, rounds):
    """Balance over one token makes all experts equal, d1 K d0 = 1/E, so any k will do, with the gates of theirs."""
    gate, x_TD = make(4, k, *rounds), lopsided(1)
    gating, logit_E = gate(x_TD), (x_TD @ gate.gate_DE)[0]
    assert gating.token_A.tolist() == [0] * k
    gate_E = logit_E.sigmoid() if k == 1 else logit_E.softmax(dim=0)
    torch.testing.assert_close(gating.gate_A, gate_E[gating.expert_A])


@naive.each("scale", [300, 3000])
@naive.each("k", [1, 2])
def test_large_logits_leave_a_choice(scale, k):
    """Logits whose exponentials overflow still give k experts a token, and finite gates and gradients."""
    gate, x_TD = make(6, k, dtype=torch.float32), (lopsided(30, dtype=torch.float32) * scale).requires_grad_()
    gating = gate(x_TD)
    assert torch.bincount(gating.token_A, minlength=30).tolist() == [k] * 30
    assert gating.gate_A.isfinite().all()
    (gating.gate_A.square().sum() + gating.sums["log_z_squared"]).backward()
    assert x_TD.grad.isfinite().all()
    assert gate.gate_DE.grad.isfinite().all()
