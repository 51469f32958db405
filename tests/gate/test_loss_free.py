"""Loss-free balanced gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import pytest
import torch

from moe_lm.gate.loss_free import LossFree
from moe_lm.mistake import Mistake

RATE = 0.125
SIZES = [(0, 4, 2), (1, 1, 1), (1, 4, 2), (30, 6, 2), (9, 5, 1), (9, 5, 4), (9, 3, 3), (3, 16, 2)]
"""Tokens, experts and experts a token."""
SUMS = ["asked_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens"]
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)


def make(num_experts, k, num_groups=None, dtype=torch.float64, train=True, width=5):
    """A gate with a random matrix and random biases, as after some training."""
    gate = LossFree(width=width, num_experts=num_experts, k=k, bias_update_rate=RATE, num_groups=num_groups)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=generator)
        gate.bias_E.normal_(std=0.3, generator=generator)
    return gate.to(dtype).train(train)


def of_logits(num_experts, k):
    """A gate without biases whose tokens are the logits."""
    gate = make(num_experts, k, width=num_experts)
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(num_experts))
        gate.bias_E.zero_()
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def by_hand(x_TD, w_DE, bias_E, k):
    """Return the table of gate values and the sums."""
    num_experts = w_DE.shape[1]
    rows, asked_E, first_E = [], [0.0] * num_experts, [0.0] * num_experts
    probability_E, log_z_squared = [ZERO] * num_experts, ZERO
    for x_D in x_TD:
        z = [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))) for i in range(num_experts)]
        s = [1 / (1 + (-value).exp()) for value in z]
        order = sorted(range(num_experts), key=lambda i: -(s[i] + bias_E[i]).item())
        rows.append(torch.stack([s[i] if i in order[:k] else ZERO for i in range(num_experts)]))
        first_E[order[0]] += 1
        for i in order[:k]:
            asked_E[i] += 1
        probability_E = [total + value / sum(s) for total, value in zip(probability_E, s, strict=True)]
        log_z_squared = log_z_squared + sum(value.exp() for value in z).log() ** 2
    table_TE = torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64)
    values = [*(torch.tensor(x).double() for x in (asked_E, first_E)), torch.stack(probability_E), log_z_squared]
    return table_TE, dict(zip(SUMS, [*values, torch.tensor(float(len(x_TD))).double()], strict=True))


def by_hand_in_groups(x_TD, w_GDE, bias_E, k):
    """The same for each group's rows, matrix and biases: the table has a block for each group."""
    parts = zip(x_TD.split(ROWS), w_GDE, bias_E.view(len(ROWS), -1), strict=True)
    tables, sums = zip(*(by_hand(part, w_DE, own_E, k) for part, w_DE, own_E in parts), strict=True)
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
    """Gates, importance, load and sums are those of the loops; evaluation makes the same choice."""
    gate, x_TD = make(num_experts, k, train=train), tokens(num_tokens)
    check(gate(x_TD), *by_hand(x_TD, gate.gate_DE, gate.bias_E, k), k, train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_experts", "k"), [(5, 1), (5, 2), (4, 4), (1, 1), (12, 3)])
def test_groups_follow_the_equations_each_with_its_own_biases(num_experts, k, train):
    """A row chooses among its group's experts alone, with their biases."""
    gate, x_TD = make(num_experts, k, num_groups=4, train=train), tokens(sum(ROWS))
    check(gate(x_TD, GROUP), *by_hand_in_groups(x_TD, gate.gate_DE, gate.bias_E, k), k, train)


@pytest.mark.parametrize("what", ["gate", "importance", "probability_E", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(5, 2), (5, 1), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g equal those of the loops."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    table_TE, sums = (by_hand_in_groups if grouped else by_hand)(x_TD, gate.gate_DE, gate.bias_E, k)
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
    """Four tokens, three experts, one each: after one step of the biases a token has changed its expert.

    Expert 0 serves three tokens and expert 2 none, so 1/8 is taken from the first and given to the last; expert 1
    serves one of 4/3, so it is given 1/8 too. Token 2's 0.5 - 0.125 against 0.4 + 0.125 then sends it to expert 1,
    with a gate of 0.4. Two tokens each for 0 and 1, mean 4/3, then take 1/8 from both and give 1/8 to expert 2.
    """
    share_TE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.2, 0.1], [0.5, 0.4, 0.2], [0.1, 0.7, 0.3]]).double()
    gate, logit_TE = of_logits(3, 1), (share_TE / (1 - share_TE)).log()
    gating = gate(logit_TE)
    assert gating.expert_A.tolist() == [0, 0, 0, 1]
    assert gating.gate_A.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.7])
    assert gating.sums["probability_E"].tolist() == pytest.approx(
        [9 / 12 + 8 / 11 + 5 / 11 + 1 / 11, 1 / 12 + 2 / 11 + 4 / 11 + 7 / 11, 2 / 12 + 1 / 11 + 2 / 11 + 3 / 11]
    )
    gate.adapt({"load_E": gating.load_E})
    assert gate.bias_E.tolist() == [-0.125, 0.125, 0.125]
    gating = gate(logit_TE)
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 0, 1, 1], [0, 1, 2, 3])
    assert gating.gate_A.tolist() == pytest.approx([0.9, 0.8, 0.4, 0.7])
    gate.adapt({"load_E": gating.load_E})
    assert gate.bias_E.tolist() == [-0.25, 0, 0.25]


