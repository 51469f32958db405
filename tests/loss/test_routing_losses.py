"""The losses of Switch, GShard and ST-MoE against their equations, by hand and through the gates.

Shape suffixes: T tokens, D width, E experts (of a group), G groups.
"""

import pytest
import torch

from moe_lm.gate import Gating
from moe_lm.gate.expert_choice import ExpertChoice
from moe_lm.gate.gshard import GShard as GShardGate
from moe_lm.gate.loss_free import LossFree
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.sinkhorn import Sinkhorn
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.gate.switch import Switch as SwitchGate
from moe_lm.gate.top_k import TopK
from moe_lm.loss.objective import GShardLoss as GShard
from moe_lm.loss.objective import Objective, ZLoss, add_statistics, statistics_of
from moe_lm.loss.objective import SwitchLoss as Switch

SWITCH, GSHARD, Z_LOSS = Switch(weight=1.0), GShard(weight=1.0), ZLoss(weight=1.0)
ALL_FIVE = {"requested_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens"}
GATES = {
    "noisy_top_k": (NoisyTopK, 2, {"noise_epsilon": 0.01}),
    "top_k": (TopK, 2, {}),
    "gshard": (GShardGate, 2, {"capacity_factor": 0.5}),
    "switch": (SwitchGate, 1, {"capacity_factor": 0.5, "jitter": 0.0}),
    "loss_free": (LossFree, 2, {"bias_update_rate": 0.001}),
    "expert_choice": (ExpertChoice, 2, {}),
    "sinkhorn": (Sinkhorn, 2, {"tolerance": 1e-4, "max_iterations": 100}),
    "strictly_balanced": (StrictlyBalanced, 2, {}),
}
"""Class, k and options of each gate."""
WITH_PROBABILITY = ["top_k", "gshard", "switch", "loss_free"]
"""Gates without noise that give every sum."""


def make(name, num_experts=5, num_groups=None):
    """A gate with a random matrix, and of the loss-free one with random biases."""
    kind, k, options = GATES[name]
    gate = kind(width=4, num_experts=num_experts, k=k, num_groups=num_groups, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=generator)
        if name == "loss_free":
            gate.bias_E.normal_(std=0.3, generator=generator)
    return gate


def tokens(num_tokens, seed=1):
    return torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gating_of(num_tokens, **sums):
    """A gating that holds these sums and no assignments."""
    empty = torch.zeros(0, dtype=torch.int64)
    sums = {name: torch.tensor(value).double() for name, value in sums.items()}
    zeros_E = torch.zeros(len(sums["probability_E"])).double()
    sums["num_tokens"] = torch.tensor(float(num_tokens)).double()
    return Gating(
        token_A=empty,
        expert_A=empty,
        gate_A=torch.zeros(0).double(),
        num_tokens=num_tokens,
        importance_E=zeros_E,
        load_E=zeros_E,
        num_requested=0,
        sums=sums,
    )


def by_hand(name, x_TD, gate):
    """Return the losses of Switch, GShard and ST-MoE, token by token and expert by expert; GShard's as printed.

    GShard's printed loss is (1/E) sum_e (c_e / S) m_e, c of first choices: E^2 times that is 1 at its least.
    """
    num_tokens, num_experts, k = len(x_TD), gate.num_experts, GATES[name][1]
    asked, first, mean, z_loss = [0] * num_experts, [0] * num_experts, [0] * num_experts, 0
    for x_D in x_TD:
        z = [sum(x_D[d] * gate.gate_DE[d, i] for d in range(len(x_D))) for i in range(num_experts)]
        value = [1 / (1 + (-y).exp()) for y in z] if name == "loss_free" else [y.exp() for y in z]
        rank = [v + gate.bias_E[i] for i, v in enumerate(value)] if name == "loss_free" else value
        order = sorted(range(num_experts), key=lambda i, rank=rank: -rank[i].item())
        first[order[0]] += 1
        for i in order[:k]:
            asked[i] += 1
        mean = [m + v / sum(value) / num_tokens for m, v in zip(mean, value, strict=True)]
        z_loss = z_loss + sum(y.exp() for y in z).log() ** 2 / num_tokens
    switch = num_experts * sum(count / (k * num_tokens) * m for count, m in zip(asked, mean, strict=True))
    printed = sum(count / num_tokens * m for count, m in zip(first, mean, strict=True)) / num_experts
    return switch, num_experts**2 * printed, z_loss


