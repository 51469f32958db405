"""Noise-free top-k gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import pytest
import torch

from moe_lm.gate.top_k import TopK
from moe_lm.mistake import Mistake

SIZES = [(0, 4, 2), (1, 1, 1), (1, 4, 2), (30, 6, 2), (9, 5, 4), (9, 3, 3), (3, 8, 2)]
"""Tokens, experts and experts a token; of none, of one, of as many as there are, of fewer tokens than experts."""
SUMS = ["asked_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens"]
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)


def make(num_experts, k, num_groups=None, dtype=torch.float64, train=True, width=5):
    """A gate with a random matrix, as after some training."""
    gate = TopK(width=width, num_experts=num_experts, k=k, num_groups=num_groups).to(dtype).train(train)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=torch.Generator().manual_seed(0))
    return gate


def of_logits(num_experts, k):
    """A gate whose tokens are the logits."""
    gate = make(num_experts, k, width=num_experts)
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(num_experts))
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def by_hand(x_TD, w_DE, k):
    """Return the table of gate values and the sums."""
    num_experts = w_DE.shape[1]
    rows, asked_E, first_E = [], [0.0] * num_experts, [0.0] * num_experts
    probability_E, log_z_squared = [ZERO] * num_experts, ZERO
    for x_D in x_TD:
        e = [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))).exp() for i in range(num_experts)]
        order = sorted(range(num_experts), key=lambda i: -e[i].item())
        survivors = sum(e[i] for i in order[:k])
        rows.append(torch.stack([e[i] / survivors if i in order[:k] else ZERO for i in range(num_experts)]))
        first_E[order[0]] += 1
        for i in order[:k]:
            asked_E[i] += 1
        for i in range(num_experts):
            probability_E[i] = probability_E[i] + e[i] / sum(e)
        log_z_squared = log_z_squared + sum(e).log() ** 2
    table_TE = torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
    values = [*(torch.tensor(x).double() for x in (asked_E, first_E)), torch.stack(probability_E), log_z_squared]
    return table_TE, dict(zip(SUMS, [*values, torch.tensor(float(len(x_TD))).double()], strict=True))


def by_hand_in_groups(x_TD, w_GDE, k):
    """The same for each group's rows and matrix: the table has a block for each group."""
    parts = zip(x_TD.split(ROWS), w_GDE, strict=True)
    tables, sums = zip(*(by_hand(part, w_DE, k) for part, w_DE in parts), strict=True)
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
    assert gating.num_asked == k * gating.num_tokens == len(gating.token_A)
    assert gating.num_dropped == 0
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(gating.sums) == (set(SUMS) if train else set())
    for name in gating.sums:
        torch.testing.assert_close(gating.sums[name], sums[name])
    assert not any(gating.sums[name].requires_grad for name in ("asked_E", "first_choice_E") if train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, train):
    """Gates, importance, load and sums are those of the loops, in evaluation without the sums."""
    gate, x_TD = make(num_experts, k, train=train), tokens(num_tokens)
    check(gate(x_TD), *by_hand(x_TD, gate.gate_DE, k), k, train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_experts", "k"), [(5, 2), (4, 4), (1, 1), (12, 3)])
def test_groups_follow_the_equations_each_with_its_own_matrix(num_experts, k, train):
    """A row chooses among its group's experts alone; sums are over all groups' experts and rows."""
    gate, x_TD = make(num_experts, k, num_groups=4, train=train), tokens(sum(ROWS))
    check(gate(x_TD, GROUP), *by_hand_in_groups(x_TD, gate.gate_DE, k), k, train)


@pytest.mark.parametrize("what", ["gate", "importance", "probability_E", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(5, 2), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g through gates, importance and both sums that have one equal those of the loops."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    table_TE, sums = (by_hand_in_groups if grouped else by_hand)(x_TD, gate.gate_DE, k)
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
    """Logits of ln 4, ln 2 and ln 1 leave gates of 4/6 and 2/6, and ln 1, ln 3, ln 9 of 3/12 and 9/12."""
    gate, logit_TE = of_logits(3, 2), torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 9.0]]).double().log()
    gating = gate(logit_TE)
    assert gating.token_A.tolist() == [0, 0, 1, 1]
    assert gating.expert_A.tolist() == [0, 1, 1, 2]
    assert gating.gate_A.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 4, 3 / 4])
    assert gating.importance_E.tolist() == pytest.approx([2 / 3, 7 / 12, 3 / 4])
    assert gating.load_E.tolist() == gating.sums["asked_E"].tolist() == [1, 2, 1]
    assert gating.sums["first_choice_E"].tolist() == [1, 0, 1]
    assert gating.sums["probability_E"].tolist() == pytest.approx([4 / 7 + 1 / 13, 2 / 7 + 3 / 13, 1 / 7 + 9 / 13])
    log_7, log_13 = torch.tensor([7.0, 13.0]).double().log().tolist()
    assert gating.sums["log_z_squared"].item() == pytest.approx(log_7**2 + log_13**2)
    assert gating.sums["num_tokens"].item() == 2


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_random_number_is_ever_drawn(train):
    """The generator stands where it stood, so there is no noise."""
    gate, x_TD = make(6, 2, train=train), tokens(30)
    before = torch.get_rng_state()
    first = gate(x_TD)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(dense(first), dense(gate(x_TD)))