def test_biases_move_towards_balance():
    """An overloaded expert's bias falls, an underloaded one's rises, at the mean it stays; all start at 0."""
    gate = LossFree(width=3, num_experts=4, k=2, bias_update_rate=RATE).double()
    assert gate.bias_E.tolist() == [0] * 4
    assert "bias_E" not in dict(gate.named_parameters())
    assert "bias_E" in gate.state_dict()
    gate.adapt({"load_E": torch.tensor([9.0, 5.0, 5.0, 1.0]), "importance_E": torch.zeros(4)})
    assert gate.bias_E.tolist() == [-RATE, 0, 0, RATE]
    gate.adapt({"load_E": torch.zeros(4)})  # a batch without tokens
    assert gate.bias_E.tolist() == [-RATE, 0, 0, RATE]


def test_each_group_has_its_own_mean():
    """Biases are compared within a group: a small group's experts are not all underloaded."""
    gate = LossFree(width=3, num_experts=2, k=1, bias_update_rate=RATE, num_groups=3)
    gate.adapt({"load_E": torch.tensor([30.0, 10.0, 0.0, 0.0, 1.0, 2.0])})
    assert gate.bias_E.tolist() == [-RATE, RATE, 0, 0, RATE, -RATE]


def test_a_bias_changes_choices_and_never_a_gate_value():
    """Whatever the bias, a chosen expert's gate is its own sigmoid, and no gradient reaches the bias."""
    gate, x_TD = make(6, 2), tokens(30)
    want_TE = (x_TD @ gate.gate_DE).sigmoid()
    for bias in ([0.0] * 6, [5.0, 0, 0, 0, 0, -5.0], [0.0, 0, 100.0, 100.0, 0, 0]):
        gate.bias_E.copy_(torch.tensor(bias))
        gating = gate(x_TD)
        torch.testing.assert_close(gating.gate_A, want_TE[gating.token_A, gating.expert_A])
        assert not gate.bias_E.requires_grad
    assert gating.expert_A.unique().tolist() == [2, 3]


def test_adapting_balances_the_load():
    """A thousand batches' small steps bring a lopsided gate's loads within a tenth of their mean."""
    gate = LossFree(width=5, num_experts=8, k=2, bias_update_rate=0.003)
    torch.manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_()
    x_TD = torch.randn(4000, 5) + 0.5
    before = gate(x_TD).load_E
    for _ in range(1000):
        gate.adapt({"load_E": gate(x_TD[torch.randint(4000, (400,))]).load_E})
    assert (before / 1000 - 1).abs().max() > 0.3
    assert (gate(x_TD).load_E / 1000 - 1).abs().max() < 0.1


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
        LossFree(width=3, num_experts=num_experts, k=k, bias_update_rate=RATE)
    assert f"model.k={k}" in str(caught.value)
    assert "\n" not in str(caught.value)