@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("name", WITH_PROBABILITY)
def test_losses_and_gradients_through_the_gates(name, num_tokens):
    """Each loss and its gradient to x and W_g is that of the loops: only P and log Z carry it."""
    gate, x_TD = make(name), tokens(num_tokens).requires_grad_()
    gating, inputs = gate(x_TD), (x_TD, gate.gate_DE)
    for loss, want in zip((SWITCH, GSHARD, Z_LOSS), by_hand(name, x_TD, gate), strict=True):
        got = loss(gating)
        assert got.shape == ()
        torch.testing.assert_close(got, want)
        mine, theirs = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (got, want))
        torch.testing.assert_close(mine, theirs)
        assert all(grad.abs().max() > 1e-6 for grad in mine)


@pytest.mark.parametrize("name", GATES)
def test_sums_of_each_gate(name):
    """Choices and probabilities where tokens choose; log Z and the number of tokens from all; in training only."""
    gate, x_TD = make(name), tokens(30)
    sums = gate(x_TD).sums
    if name in [*WITH_PROBABILITY, "noisy_top_k"]:
        assert set(sums) == ALL_FIVE
        assert sums["requested_E"].sum().item() == 30 * GATES[name][1]
        assert sums["first_choice_E"].sum().item() == 30
        assert sums["probability_E"].sum().item() == pytest.approx(30)
        assert not sums["requested_E"].requires_grad
        assert not sums["first_choice_E"].requires_grad
    else:
        assert set(sums) & ALL_FIVE == {"log_z_squared", "num_tokens"}
    if name != "noisy_top_k":
        want = sum(z_E.exp().sum().log() ** 2 for z_E in x_TD @ gate.gate_DE)
        torch.testing.assert_close(sums["log_z_squared"], want)
    assert sums["num_tokens"].item() == 30
    assert not gate.eval()(x_TD).sums


def test_noisy_choices_are_counted_as_made():
    """Of the noisy gate the choices are those in the list, and the first is the one with the larger gate value."""
    gating = make("noisy_top_k")(tokens(30))
    table = torch.zeros(30, 5).double().index_put((gating.token_A, gating.expert_A), gating.gate_A.detach())
    assert gating.sums["requested_E"].tolist() == (table > 0).sum(dim=0).tolist()
    assert gating.sums["first_choice_E"].tolist() == table.argmax(dim=1).bincount(minlength=5).tolist()


@pytest.mark.parametrize("name", WITH_PROBABILITY)
def test_groups_count_all_groups_experts(name):
    """With groups, f and P are shares of all rows: a group's part of 3 counts 3 (rows / T)^2 times, or rows / T."""
    rows = [7, 0, 12]
    gate, x_TD = make(name, num_groups=3), tokens(19)
    gating = gate(x_TD, torch.arange(3).repeat_interleave(torch.tensor(rows)))
    want = [0, 0, 0]
    for g, part_TD in enumerate(x_TD.split(rows)):
        if rows[g]:
            flat = make(name)
            flat.gate_DE.data.copy_(gate.gate_DE[g])
            if name == "loss_free":
                flat.bias_E.copy_(gate.bias_E[5 * g : 5 * g + 5])
            share = rows[g] / 19
            factors = (3 * share**2, 3 * share**2, share)  # three times as many experts
            want = [w + f * part for w, f, part in zip(want, factors, by_hand(name, part_TD, flat), strict=True)]
    for loss, value in zip((SWITCH, GSHARD, Z_LOSS), want, strict=True):
        torch.testing.assert_close(loss(gating), value)


def test_by_hand_on_paper():
    """Four tokens, two experts: f = 3/4, 1/4, P = 0.6, 0.4 give 2 (0.45 + 0.1); of all choices f is a half each."""
    gating = gating_of(4, requested_E=[4, 4], first_choice_E=[3, 1], probability_E=[2.4, 1.6], log_z_squared=6.0)
    assert SWITCH(gating).item() == pytest.approx(1.0)
    assert GSHARD(gating).item() == pytest.approx(1.1)
    assert Z_LOSS(gating).item() == pytest.approx(1.5)
    gating = gating_of(4, requested_E=[3, 1], first_choice_E=[1, 3], probability_E=[2.4, 1.6], log_z_squared=0.0)
    assert SWITCH(gating).item() == pytest.approx(1.1)
    assert GSHARD(gating).item() == pytest.approx(0.9)