def test_equal_logits_give_k_distinct_experts_equal_parts():
    """Where all logits tie, each token still has k different experts, of weight 1/k."""
    gating = of_logits(5, 3)(torch.zeros(7, 5).double())
    assert (dense(gating) > 0).sum(dim=1).tolist() == [3] * 7
    assert gating.gate_A.tolist() == pytest.approx([1 / 3] * 21)
    assert gating.sums["probability_E"].tolist() == pytest.approx([7 / 5] * 5)


def test_large_logits_stay_finite():
    """Logits in the thousands give gates that sum to 1 and finite sums and gradients, in float32."""
    gate, x_TD = make(6, 2, dtype=torch.float32), (tokens(30, dtype=torch.float32) * 3000).requires_grad_()
    gating = gate(x_TD)
    torch.testing.assert_close(dense(gating).sum(dim=1), torch.ones(30))
    assert all(value.isfinite().all() for value in gating.sums.values())
    (gating.gate_A.square().sum() + gating.sums["probability_E"].square().sum()).backward()
    assert x_TD.grad.isfinite().all()
    assert gate.gate_DE.grad.isfinite().all()


def test_autocast_leaves_the_gate_in_float32():
    """Under bfloat16 autocast the gating is bit for bit that of float32, flat and with groups."""
    for num_groups, group_T in ((None, None), (4, GROUP)):
        gate, x_TD = make(6, 2, num_groups, dtype=torch.float32), tokens(sum(ROWS), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            cast, rounded = gate(x_TD, group_T), gate(x_TD.bfloat16(), group_T)
        for got, want in ((cast, gate(x_TD, group_T)), (rounded, gate(x_TD.bfloat16().float(), group_T))):
            assert got.gate_A.dtype == torch.float32
            assert torch.equal(dense(got), dense(want))
            assert torch.equal(got.sums["log_z_squared"], want.sums["log_z_squared"])


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 5), (0, 1), (4, 1), (2, 1)])
def test_a_wrong_k_is_a_mistake_of_one_line(num_experts, k):
    """Too many, none, or one of several, whose gate would be the constant 1 and never learn."""
    with pytest.raises(Mistake) as caught:
        TopK(width=3, num_experts=num_experts, k=k)
    assert "model.k=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_operations_are_those_of_one_matrix():
    """512 x 256 multiply-adds, and with 16 groups of 16 experts 512 x 16: one group's."""
    assert TopK(width=512, num_experts=256, k=4).operations_per_timestep() == 131_072
    assert TopK(width=512, num_experts=16, k=2, num_groups=16).operations_per_timestep() == 8_192
