"""Switch gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import pytest
import torch

from moe_lm.gate.switch import Switch
from moe_lm.mistake import Mistake

JITTER = 0.2
SUMS = ["asked_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens"]
ROWS = [6, 0, 12, 1]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)


def make(num_experts, factor, num_groups=None, jitter=JITTER, dtype=torch.float64, train=True, width=5):
    """A gate with a random matrix, as after some training."""
    gate = Switch(
        width=width, num_experts=num_experts, k=1, capacity_factor=factor, jitter=jitter, num_groups=num_groups
    )
    with torch.no_grad():
        gate.gate_DE.normal_(generator=torch.Generator().manual_seed(0))
    return gate.to(dtype).train(train)


def of_logits(num_experts, factor):
    """A gate without jitter whose tokens are the logits."""
    gate = make(num_experts, factor, jitter=0.0, width=num_experts)
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(num_experts))
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawing(monkeypatch, num_tokens, width=5):
    """Let torch.rand_like give the rows of a table in order; return the table and the list of rows still to come."""
    draw_TD = torch.rand(num_tokens, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left = list(draw_TD)

    def rand_like(x, **_):
        return torch.stack([left.pop(0) for _ in range(len(x))]).to(x.dtype) if len(x) else torch.zeros_like(x)

    monkeypatch.setattr(torch, "rand_like", rand_like)
    return draw_TD, left


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def by_hand(x_TD, w_DE, factor, draw_TD, train):
    """Return the table of gate values and the sums."""
    num_tokens, (width, num_experts) = len(x_TD), w_DE.shape
    capacity = max(math.ceil(factor * num_tokens / num_experts), 1) if train else math.inf
    rows, asked_E, probability_E, log_z_squared = [], [0.0] * num_experts, [ZERO] * num_experts, ZERO
    for x_D, draw_D in zip(x_TD, draw_TD, strict=True):
        noise = [1 - JITTER + 2 * JITTER * draw_D[d] if train else 1 for d in range(width)]
        e = [sum(noise[d] * x_D[d] * w_DE[d, i] for d in range(width)).exp() for i in range(num_experts)]
        p = [value / sum(e) for value in e]
        best = max(range(num_experts), key=lambda i: p[i].item())
        kept = asked_E[best] < capacity
        rows.append(torch.stack([p[i] if i == best and kept else ZERO for i in range(num_experts)]))
        asked_E[best] += 1
        probability_E = [total + value for total, value in zip(probability_E, p, strict=True)]
        log_z_squared = log_z_squared + sum(e).log() ** 2
    table_TE = torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
    asked_E = torch.tensor(asked_E).double()
    values = [asked_E, asked_E, torch.stack(probability_E), log_z_squared, torch.tensor(float(num_tokens)).double()]
    return table_TE, dict(zip(SUMS, values, strict=True))


def by_hand_in_groups(x_TD, w_GDE, factor, draw_TD, train):
    """The same for each group's rows, matrix and capacity: the table has a block for each group."""
    parts = zip(x_TD.split(ROWS), w_GDE, draw_TD.split(ROWS), strict=True)
    tables, sums = zip(*(by_hand(part, w_DE, factor, draws, train) for part, w_DE, draws in parts), strict=True)
    together = {
        name: torch.cat([one[name] for one in sums]) if name.endswith("_E") else sum(one[name] for one in sums)
        for name in SUMS
    }
    return torch.block_diag(*tables), together


def check(gating, table_TE, sums, train):
    """Everything in the gating is that of the loops."""
    torch.testing.assert_close(dense(gating), table_TE)
    torch.testing.assert_close(gating.importance_E, table_TE.sum(dim=0))
    assert gating.load_E.tolist() == (table_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_asked == gating.num_tokens == len(gating.token_A) + gating.num_dropped
    assert len(gating.token_A) == int((table_TE > 0).sum())
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(gating.sums) == (set(SUMS) if train else set())
    for name in gating.sums:
        torch.testing.assert_close(gating.sums[name], sums[name])
    assert not any(gating.sums[name].requires_grad for name in ("asked_E", "first_choice_E") if train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 8.0])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 4), (1, 1), (9, 1), (1, 4), (40, 6), (13, 2), (3, 16)])
