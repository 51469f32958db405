"""What is the same of every gate: arithmetic under autocast, costs, refusals, ties, and what a choice looks at."""

from functools import partial

import naive
import pytest
import torch

from moe_lm.errors import UserError
from moe_lm.gate.expert_choice import ExpertChoice
from moe_lm.gate.gshard import GShard
from moe_lm.gate.loss_free import LossFree
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.sinkhorn import Sinkhorn
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.gate.switch import Switch
from moe_lm.gate.top_k import TopK

GATES = {
    "expert_choice": ExpertChoice,
    "gshard": partial(GShard, capacity_factor=1.0),
    "loss_free": partial(LossFree, bias_update_rate=0.125),
    "noisy_top_k": partial(NoisyTopK, noise_epsilon=0.01),
    "sinkhorn": partial(Sinkhorn, tolerance=1e-4, max_iterations=100),
    "strictly_balanced": StrictlyBalanced,
    "switch": partial(Switch, capacity_factor=1.0, jitter=0.2),
    "top_k": TopK,
}
ROWS = [4, 0, 15, 1]
"""Rows of each group, one of them empty."""


def make(name, num_experts, k, num_groups=None, dtype=torch.float64, **options):
    """A gate in training with random matrices, after one adaptation where it adapts."""
    gate = naive.randomized(
        GATES[name](width=5, num_experts=num_experts, k=k, num_groups=num_groups, **options).to(dtype)
    )
    if name == "noisy_top_k":
        torch.nn.init.normal_(gate.noise_DE, generator=torch.Generator().manual_seed(1))
    if hasattr(gate, "adapt"):
        group_T = None if num_groups is None else torch.arange(num_groups).repeat_interleave(10)
        gate.adapt(gate(naive.tokens(10 * (num_groups or 1), seed=3, dtype=dtype), group_T).statistics())
    return gate


def seeded(gate, *inputs):
    """The gating with the same random numbers each time."""
    torch.manual_seed(0)
    return gate(*inputs)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_autocast_leaves_the_gate_in_float32(name, grouped):
    """Under bfloat16 autocast the gating is bit for bit that of float32, for float32 and for bfloat16 tokens."""
    gate = make(name, 6, 1 if name == "switch" else 2, len(ROWS) if grouped else None, torch.float32)
    x_TD, group_T = naive.tokens(sum(ROWS), dtype=torch.float32), naive.groups(ROWS) if grouped else None
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_rounded = seeded(gate, x_TD, group_T), seeded(gate, x_TD.bfloat16(), group_T)
    plain, rounded = seeded(gate, x_TD, group_T), seeded(gate, x_TD.bfloat16().float(), group_T)
    for got, want in ((cast, plain), (cast_rounded, rounded)):
        assert torch.equal(naive.dense(got), naive.dense(want))
        assert got.sums.keys() == want.sums.keys()
        pairs = [(getattr(got, part), getattr(want, part)) for part in ("gate_A", "importance_E", "load_E")]
        for mine, theirs in [*pairs, *((got.sums[key], want.sums[key]) for key in want.sums)]:
            assert mine.dtype == torch.float32
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", GATES)
def test_operations_are_those_of_the_matrices(name):
    """512 x 256 multiply-adds, and with 16 groups of 16 experts 512 x 16, one group's; noise has a second matrix.

    So a width of 512 and 256 experts cost noisy gating 0.262 M, as Table 7's 8.6 M for MoE-256 implies.
    """
    matrices, k = 2 if name == "noisy_top_k" else 1, 1 if name == "switch" else 2
    assert GATES[name](width=512, num_experts=256, k=k).operations_per_timestep() == matrices * 131_072
    grouped = GATES[name](width=512, num_experts=16, k=k, num_groups=16)
    assert grouped.operations_per_timestep() == matrices * 8_192


ANY_K = ["expert_choice", "loss_free", "noisy_top_k", "sinkhorn", "strictly_balanced"]
REFUSED = [(name, *sizes) for name in [*ANY_K, "top_k"] for sizes in ((4, 0), (4, 5), (4, -1), (0, 1))]
REFUSED += [("top_k", 4, 1), ("top_k", 2, 1)]
REFUSED += [("gshard", *sizes) for sizes in ((4, 0), (4, 1), (4, 3), (1, 2), (0, 1))]
REFUSED += [("switch", *sizes) for sizes in ((4, 0), (4, 2), (1, 2), (0, 1))]
"""Too many experts a token or none; for top_k one of several, a gate that is the constant 1 and never learns; for
gshard another number than two, or than one of one; for switch another number than one."""


@pytest.mark.parametrize(("name", "num_experts", "k"), REFUSED)
def test_a_wrong_k_is_a_mistake_of_one_line(name, num_experts, k):
    """A number of experts a token that the gate is not defined for is refused with the key to change."""
    with pytest.raises(UserError) as caught:
        GATES[name](width=3, num_experts=num_experts, k=k)
    assert (f"model.k={k}" if name in ANY_K else "model.k=") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
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

    Of GShard's two equal gate values 2 g2 = 1 is above any draw.
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


@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
@pytest.mark.parametrize(
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


@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn"])
def test_training_looks_at_all_tokens_and_evaluation_at_one(name):
    """In evaluation the first tokens alone are gated as among the others, in training not."""
    gate, x_TD = make(name, 6, 2), naive.tokens(60)
    assert not torch.equal(naive.dense(gate(x_TD))[:20] > 0, naive.dense(gate(x_TD[:20])) > 0)
    gate.eval()
    torch.testing.assert_close(naive.dense(gate(x_TD))[:20], naive.dense(gate(x_TD[:20])))
