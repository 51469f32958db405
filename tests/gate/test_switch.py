"""Switch gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import naive
import pytest
import torch

from moe_lm.gate.switch import Switch

JITTER = 0.2
ROWS = [6, 0, 12, 1]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, factor, num_groups=None, jitter=JITTER, train=True, width=5):
    """A gate with a random matrix, as after some training."""
    gate = Switch(
        width=width, num_experts=num_experts, k=1, capacity_factor=factor, jitter=jitter, num_groups=num_groups
    )
    return naive.randomized(gate).double().train(train)


def of_logits(num_experts, factor):
    """A gate without jitter whose tokens are the logits."""
    return naive.reading_logits(make(num_experts, factor, jitter=0.0, width=num_experts))


def drawing(monkeypatch, num_tokens, width=5):
    """Let torch.rand_like give the rows of a table in order; return the table and the list of rows still to come."""
    draw_TD = torch.rand(num_tokens, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left = list(draw_TD)

    def rand_like(x, **_):
        return torch.stack([left.pop(0) for _ in range(len(x))]).to(x.dtype) if len(x) else torch.zeros_like(x)

    monkeypatch.setattr(torch, "rand_like", rand_like)
    return draw_TD, left


def by_hand(x_TD, w_DE, draw_TD, factor, train):
    """Return the table of gate values and the sums."""
    num_tokens, (width, num_experts) = len(x_TD), w_DE.shape
    capacity = max(math.ceil(factor * num_tokens / num_experts), 1) if train else math.inf
    rows, requested_E, probability_E, log_z_squared = [], [0.0] * num_experts, [naive.ZERO] * num_experts, naive.ZERO
    for x_D, draw_D in zip(x_TD, draw_TD, strict=True):
        noise = [1 - JITTER + 2 * JITTER * draw_D[d] if train else 1 for d in range(width)]
        e = [value.exp() for value in naive.logits([noise[d] * x_D[d] for d in range(width)], w_DE)]
        p = [value / sum(e) for value in e]
        best = max(range(num_experts), key=lambda i: p[i].item())
        kept = requested_E[best] < capacity
        rows.append([p[i] if i == best and kept else naive.ZERO for i in range(num_experts)])
        requested_E[best] += 1
        probability_E = [total + value for total, value in zip(probability_E, p, strict=True)]
        log_z_squared = log_z_squared + sum(e).log() ** 2
    return naive.stacked(rows, num_experts), naive.sums_of(
        requested_E, requested_E, probability_E, log_z_squared, num_tokens
    )


def reference(gate, x_TD, draw_TD, factor, train, grouped):
    """What the loops give: over all tokens, or over each group's rows with its matrix and capacity."""
    if grouped:
        return naive.in_groups(by_hand, [x_TD.split(ROWS), gate.gate_DE, draw_TD.split(ROWS)], factor, train)
    return by_hand(x_TD, gate.gate_DE, draw_TD, factor, train)


@naive.each("train", [True, False])
@naive.each("factor", [0.25, 1.0, 1.25, 8.0])
@naive.each(("num_tokens", "num_experts"), [(0, 4), (1, 1), (9, 1), (1, 4), (40, 6), (13, 2), (3, 16)])
def test_gating_follows_the_equations(monkeypatch, num_tokens, num_experts, factor, train):
    """Gates, counts and sums are those of the loops; evaluation has no jitter and drops nothing."""
    gate, x_TD = make(num_experts, factor, train=train), naive.tokens(num_tokens)
    draw_TD, left = drawing(monkeypatch, num_tokens)
    before = x_TD.clone()
    gating = gate(x_TD)
    naive.check(gating, *reference(gate, x_TD, draw_TD, factor, train, False), num_tokens, train)
    assert len(left) == (0 if train else num_tokens)
    assert train or gating.num_dropped == 0
    assert torch.equal(x_TD, before)  # the jitter is for the gate only


@naive.each("train", [True, False])
@naive.each("factor", [0.5, 1.0, 2.0])
@naive.each("num_experts", [1, 2, 5, 14])
def test_groups_follow_the_equations_each_with_its_own_capacity(monkeypatch, num_experts, factor, train):
    """A row chooses among its group's experts, whose places are counted from the rows of that group."""
    gate, x_TD = make(num_experts, factor, num_groups=4, train=train), naive.tokens(sum(ROWS))
    draw_TD, _ = drawing(monkeypatch, len(x_TD))
    naive.check(gate(x_TD, GROUP), *reference(gate, x_TD, draw_TD, factor, train, True), len(x_TD), train)