def test_gating_follows_the_equations(monkeypatch, num_tokens, num_experts, factor, train):
    """Gates, counts and sums are those of the loops; evaluation has no jitter and drops nothing."""
    gate, x_TD = make(num_experts, factor, train=train), tokens(num_tokens)
    draw_TD, left = drawing(monkeypatch, num_tokens)
    before = x_TD.clone()
    gating = gate(x_TD)
    check(gating, *by_hand(x_TD, gate.gate_DE, factor, draw_TD, train), train)
    assert len(left) == (0 if train else num_tokens)
    assert train or gating.num_dropped == 0
    assert torch.equal(x_TD, before)  # the jitter is for the gate only


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 14])
def test_groups_follow_the_equations_each_with_its_own_capacity(monkeypatch, num_experts, factor, train):
    """A row chooses among its group's experts, whose places are counted from the rows of that group."""
    gate, x_TD = make(num_experts, factor, num_groups=4, train=train), tokens(sum(ROWS))
    draw_TD, _ = drawing(monkeypatch, len(x_TD))
    check(gate(x_TD, GROUP), *by_hand_in_groups(x_TD, gate.gate_DE, factor, draw_TD, train), train)


@pytest.mark.parametrize("what", ["gate", "importance", "probability_E", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("factor", [0.5, 8.0])
def test_gradients_are_those_of_the_equations(monkeypatch, what, grouped, factor):
    """Gradients to x and W_g equal those of the loops, with the jitter that was drawn."""
    gate, x_TD = make(5, factor, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    draw_TD, _ = drawing(monkeypatch, len(x_TD))
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    reference = by_hand_in_groups if grouped else by_hand
    table_TE, sums = reference(x_TD, gate.gate_DE, factor, draw_TD, True)
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
    assert (gating.num_asked, gating.num_dropped) == (4, 1)
    assert gating.load_E.tolist() == [2, 1]
    assert gating.sums["asked_E"].tolist() == gating.sums["first_choice_E"].tolist() == [3, 1]
    assert gating.sums["probability_E"].tolist() == pytest.approx([2.45, 1.55])
    gating.gate_A.sum().backward()
    want = torch.tensor([[0.16, -0.16], [0.24, -0.24], [0, 0], [-0.21, 0.21]], dtype=torch.float64)
    torch.testing.assert_close(logit_TE.grad, want)
    torch.testing.assert_close(gate.gate_DE.grad, shares.log().t() @ want)


def test_equal_tokens_are_served_in_order():
    """Of seven equal tokens the first ceil(7 / 4) = 2 get the expert that all want."""
    gating = of_logits(4, 1.0)(torch.tensor([[0.0, 2.0, 0.0, 1.0]]).double().repeat(7, 1))
    assert (gating.token_A.tolist(), gating.expert_A.tolist()) == ([0, 1], [1, 1])
    assert gating.num_dropped == 5


def test_equal_probabilities_give_one_expert():
    """Where all logits tie each token still has one expert, of weight 1/E."""
    gating = of_logits(5, 5.0)(torch.zeros(8, 5).double())
    assert sorted(gating.token_A.tolist()) == list(range(8))
    assert gating.gate_A.tolist() == pytest.approx([1 / 5] * 8)


def test_jitter_is_uniform_and_multiplies_each_element():
    """Jitter read back from gate values is within 1 - 0.2 and 1 + 0.2, of mean 1 and deviation 0.2 / sqrt(3)."""
    num_tokens = 40_000
    gate = of_logits(2, 2.0)
    gate.jitter = JITTER
    torch.manual_seed(0)
    # Of logits (3 u, 0): log(p / (1 - p)) = 3 u. Of (3 u, -3 v): 3 (u + v), of twice the variance, as each has its own.
    for second, variance in ((0.0, 1.0), (-3.0, 2.0)):
        p_T = dense(gate(torch.tensor([[3.0, second]]).double().repeat(num_tokens, 1)))[:, 0]
        u_T = (p_T / (1 - p_T)).log().detach() / 3
        mean = 1.0 if second == 0 else 2.0
        assert ((u_T - mean).abs() <= JITTER * mean + 1e-9).all()
        want = JITTER / math.sqrt(3) * math.sqrt(variance)
        assert u_T.mean().item() == pytest.approx(mean, abs=4 * want / math.sqrt(num_tokens))
        assert u_T.std().item() == pytest.approx(want, rel=0.02)


def test_without_jitter_training_draws_nothing_that_counts():
    """A jitter of 0 leaves the probabilities of evaluation."""
    gate, x_TD = make(6, 6.0, jitter=0.0), tokens(30)
    assert torch.equal(dense(gate(x_TD)), dense(gate.eval()(x_TD)))


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


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 2), (1, 2), (0, 1)])
def test_a_wrong_k_is_a_mistake_of_one_line(num_experts, k):
    """Switch sends a token to one expert."""
    with pytest.raises(Mistake) as caught:
        Switch(width=3, num_experts=num_experts, k=k, capacity_factor=1.0, jitter=0.01)
    assert "model.k=" in str(caught.value)
    assert "\n" not in str(caught.value)
