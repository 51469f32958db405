"""Equal logits, and the tokens that each expert takes, of the gates that are listed."""

import naive
import pytest
import torch


def make(name, num_experts, k, **options):
    """A gate in training with a random matrix."""
    return naive.randomized(naive.partial_of(name)(width=5, num_experts=num_experts, k=k, **options).double())


@naive.each(
    ("name", "num_experts", "k", "options", "value"),
    [
        ("top_k", 5, 3, {}, 1 / 3),
        ("gshard", 5, 2, {"capacity_factor": 5.0}, 1 / 2),
        ("switch", 5, 1, {"capacity_factor": 5.0}, 1 / 5),
        ("sinkhorn", 4, 1, {}, 1 / 2),
        ("sinkhorn", 4, 2, {}, 1 / 4),
    ],
)
def test_equal_logits_give_every_token_k_experts_with_equal_gates(name, num_experts, k, options, value):
    """Where all logits tie, each token still has k different experts, none dropped where there is place for all.

    GShard's second choice is always drawn: 2 g2 = 1 is above any draw.
    """
    gate = make(name, num_experts, k, **options)
    with torch.no_grad():
        gate.gate_DE.zero_()
    gating = gate(naive.tokens(50))
    assert (naive.dense(gating) > 0).sum(dim=1).tolist() == [k] * 50
    assert gating.gate_A.tolist() == pytest.approx([value] * 50 * k)
    if "probability_E" in gating.sums:
        assert gating.sums["probability_E"].tolist() == pytest.approx([50 / num_experts] * num_experts)


TAKEN = [
    *[(0, 4, 2, None, 0), (1, 4, 2, None, 1), (12, 4, 2, None, 6), (10, 4, 1, None, 3), (9, 4, 1, None, 2)],
    *[(8, 3, 3, None, 8), (3, 100, 2, None, 1)],
]
BY_FACTOR = [(8, 4, 1, 0.5, 1), (12, 8, 1, 3.0, 5), (4, 8, 8, 0.1, 1)]
"""Tokens, experts, experts a token, capacity factor and the tokens m that each expert takes."""


@naive.each("equal", [False, True])
@naive.each(
    ("name", "num_tokens", "num_experts", "k", "factor", "m"),
    [
        *[("expert_choice", *sizes) for sizes in [*TAKEN, *BY_FACTOR]],
        *[("strictly_balanced", *sizes) for sizes in TAKEN],
    ],
)
def test_every_expert_takes_m_tokens(name, num_tokens, num_experts, k, factor, m, equal):
    """m = c T / E, a half upwards, at least 1 and at most T; of equal scores the earlier tokens' are taken."""
    gate = make(name, num_experts, k, **({} if factor is None else {"capacity_factor": factor}))
    gating = gate(torch.ones(num_tokens, 5).double() if equal else naive.tokens(num_tokens))
    assert gating.load_E.tolist() == [m] * num_experts
    assert gating.num_requested == num_experts * m
    if equal:
        assert gating.token_A.tolist() == list(range(m)) * num_experts