def test_gradient_goes_through_the_probabilities_alone():
    """The gradient to expert i's sum of probabilities is E f_i / T, and the counts are constants."""
    gating = gating_of(4, requested_E=[6, 2], first_choice_E=[1, 3], probability_E=[2.4, 1.6])
    for values in gating.sums.values():
        values.requires_grad_()
    for loss, want in ((SWITCH, [2 * 0.75 / 4, 2 * 0.25 / 4]), (GSHARD, [2 * 0.25 / 4, 2 * 0.75 / 4])):
        (grad,) = torch.autograd.grad(loss(gating), gating.sums["probability_E"])
        assert grad.tolist() == pytest.approx(want)


def test_least_where_uniform_and_most_where_crowded():
    """1 where choices or probabilities are uniform, E where one expert has all, and never below 1 if both agree."""
    for num_experts in (1, 2, 7):
        one, all_to_first = [1.0] * num_experts, [float(num_experts)] + [0.0] * (num_experts - 1)
        for counts, probability, want in ((one, one, 1), (all_to_first, one, 1), (all_to_first, all_to_first, None)):
            gating = gating_of(num_experts, requested_E=counts, first_choice_E=counts, probability_E=probability)
            assert SWITCH(gating).item() == pytest.approx(want or num_experts)
            assert GSHARD(gating).item() == pytest.approx(want or num_experts)


def test_gshards_loss_ignores_second_choices():
    """Moving the second choices changes Switch's loss and not GShard's."""
    sums = {"first_choice_E": [5, 1, 0], "probability_E": [3.0, 2.0, 1.0]}
    one, other = gating_of(6, requested_E=[6, 6, 0], **sums), gating_of(6, requested_E=[5, 1, 6], **sums)
    assert GSHARD(one) == GSHARD(other)
    assert SWITCH(one) != SWITCH(other)


def test_capacity_does_not_enter_the_losses():
    """Whether choices are dropped or not, the counts are those before any capacity."""
    x_TD = tokens(30)
    for name in ("switch", "gshard"):
        kind, k, options = GATES[name]
        values = []
        for factor in (0.1, 5.0):
            gate = kind(width=4, num_experts=5, k=k, **{**options, "capacity_factor": factor}).double()
            gate.gate_DE.data.copy_(make(name).gate_DE)
            values.append([loss(gate(x_TD)).item() for loss in (SWITCH, GSHARD, Z_LOSS)])
        assert values[0] == pytest.approx(values[1], abs=1e-12)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("loss", [SWITCH, GSHARD, Z_LOSS], ids=["switch", "gshard", "z_loss"])
def test_a_batch_without_tokens_costs_nothing(loss, name):
    """No token, no loss, and no gradient of NaN."""
    gate, x_TD = make(name), tokens(0).requires_grad_()
    value = loss(gate(x_TD))
    assert value.item() == 0
    if value.requires_grad:
        value.backward()
        assert gate.gate_DE.grad is None or not gate.gate_DE.grad.any()


@pytest.mark.parametrize("loss", [Switch, GShard, ZLoss])
@pytest.mark.parametrize("name", WITH_PROBABILITY)
def test_micro_batches_add_up(loss, name):
    """With global sums the loss is one over all tokens, and the parts' gradients add up to that loss's."""
    gate, x_TD, weight = make(name), tokens(30), 0.5
    parts = [x_TD[:4], x_TD[4:], x_TD[:0]]
    want = by_hand(name, x_TD, gate)[(Switch, GShard, ZLoss).index(loss)]
    (gradient,) = torch.autograd.grad(weight * want, [gate.gate_DE])
    objective, global_stats = Objective({"balance": loss(weight=weight)}), None
    for part in parts:
        global_stats = add_statistics(global_stats, statistics_of({"middle": gate(part)}))
    for part in parts:
        total, terms = objective(torch.zeros(()), 1, {"middle": gate(part)}, global_stats)
        total.backward()
        assert float(terms["balance"]) == pytest.approx(want.item())
    torch.testing.assert_close(gate.gate_DE.grad, gradient)


@pytest.mark.parametrize("loss", [Switch, GShard, ZLoss])
def test_the_weight_is_kept_and_not_applied(loss):
    """The loss is unweighted, the objective multiplies; a weight below 0 is refused."""
    gating = gating_of(2, requested_E=[1, 1], first_choice_E=[1, 1], probability_E=[1.0, 1.0], log_z_squared=2.0)
    assert loss(weight=0.3).weight == 0.3
    assert loss(weight=0.3)(gating).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 0"):
        loss(weight=-1.0)