@naive.each("what", ["gate", "importance", "probability_E", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each("factor", [0.5, 8.0])
def test_gradients_are_those_of_the_equations(monkeypatch, what, grouped, factor):
    """Gradients to x and W_g equal those of the loops, with the jitter that was drawn."""
    gate, x_TD = make(5, factor, num_groups=4 if grouped else None), naive.tokens(sum(ROWS)).requires_grad_()
    draw_TD, _ = drawing(monkeypatch, len(x_TD))
    gating = gate(x_TD, GROUP if grouped else None)
    want = reference(gate, x_TD, draw_TD, factor, True, grouped)
    naive.check_gradients(what, gating, *want, (x_TD, gate.gate_DE))


def test_by_hand_on_paper():
    """Four tokens, two experts of ceil(0.75 x 4 / 2) = 2 places: the third token that wants expert 0 is dropped.

    A gate value is the probability itself, and its gradient to the logits p (1 - p) and -p (1 - p).
    """
    shares = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.75, 0.25], [0.3, 0.7]], dtype=torch.float64)
    logit_TE = shares.log().requires_grad_()
    gate = of_logits(2, 0.75)
    gating = gate(logit_TE)
    assert gating.expert_A.tolist() == [0, 0, 1]
    assert gating.token_A.tolist() == [0, 1, 3]
    assert gating.gate_A.tolist() == pytest.approx([0.8, 0.6, 0.7])
    assert (gating.num_requested, gating.num_dropped) == (4, 1)
    assert gating.load_E.tolist() == [2, 1]
    assert gating.sums["requested_E"].tolist() == gating.sums["first_choice_E"].tolist() == [3, 1]
    assert gating.sums["probability_E"].tolist() == pytest.approx([2.45, 1.55])
    gating.gate_A.sum().backward()
    want = torch.tensor([[0.16, -0.16], [0.24, -0.24], [0, 0], [-0.21, 0.21]], dtype=torch.float64)
    torch.testing.assert_close(logit_TE.grad, want)
    torch.testing.assert_close(gate.gate_DE.grad, shares.log().t() @ want)


def test_equal_tokens_are_served_in_order():
    """The first ceil(7 / 4) = 2 of seven equal tokens get the expert that all want."""
    gating = of_logits(4, 1.0)(torch.tensor([[0.0, 2.0, 0.0, 1.0]]).double().repeat(7, 1))
    assert (gating.token_A.tolist(), gating.expert_A.tolist()) == ([0, 1], [1, 1])
    assert gating.num_dropped == 5


def test_jitter_is_uniform_and_multiplies_each_element():
    """Jitter read back from gate values is within 1 - 0.2 and 1 + 0.2, of mean 1 and deviation 0.2 / sqrt(3)."""
    num_tokens = 40_000
    gate = of_logits(2, 2.0)
    gate.jitter = JITTER
    torch.manual_seed(0)
    # Logits (3 u, 0) have log(p / (1 - p)) = 3 u. Logits (3 u, -3 v) have 3 (u + v), with twice the variance.
    for second, variance in ((0.0, 1.0), (-3.0, 2.0)):
        p_T = naive.dense(gate(torch.tensor([[3.0, second]]).double().repeat(num_tokens, 1)))[:, 0]
        u_T = (p_T / (1 - p_T)).log().detach() / 3
        mean = 1.0 if second == 0 else 2.0
        assert ((u_T - mean).abs() <= JITTER * mean + 1e-9).all()
        want = JITTER / math.sqrt(3) * math.sqrt(variance)
        assert u_T.mean().item() == pytest.approx(mean, abs=4 * want / math.sqrt(num_tokens))
        assert u_T.std().item() == pytest.approx(want, rel=0.02)


def test_without_jitter_training_draws_nothing_that_counts():
    """A jitter of 0 leaves the probabilities of evaluation."""
    gate, x_TD = make(6, 6.0, jitter=0.0), naive.tokens(30)
    assert torch.equal(naive.dense(gate(x_TD)), naive.dense(gate.eval()(x_TD)))
