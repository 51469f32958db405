"""GShard's top-2 gating against its algorithm, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import naive
import pytest
import torch

from moe_lm.gate.gshard import GShard

ROWS = [6, 0, 12, 1]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, factor, num_groups=None, train=True, width=5):
    """A gate with a random matrix, as after some training; its k is 2, or 1 of one expert."""
    k = min(2, num_experts)
    gate = GShard(width=width, num_experts=num_experts, k=k, capacity_factor=factor, num_groups=num_groups)
    return naive.randomized(gate).double().train(train)


def uniform(num_tokens, seed=2):
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawing(monkeypatch, draw_T):
    """Let torch.rand and torch.rand_like give these numbers in order; return the list of those still to come."""
    left = draw_T.tolist()

    def rand(*shape, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return torch.tensor([left.pop(0) for _ in range(math.prod(shape))], dtype=torch.float64).view(shape)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: rand(x.shape))
    return left


def by_hand(x_TD, w_DE, draw_T, factor, train):
    """Return the table of gate values and the sums, from the two passes over the tokens."""
    num_tokens, num_experts = len(x_TD), w_DE.shape[1]
    k = min(2, num_experts)
    capacity = max(math.ceil(factor * k * num_tokens / num_experts), 1) if train else math.inf
    table = [[naive.ZERO] * num_experts for _ in x_TD]
    first_E, probability_E, log_z_squared, choices = [0.0] * num_experts, [naive.ZERO] * num_experts, naive.ZERO, []
    for s, x_D in enumerate(x_TD):
        e = [value.exp() for value in naive.logits(x_D, w_DE)]
        g = [value / sum(e) for value in e]
        order = sorted(range(num_experts), key=lambda i: -g[i].item())[:2]
        choices.append((order, [g[i] / sum(g[j] for j in order) for i in order]))
        if first_E[order[0]] < capacity:
            table[s][order[0]] = choices[s][1][0]
        first_E[order[0]] += 1
        probability_E = [total + value for total, value in zip(probability_E, g, strict=True)]
        log_z_squared = log_z_squared + sum(e).log() ** 2
    taken_E, requested_E = list(first_E), list(first_E)
    for s, (order, g) in enumerate(choices):
        if k == 2:
            requested_E[order[1]] += 1
            if taken_E[order[1]] < capacity and (not train or 2 * g[1].item() > draw_T[s].item()):
                table[s][order[1]] = g[1]
                taken_E[order[1]] += 1
    return naive.stacked(table, num_experts), naive.sums_of(
        requested_E, first_E, probability_E, log_z_squared, num_tokens
    )


def reference(gate, x_TD, draw_T, factor, train, grouped):
    """What the two passes give: over all tokens, or over each group's rows with its matrix and capacity."""
    if grouped:
        return naive.in_groups(by_hand, [x_TD.split(ROWS), gate.gate_DE, draw_T.split(ROWS)], factor, train)
    return by_hand(x_TD, gate.gate_DE, draw_T, factor, train)


@naive.each("train", [True, False])
@naive.each("factor", [0.25, 0.5, 1.0, 1.25, 8.0])
@naive.each(("num_tokens", "num_experts"), [(0, 4), (1, 1), (9, 1), (1, 4), (40, 6), (13, 2), (3, 16)])
def test_gating_follows_the_algorithm(monkeypatch, num_tokens, num_experts, factor, train):
    """Gates, counts and sums are those of the two passes; evaluation draws nothing and drops nothing."""
    gate, x_TD, draw_T = make(num_experts, factor, train=train), naive.tokens(num_tokens), uniform(num_tokens)
    left = drawing(monkeypatch, draw_T)
    gating = gate(x_TD)
    want = reference(gate, x_TD, draw_T, factor, train, False)
    naive.check(gating, *want, min(2, num_experts) * num_tokens, train)
    if not train:
        assert (len(left), gating.num_dropped) == (num_tokens, 0)
    elif num_experts > 1:
        assert not left


@naive.each("train", [True, False])
@naive.each("factor", [0.5, 1.0, 2.0])
@naive.each("num_experts", [1, 2, 5, 14])
def test_groups_follow_the_algorithm_each_with_its_own_capacity(monkeypatch, num_experts, factor, train):
    """A row chooses among its group's experts, whose places are counted from the rows of that group."""
    gate, x_TD = make(num_experts, factor, num_groups=4, train=train), naive.tokens(sum(ROWS))
    draw_T = uniform(len(x_TD))
    drawing(monkeypatch, draw_T)
    want = reference(gate, x_TD, draw_T, factor, train, True)
    naive.check(gate(x_TD, GROUP), *want, min(2, num_experts) * len(x_TD), train)


