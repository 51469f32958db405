"""The loss of strictly balanced gating (Appendix F), worked by hand, and the thresholds that it teaches.

Shape suffixes: T tokens, D width, E experts.
"""

import pytest
import torch

from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.loss.objective import Batchwise, Objective, add_statistics, statistics_of

BATCHWISE = Batchwise(weight=1.0)


def gate_of(threshold, k=1, width=None):
    """A gate in float64 whose tokens are logits (W_g is the identity), with these thresholds."""
    num_experts = len(threshold)
    gate = StrictlyBalanced(width=width or num_experts, num_experts=num_experts, k=k).double()
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(*gate.gate_DE.shape))
        gate.threshold_E.copy_(torch.tensor(threshold, dtype=torch.float64))
    return gate


# Two tokens, two experts, k = 1: each expert takes one token. Expert 0 takes token 0, expert 1 takes token 1.
SHARES = torch.tensor([[0.8, 0.2], [0.6, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("threshold", "loss", "gradient"),
    [
        ([0.7, 0.1], (0.2 - 0.1) / 2, [0, -0.5]),  # expert 1 lets token 0 in: its threshold must rise
        ([0.9, 0.3], (0.9 - 0.8) / 2, [0.5, 0]),  # expert 0 keeps token 0 out: its threshold must fall
        ([0.5, 0.5], (0.6 - 0.5 + 0.5 - 0.4) / 2, [-0.5, 0.5]),
        ([0.7, 0.3], 0, [0, 0]),  # the masks coincide
    ],
    ids=str,
)
def test_loss_and_gradient_by_hand(threshold, loss, gradient):
    """Each pair in one mask only counts its distance from the threshold, a token."""
    gate = gate_of(threshold)
    value = BATCHWISE(gate(SHARES.log()))
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert gate.threshold_E.grad.tolist() == pytest.approx(gradient, abs=1e-12)


def test_gradient_reaches_the_matrix_by_hand():
    """A gate value above its threshold that the batch does not take is pushed down: dL/dz = G (1 - G) / |X|."""
    gate = gate_of([0.7, 0.1])
    logit_TE = SHARES.log().requires_grad_()
    BATCHWISE(gate(logit_TE)).backward()
    want = torch.tensor([[-0.2 * 0.8, 0.2 * 0.8], [0, 0]], dtype=torch.float64) / 2
    torch.testing.assert_close(logit_TE.grad, want)


def test_never_negative_and_zero_only_where_the_masks_coincide():
    """Random thresholds give a positive loss; any between the m-th and the next largest value give 0."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        logit_TE = torch.randn(24, 6, dtype=torch.float64, generator=generator)
        gate = gate_of(torch.rand(6, generator=generator).tolist(), k=2)
        assert BATCHWISE(gate(logit_TE)).item() > 0
        sorted_TE = logit_TE.softmax(dim=1).sort(dim=0, descending=True).values
        within = torch.rand(6, generator=generator, dtype=torch.float64)
        between = sorted_TE[7].lerp(sorted_TE[8], within.clamp(0.01, 0.99))  # m = 2 * 24 / 6 = 8
        assert BATCHWISE(gate_of(between.tolist(), k=2)(logit_TE)).item() == 0, seed


def test_descent_finds_the_thresholds():
    """Thresholds taught by this loss alone let k experts a token through on new tokens, k / n of them each expert."""
    num_experts, k = 8, 2
    torch.manual_seed(0)
    gate = StrictlyBalanced(width=5, num_experts=num_experts, k=k)
    with torch.no_grad():
        gate.gate_DE.normal_()
    test_TD = torch.randn(40_000, 5)
    before = gate.eval()(test_TD).load_E / 40_000
    optimizer = torch.optim.SGD([gate.threshold_E], lr=0.1)
    gate.train()
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step / 50)
        BATCHWISE(gate(torch.randn(400, 5))).backward()
        optimizer.step()
        optimizer.zero_grad()
    gating = gate.eval()(test_TD)
    assert (before - k / num_experts).abs().max() > 0.1
    assert gating.num_requested / 40_000 == pytest.approx(k, rel=0.02)
    # Noise: 0.0022 of the test's own 40,000 tokens (one standard error), about as much of the last steps'.
    assert (gating.load_E / 40_000 - k / num_experts).abs().max() < 0.0125


def test_micro_batches_add_up():
    """With global sums the loss is one mean over all tokens, and its gradients add up to that mean's."""
    torch.manual_seed(0)
    gate, x_TD = gate_of([0.3, 0.2, 0.1], width=4), torch.randn(30, 4, dtype=torch.float64)
    parts, weight = [x_TD[:4], x_TD[4:], x_TD[:0]], 0.5
    gap = sum(gate(part).sums["threshold_gap"] for part in parts)
    want = torch.autograd.grad(weight * gap / 30, [gate.gate_DE, gate.threshold_E])
    objective, global_stats = Objective({"batchwise": Batchwise(weight=weight)}), None
    for part in parts:
        global_stats = add_statistics(global_stats, statistics_of({"middle": gate(part)}))
    for part in parts:
        total, terms = objective(torch.zeros(()), 1, {"middle": gate(part)}, global_stats)
        total.backward()
        assert float(terms["batchwise"]) == pytest.approx(gap.item() / 30)
    torch.testing.assert_close([gate.gate_DE.grad, gate.threshold_E.grad], list(want))


def test_a_batch_without_tokens_costs_nothing():
    """No token, no loss, and gradients of 0."""
    gate = gate_of([0.3, 0.7])
    value = BATCHWISE(gate(torch.zeros(0, 2).double()))
    value.backward()
    assert value.item() == 0
    assert gate.threshold_E.grad.tolist() == [0, 0]


def test_of_another_gate_it_is_nothing():
    """In a model with several gates a gate without thresholds adds nothing, and no gradient."""
    gating = NoisyTopK(width=2, num_experts=3, k=1, noise_epsilon=0.01)(torch.zeros(4, 2))
    assert BATCHWISE(gating).tolist() == 0
    assert not BATCHWISE(gating).requires_grad


def test_a_negative_weight_is_a_mistake():
    """The loss is unweighted, the objective multiplies; a weight below 0 is refused."""
    assert Batchwise(weight=0.3).weight == 0.3
    with pytest.raises(ValueError, match="at least 0"):
        Batchwise(weight=-1.0)
