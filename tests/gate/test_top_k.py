"""Noise-free top-k gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import naive
import pytest
import torch

from moe_lm.gate.top_k import TopK

SIZES = [(0, 4, 2), (1, 1, 1), (1, 4, 2), (30, 6, 2), (9, 5, 4), (9, 3, 3), (3, 8, 2)]
"""Tokens, experts and experts a token; of none, of one, of as many as there are, of fewer tokens than experts."""
ROWS = [4, 0, 9, 1]
"""Rows of each group, one of them empty."""
GROUP = naive.groups(ROWS)


def make(num_experts, k, num_groups=None, dtype=torch.float64, train=True, width=5):
    """A gate with a random matrix, as after some training."""
    gate = TopK(width=width, num_experts=num_experts, k=k, num_groups=num_groups)
    return naive.randomized(gate.to(dtype).train(train))


def by_hand(x_TD, w_DE, k):
    """Return the table of gate values and the sums."""
    num_experts = w_DE.shape[1]
    rows, requested_E, first_E = [], [0.0] * num_experts, [0.0] * num_experts
    probability_E, log_z_squared = [naive.ZERO] * num_experts, naive.ZERO
    for x_D in x_TD:
        e = [value.exp() for value in naive.logits(x_D, w_DE)]
        order = sorted(range(num_experts), key=lambda i: -e[i].item())
        survivors = sum(e[i] for i in order[:k])
        rows.append([e[i] / survivors if i in order[:k] else naive.ZERO for i in range(num_experts)])
        first_E[order[0]] += 1
        for i in order[:k]:
            requested_E[i] += 1
        for i in range(num_experts):
            probability_E[i] = probability_E[i] + e[i] / sum(e)
        log_z_squared = log_z_squared + sum(e).log() ** 2
    return naive.stacked(rows, num_experts), naive.sums_of(
        requested_E, first_E, probability_E, log_z_squared, len(x_TD)
    )


def reference(gate, x_TD, k, grouped):
    """What the loops give: of the whole, or of each group's rows with its matrix."""
    if grouped:
        return naive.in_groups(by_hand, [x_TD.split(ROWS), gate.gate_DE], k)
    return by_hand(x_TD, gate.gate_DE, k)


@naive.each("train", [True, False])
@naive.each(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, train):
    """Gates, importance, load and sums are those of the loops, in evaluation without the sums."""
    gate, x_TD = make(num_experts, k, train=train), naive.tokens(num_tokens)
    naive.check(gate(x_TD), *reference(gate, x_TD, k, False), k * num_tokens, train)


@naive.each("train", [True, False])
@naive.each(("num_experts", "k"), [(5, 2), (4, 4), (1, 1), (12, 3)])
def test_groups_follow_the_equations_each_with_its_own_matrix(num_experts, k, train):
    """A row chooses among its group's experts alone; sums are over all groups' experts and rows."""
    gate, x_TD = make(num_experts, k, num_groups=4, train=train), naive.tokens(sum(ROWS))
    naive.check(gate(x_TD, GROUP), *reference(gate, x_TD, k, True), k * len(x_TD), train)


@naive.each("what", ["gate", "importance", "probability_E", "log_z_squared"])
@naive.each("grouped", [False, True])
@naive.each(("num_experts", "k"), [(5, 2), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g through gates, importance and both sums that have one equal those of the loops."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), naive.tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP if grouped else None)
    naive.check_gradients(what, gating, *reference(gate, x_TD, k, grouped), (x_TD, gate.gate_DE))


def test_by_hand_on_paper():
    """Logits of ln 4, ln 2 and ln 1 leave gates of 4/6 and 2/6, and ln 1, ln 3, ln 9 of 3/12 and 9/12."""
    logit_TE = torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 9.0]]).double().log()
    gate = naive.reading_logits(make(3, 2, width=3))
    gating = gate(logit_TE)
    assert gating.token_A.tolist() == [0, 0, 1, 1]
    assert gating.expert_A.tolist() == [0, 1, 1, 2]
    assert gating.gate_A.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 4, 3 / 4])
    assert gating.importance_E.tolist() == pytest.approx([2 / 3, 7 / 12, 3 / 4])
    assert gating.load_E.tolist() == gating.sums["requested_E"].tolist() == [1, 2, 1]
    assert gating.sums["first_choice_E"].tolist() == [1, 0, 1]
    assert gating.sums["probability_E"].tolist() == pytest.approx([4 / 7 + 1 / 13, 2 / 7 + 3 / 13, 1 / 7 + 9 / 13])
    log_7, log_13 = torch.tensor([7.0, 13.0]).double().log().tolist()
    assert gating.sums["log_z_squared"].item() == pytest.approx(log_7**2 + log_13**2)
    assert gating.sums["num_tokens"].item() == 2


@naive.each("num_experts", [2, 4])
def test_one_of_several_experts_is_refused(num_experts):
    """Its gate value would be the constant 1, and the gate would never learn; the only expert there is may be one."""
    with pytest.raises(ValueError, match="learns nothing") as caught:
        TopK(width=3, num_experts=num_experts, k=1)
    assert "model.k=2" in str(caught.value)
    assert "\n" not in str(caught.value)
    TopK(width=3, num_experts=1, k=1)


@naive.each("train", [True, False])
def test_no_random_number_is_ever_drawn(train):
    """The generator stands where it stood, so there is no noise."""
    gate, x_TD = make(6, 2, train=train), naive.tokens(30)
    before = torch.get_rng_state()
    first = gate(x_TD)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(naive.dense(first), naive.dense(gate(x_TD)))


def test_large_logits_stay_finite():
    """Logits in the thousands give gates that sum to 1 and finite sums and gradients, in float32."""
    gate, x_TD = make(6, 2, dtype=torch.float32), (naive.tokens(30, dtype=torch.float32) * 3000).requires_grad_()
    gating = gate(x_TD)
    torch.testing.assert_close(naive.dense(gating).sum(dim=1), torch.ones(30))
    assert all(value.isfinite().all() for value in gating.sums.values())
    (gating.gate_A.square().sum() + gating.sums["probability_E"].square().sum()).backward()
    assert x_TD.grad.isfinite().all()
    assert gate.gate_DE.grad.isfinite().all()