@naive.each("what", ["gate", "importance", "probability_E", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each("factor", [0.5, 4.0])
def test_gradients_are_those_of_the_algorithm(monkeypatch, what, grouped, factor):
    """Gradients to x and W_g equal those of the loops, also of a gate value whose partner was dropped."""
    gate, x_TD = make(5, factor, num_groups=4 if grouped else None), naive.tokens(sum(ROWS)).requires_grad_()
    draw_T = uniform(len(x_TD))
    drawing(monkeypatch, draw_T)
    gating = gate(x_TD, GROUP if grouped else None)
    want = reference(gate, x_TD, draw_T, factor, True, grouped)
    naive.check_gradients(what, gating, *want, (x_TD, gate.gate_DE))


@naive.each(
    ("first_draw", "want"),
    [
        (0.5, [(0, 0, 0.8), (0, 1, 0.6), (1, 1, 0.4), (1, 3, 0.6)]),
        (0.3, [(0, 0, 0.8), (0, 1, 0.6), (1, 0, 0.2), (1, 3, 0.6)]),
    ],
)
def test_by_hand_on_paper(monkeypatch, first_draw, want):
    """Four tokens, two experts of two places: token 0's second choice takes a place only if 0.4 is above the draw.

    Expert 0 is the first choice of tokens 0, 1 and 2 and so full; token 3 leaves one place of expert 1. The
    second choices for it have 2 x 0.2 (token 0), 2 x 0.4 (token 1) and 2 x 0.25 (token 2, which comes too late).
    """
    shares = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.75, 0.25], [0.4, 0.6]], dtype=torch.float64)
    drawing(monkeypatch, torch.tensor([first_draw, 0.3, 0.1, 0.0]))
    gating = naive.reading_logits(make(2, 0.5, width=2))(shares.log())
    assert list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True)) == [row[:2] for row in want]
    assert gating.gate_A.tolist() == pytest.approx([row[2] for row in want])
    assert (gating.num_requested, gating.num_dropped) == (8, 4)
    assert gating.load_E.tolist() == [2, 2]
    assert gating.sums["first_choice_E"].tolist() == [3, 1]
    assert gating.sums["requested_E"].tolist() == [4, 4]
    assert gating.sums["probability_E"].tolist() == pytest.approx([2.55, 1.45])


def test_equal_tokens_are_served_in_order(monkeypatch):
    """The first ceil(2 x 6 / 4) = 3 of six equal tokens get both experts, the others none."""
    drawing(monkeypatch, torch.zeros(6))
    gating = naive.reading_logits(make(4, 1.0, width=4))(torch.tensor([[0.0, 2.0, 0.0, 1.0]]).double().repeat(6, 1))
    assert gating.token_A.tolist() == [0, 1, 2] * 2
    assert gating.expert_A.tolist() == [1] * 3 + [3] * 3
    assert gating.num_dropped == 6


def test_second_choices_are_kept_as_often_as_twice_their_gate():
    """With places for all, each token's second choice is kept with the chance min(1, 2 g2), independently."""
    gate, x_TD, draws = make(5, 5.0), naive.tokens(40), 2000
    table_TE, _ = by_hand(x_TD, gate.gate_DE, torch.zeros(40), 5.0, True)
    chance_T = (2 * table_TE.topk(2, dim=1).values[:, 1]).detach().clamp(max=1)
    torch.manual_seed(0)
    kept_NT = torch.stack([(naive.dense(gate(x_TD)) > 0).sum(dim=1) - 1 for _ in range(draws)]).double()
    assert kept_NT.min() >= 0  # the first choice, always
    error_T = (chance_T * (1 - chance_T) / draws).sqrt()
    assert ((kept_NT.mean(dim=0) - chance_T).abs() <= 5 * error_T + 1e-9).all()
    of_all, variance = kept_NT.sum(dim=1), (chance_T * (1 - chance_T)).sum().item()
    assert of_all.mean().item() == pytest.approx(chance_T.sum().item(), abs=4 * math.sqrt(variance / draws))
    assert of_all.var().item() == pytest.approx(variance, rel=0.2)  # a draw shared by tokens would have more
