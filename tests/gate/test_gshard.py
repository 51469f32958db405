"""GShard's top-2 gating against its algorithm, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import pytest
import torch

from moe_lm.gate.gshard import GShard
from moe_lm.mistake import Mistake

SUMS = ["asked_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens"]
ROWS = [6, 0, 12, 1]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)


def make(num_experts, factor, num_groups=None, dtype=torch.float64, train=True, width=5):
    """A gate with a random matrix, as after some training; its k is 2, or 1 of one expert."""
    k = min(2, num_experts)
    gate = GShard(width=width, num_experts=num_experts, k=k, capacity_factor=factor, num_groups=num_groups)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=torch.Generator().manual_seed(0))
    return gate.to(dtype).train(train)


def of_logits(num_experts, factor):
    """A gate whose tokens are the logits."""
    gate = make(num_experts, factor, width=num_experts)
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(num_experts))
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def by_hand(x_TD, w_DE, factor, draw_T, train):
    """Return the table of gate values and the sums, from the two passes over the tokens."""
    num_tokens, num_experts = len(x_TD), w_DE.shape[1]
    k = min(2, num_experts)
    capacity = max(math.ceil(factor * k * num_tokens / num_experts), 1) if train else math.inf
    table = [[ZERO] * num_experts for _ in x_TD]
    first_E, probability_E, log_z_squared, choices = [0.0] * num_experts, [ZERO] * num_experts, ZERO, []
    for s, x_D in enumerate(x_TD):
        e = [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))).exp() for i in range(num_experts)]
        g = [value / sum(e) for value in e]
        order = sorted(range(num_experts), key=lambda i: -g[i].item())[:2]
        choices.append((order, [g[i] / sum(g[j] for j in order) for i in order]))
        if first_E[order[0]] < capacity:
            table[s][order[0]] = choices[s][1][0]
        first_E[order[0]] += 1
        probability_E = [total + value for total, value in zip(probability_E, g, strict=True)]
        log_z_squared = log_z_squared + sum(e).log() ** 2
    taken_E, asked_E = list(first_E), list(first_E)
    for s, (order, g) in enumerate(choices):
        if k == 2:
            asked_E[order[1]] += 1
            if taken_E[order[1]] < capacity and (not train or 2 * g[1].item() > draw_T[s].item()):
                table[s][order[1]] = g[1]
                taken_E[order[1]] += 1
    rows = [torch.stack(row) for row in table]
    table_TE = torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
    values = [*(torch.tensor(x).double() for x in (asked_E, first_E)), torch.stack(probability_E), log_z_squared]
    return table_TE, dict(zip(SUMS, [*values, torch.tensor(float(num_tokens)).double()], strict=True))


def by_hand_in_groups(x_TD, w_GDE, factor, draw_T, train):
    """The same for each group's rows, matrix and capacity: the table has a block for each group."""
    parts = zip(x_TD.split(ROWS), w_GDE, draw_T.split(ROWS), strict=True)
    tables, sums = zip(*(by_hand(part, w_DE, factor, draws, train) for part, w_DE, draws in parts), strict=True)
    together = {
        name: torch.cat([one[name] for one in sums]) if name.endswith("_E") else sum(one[name] for one in sums)
        for name in SUMS
    }
    return torch.block_diag(*tables), together


def check(gating, table_TE, sums, k, train):
    """Everything in the gating is that of the loops."""
    torch.testing.assert_close(dense(gating), table_TE)
    torch.testing.assert_close(gating.importance_E, table_TE.sum(dim=0))
    assert gating.load_E.tolist() == (table_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_asked == k * gating.num_tokens == len(gating.token_A) + gating.num_dropped
    assert len(gating.token_A) == int((table_TE > 0).sum())
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(gating.sums) == (set(SUMS) if train else set())
    for name in gating.sums:
        torch.testing.assert_close(gating.sums[name], sums[name])
    assert not any(gating.sums[name].requires_grad for name in ("asked_E", "first_choice_E") if train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 8.0])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 4), (1, 1), (9, 1), (1, 4), (40, 6), (13, 2), (3, 16)])
def test_gating_follows_the_algorithm(monkeypatch, num_tokens, num_experts, factor, train):
    """Gates, counts and sums are those of the two passes; evaluation draws nothing and drops nothing."""
    gate, x_TD, draw_T = make(num_experts, factor, train=train), tokens(num_tokens), uniform(num_tokens)
    left = drawing(monkeypatch, draw_T)
    gating = gate(x_TD)
    check(gating, *by_hand(x_TD, gate.gate_DE, factor, draw_T, train), min(2, num_experts), train)
    if not train:
        assert (len(left), gating.num_dropped) == (num_tokens, 0)
    elif num_experts > 1:
        assert not left


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 14])
def test_groups_follow_the_algorithm_each_with_its_own_capacity(monkeypatch, num_experts, factor, train):
    """A row chooses among its group's experts, whose places are counted from the rows of that group."""
    gate, x_TD = make(num_experts, factor, num_groups=4, train=train), tokens(sum(ROWS))
    draw_T = uniform(len(x_TD))
    drawing(monkeypatch, draw_T)
    table_TE, sums = by_hand_in_groups(x_TD, gate.gate_DE, factor, draw_T, train)
    check(gate(x_TD, GROUP), table_TE, sums, min(2, num_experts), train)


