"""The noisy choice on a CPU against its plain reference, which tests/gate/test_noisy_top_k.py compares with the paper.

Shape suffixes: T tokens, E experts, F = 2 E, N largest logits of a token.
"""

import math
from itertools import product

import pytest
import torch
from noisy_top_k_cases import KINDS, SIZES, chosen

from moe_lm.ops.routing import _top_k, noisy_top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_and_gradients_are_the_references(dtype):
    """Whichever results have a gradient; choices are the same, numbers to rounding."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for sizes in SIZES:
        for kind in KINDS:
            got, want = (chosen(version, *sizes, kind, dtype) for version in (noisy_top_k, noisy_top_k.reference))
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_equal_and_odd_logits_still_choose_different_experts(k):
    """Any six of NaN, infinities and equal numbers choose N different experts, the largest first, NaN before all."""
    clean_TE = torch.tensor(list(product([torch.nan, 1.0, 2.0, torch.inf, -torch.inf], repeat=6)))
    logit_TF, draw_TE = torch.cat([clean_TE, torch.zeros_like(clean_TE)], dim=1), torch.zeros_like(clean_TE)
    top_TN, expert_TN, noisy_TE, _ = noisy_top_k(logit_TF, draw_TE, 0.01, k)
    torch.testing.assert_close(noisy_TE, clean_TE, equal_nan=True)
    torch.testing.assert_close(top_TN, noisy_TE.topk(min(k + 1, 6), dim=1).values, equal_nan=True)
    torch.testing.assert_close(noisy_TE.gather(1, expert_TN), top_TN, equal_nan=True)
    assert all(len(set(row)) == min(k + 1, 6) for row in expert_TN.tolist())


def test_the_first_chosen_of_equal_logits_is_the_threshold_of_all():
    """P(x, i) grows with each clean logit by c = 1 / (std sqrt(2 pi)), and falls with the k-th largest, by hand.

    Incoming gradients are left as they were.
    """
    logit_TF, draw_TE = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True), torch.zeros(1, 3).double()
    grad_top_TN, grad_chance_TE = torch.tensor([[5.0, 7.0]]).double(), torch.tensor([[1.0, 2.0, 4.0]]).double()
    top_TN, expert_TN, _, chance_TE = noisy_top_k(logit_TF, draw_TE, 0.01, 1)
    torch.autograd.backward([top_TN, chance_TE], [grad_top_TN, grad_chance_TE])
    c = 1 / ((math.log(2) + 0.01) * math.sqrt(2 * math.pi))
    want_E = c * grad_chance_TE[0]
    want_E[expert_TN[0]] += torch.tensor([5 - 7 * c, 7.0]).double()
    torch.testing.assert_close(logit_TF.grad, torch.cat([want_E, torch.zeros(3).double()]).unsqueeze(0))
    assert grad_top_TN.tolist() == [[5, 7]]
    assert grad_chance_TE.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("k", [1, 2, 5, 15])
@pytest.mark.parametrize("num_experts", [32, 63, 256])
def test_top_k_is_torchs_bit_for_bit(num_experts, k):
    """Values and indices, of ordinary rows, rows with ties, zeros of both signs, NaN, infinities, and no rows."""
    generator = torch.Generator().manual_seed(k)
    x_TE = torch.randn(400, num_experts, generator=generator)
    x_TE[:50] = (x_TE[:50] * 4).round() / 4
    x_TE[50:60] *= 1e-42  # subnormal numbers
    x_TE[60, ::2] = x_TE[61, 3] = x_TE[62, -1] = torch.nan
    x_TE[63, 1::3], x_TE[64, 5], x_TE[65] = torch.inf, torch.inf, -torch.inf
    x_TE[66:68] = 0.0
    x_TE[66, ::3] = -0.0
    for rows in (x_TE, x_TE[100:], x_TE[:0]):
        got, want = _top_k(rows, k), rows.topk(k, dim=1)
        assert torch.equal(got[0].view(torch.int32), want[0].view(torch.int32))
        assert torch.equal(got[1], want[1])
