"""Loss-free balanced gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import naive
import pytest
import torch

from moe_lm.gate.loss_free import LossFree
from moe_lm.loss.objective import SwitchLoss as Switch

RATE = 0.125
SIZES = [(0, 4, 2), (1, 1, 1), (1, 4, 2), (30, 6, 2), (9, 5, 1), (9, 5, 4), (9, 3, 3), (3, 16, 2)]
"""Tokens, experts and experts a token."""
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, k, num_groups=None, train=True, width=5):
    """A gate with a random matrix and random biases, as after some training."""
    gate = LossFree(width=width, num_experts=num_experts, k=k, bias_update_rate=RATE, num_groups=num_groups)
    gate.bias_E.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return naive.randomized(gate).double().train(train)


def by_hand(x_TD, w_DE, bias_E, k):
    """Return the table of gate values and the sums."""
    num_experts = w_DE.shape[1]
    rows, requested_E, first_E = [], [0.0] * num_experts, [0.0] * num_experts
    probability_E, log_z_squared = [naive.ZERO] * num_experts, naive.ZERO
    for x_D in x_TD:
        z = naive.logits(x_D, w_DE)
        s = [1 / (1 + (-value).exp()) for value in z]
        order = sorted(range(num_experts), key=lambda i: -(s[i] + bias_E[i]).item())
        rows.append([s[i] if i in order[:k] else naive.ZERO for i in range(num_experts)])
        first_E[order[0]] += 1
        for i in order[:k]:
            requested_E[i] += 1
        probability_E = [total + value / sum(s) for total, value in zip(probability_E, s, strict=True)]
        log_z_squared = log_z_squared + sum(value.exp() for value in z).log() ** 2
    return naive.stacked(rows, num_experts), naive.sums_of(
        requested_E, first_E, probability_E, log_z_squared, len(x_TD)
    )


def reference(gate, x_TD, k, grouped):
    """What the loops give: of the whole, or of each group's rows with its matrix and biases."""
    if grouped:
        return naive.in_groups(by_hand, [x_TD.split(ROWS), gate.gate_DE, gate.bias_E.view(len(ROWS), -1)], k)
    return by_hand(x_TD, gate.gate_DE, gate.bias_E, k)


@naive.each("train", [True, False])
@naive.each(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, train):
    """Gates, importance, load and sums are those of the loops; evaluation makes the same choice."""
    gate, x_TD = make(num_experts, k, train=train), naive.tokens(num_tokens)
    naive.check(gate(x_TD), *reference(gate, x_TD, k, False), k * num_tokens, train)


@naive.each("train", [True, False])
@naive.each(("num_experts", "k"), [(5, 1), (5, 2), (4, 4), (1, 1), (12, 3)])
def test_groups_follow_the_equations_each_with_its_own_biases(num_experts, k, train):
    """A row chooses among its group's experts alone, with their biases."""
    gate, x_TD = make(num_experts, k, num_groups=4, train=train), naive.tokens(sum(ROWS))
    naive.check(gate(x_TD, GROUP), *reference(gate, x_TD, k, True), k * len(x_TD), train)


@naive.each("what", ["gate", "importance", "probability_E", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each(("num_experts", "k"), [(5, 2), (5, 1), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g equal those of the loops."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), naive.tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP if grouped else None)
    naive.check_gradients(what, gating, *reference(gate, x_TD, k, grouped), (x_TD, gate.gate_DE))


def test_by_hand_on_paper():
    """Four tokens, three experts, one each: after one step of the biases a token has changed its expert.

    Expert 0 serves three tokens and expert 2 none, so 1/8 is taken from the first and given to the last; expert 1
    serves one of 4/3, so it is given 1/8 too. Token 2's 0.5 - 0.125 against 0.4 + 0.125 then sends it to expert 1,
    with a gate of 0.4. Two tokens each for 0 and 1, mean 4/3, then take 1/8 from both and give 1/8 to expert 2.
    """
    share_TE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.2, 0.1], [0.5, 0.4, 0.2], [0.1, 0.7, 0.3]]).double()
    gate, logit_TE = naive.reading_logits(make(3, 1, width=3)), (share_TE / (1 - share_TE)).log()
    gate.bias_E.zero_()
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
    gate, x_TD = make(6, 2), naive.tokens(30)
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


def test_scores_that_underflow_leave_no_probability():
    """The sigmoid of -120 is 0 in float32: no expert has a share, and no loss becomes NaN."""
    gate = LossFree(width=4, num_experts=4, k=2, bias_update_rate=0.001)
    torch.nn.init.constant_(gate.gate_DE, -30.0)
    gating = gate(torch.ones(3, 4))
    assert gating.sums["probability_E"].tolist() == [0] * 4
    assert Switch(weight=1.0)(gating) == 0