@pytest.mark.parametrize("what", ["gate", "importance", "probability_E", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_gradients_are_those_of_the_algorithm(monkeypatch, what, grouped, factor):
    """Gradients to x and W_g equal those of the loops, also of a gate value whose partner was dropped."""
    gate, x_TD = make(5, factor, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    draw_T = uniform(len(x_TD))
    drawing(monkeypatch, draw_T)
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    reference = by_hand_in_groups if grouped else by_hand
    table_TE, sums = reference(x_TD, gate.gate_DE, factor, draw_T, True)
    factor_TE = tokens(len(x_TD), width=gating.num_experts, seed=5)
    if what == "gate":
        got, want = (dense(gating) * factor_TE).sum(), (table_TE * factor_TE).sum()
    elif what == "importance":
        got, want = (gating.importance_E * factor_TE[0]).sum(), (table_TE.sum(dim=0) * factor_TE[0]).sum()
    else:
        got, want = (gating.sums[what] * factor_TE[0]).sum(), (sums[what] * factor_TE[0]).sum()
    inputs = (x_TD, gate.gate_DE)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("first_draw", "want"),
    [
        (0.5, [(0, 0, 0.8), (0, 1, 0.6), (1, 1, 0.4), (1, 3, 0.6)]),
        (0.3, [(0, 0, 0.8), (0, 1, 0.6), (1, 0, 0.2), (1, 3, 0.6)]),
    ],
)
def test_by_hand_on_paper(monkeypatch, first_draw, want):
    """Four tokens, two experts of two places: token 0's second choice takes a place only if 0.4 is above the draw.

    Expert 0 is the first choice of tokens 0, 1 and 2 and so full; token 3 leaves one place of expert 1. Of the
    second choices for it, token 0's has 2 x 0.2, token 1's 2 x 0.4, and token 2's 2 x 0.25, which comes too late.
    """
    shares = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.75, 0.25], [0.4, 0.6]], dtype=torch.float64)
    drawing(monkeypatch, torch.tensor([first_draw, 0.3, 0.1, 0.0]))
    gating = of_logits(2, 0.5)(shares.log())
    assert list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True)) == [row[:2] for row in want]
    assert gating.gate_A.tolist() == pytest.approx([row[2] for row in want])
    assert (gating.num_asked, gating.num_dropped) == (8, 4)
    assert gating.load_E.tolist() == [2, 2]
    assert gating.sums["first_choice_E"].tolist() == [3, 1]
    assert gating.sums["asked_E"].tolist() == [4, 4]
    assert gating.sums["probability_E"].tolist() == pytest.approx([2.55, 1.45])


def test_equal_tokens_are_served_in_order(monkeypatch):
    """Of six equal tokens the first ceil(2 x 6 / 4) = 3 get both experts, the others none."""
    drawing(monkeypatch, torch.zeros(6))
    gating = of_logits(4, 1.0)(torch.tensor([[0.0, 2.0, 0.0, 1.0]]).double().repeat(6, 1))
    assert gating.token_A.tolist() == [0, 1, 2] * 2
    assert gating.expert_A.tolist() == [1] * 3 + [3] * 3
    assert gating.num_dropped == 6


def test_equal_experts_are_both_kept():
    """Two equal gate values make 2 g2 = 1, above any draw, and with a place for each token nothing is dropped."""
    gating = of_logits(5, 5.0)(torch.zeros(50, 5).double())
    assert (dense(gating) > 0).sum(dim=1).tolist() == [2] * 50
    assert gating.gate_A.tolist() == pytest.approx([0.5] * 100)


def test_second_choices_are_kept_as_often_as_twice_their_gate():
    """With places for all, each token's second choice is kept with the chance min(1, 2 g2), independently."""
    gate, x_TD, draws = make(5, 5.0), tokens(40), 2000
    table_TE, _ = by_hand(x_TD, gate.gate_DE, 5.0, torch.zeros(40), True)
    chance_T = (2 * table_TE.topk(2, dim=1).values[:, 1]).detach().clamp(max=1)
    torch.manual_seed(0)
    kept_NT = torch.stack([(dense(gate(x_TD)) > 0).sum(dim=1) - 1 for _ in range(draws)]).double()
    assert kept_NT.min() >= 0  # the first choice, always
    error_T = (chance_T * (1 - chance_T) / draws).sqrt()
    assert ((kept_NT.mean(dim=0) - chance_T).abs() <= 5 * error_T + 1e-9).all()
    of_all, variance = kept_NT.sum(dim=1), (chance_T * (1 - chance_T)).sum().item()
    assert of_all.mean().item() == pytest.approx(chance_T.sum().item(), abs=4 * math.sqrt(variance / draws))
    assert of_all.var().item() == pytest.approx(variance, rel=0.2)  # a draw shared by tokens would have more


def test_autocast_leaves_the_gate_in_float32():
    """Under bfloat16 autocast the gating is bit for bit that of float32, and costs one matrix in any case."""
    gate, x_TD = make(6, 1.0, dtype=torch.float32), tokens(20, dtype=torch.float32)
    torch.manual_seed(0)
    want = gate(x_TD)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x_TD)
    assert got.gate_A.dtype == torch.float32
    assert torch.equal(dense(got), dense(want))
    assert torch.equal(got.sums["log_z_squared"], want.sums["log_z_squared"])
    assert gate.operations_per_timestep() == 5 * 6


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 1), (4, 3), (1, 2), (0, 1)])
def test_a_wrong_k_is_a_mistake_of_one_line(num_experts, k):
    """The algorithm is of two experts a token, or of one where there is only one."""
    with pytest.raises(Mistake) as caught:
        GShard(width=3, num_experts=num_experts, k=k, capacity_factor=1.0)
    assert "model.k=" in str(caught.value)
    assert "\n" not in str(caught.value)
