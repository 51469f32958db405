"""The Triton kernels of the noisy choice, run by Triton's interpreter on the CPU, against the reference in float64.

Shape suffixes: T tokens, E experts, F = 2 E.
"""

import math
import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from noisy_top_k_cases import KINDS, SIZES, chosen

from moe_lm.ops.routing import noisy_top_k as operation
from moe_lm.ops.triton.noisy_top_k import noisy_top_k


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_choice_and_gradient(sizes):
    """Choices, all noisy logits, chances, and the logits' gradient, whichever results have one."""
    for kind in KINDS:
        got = chosen(noisy_top_k, *sizes, kind, torch.float32)
        want = chosen(operation.reference, *sizes, kind, torch.float64)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3.0])
def test_odd_logits(odd):
    """A token gets k distinct experts: NaN and infinity come first, and the lower number among equal logits."""
    logit_TF = torch.zeros(3, 12)
    logit_TF[1, [1, 4]] = odd
    logit_TF[2] = odd
    with np.errstate(invalid="ignore"):  # chances of infinite logits
        top_TN, expert_TN, noisy_TE, _ = noisy_top_k(logit_TF, torch.zeros(3, 6), 0.01, 2)
    largest = odd != -torch.inf
    assert expert_TN.tolist() == [[0, 1, 2], [1, 4, 0] if largest else [0, 2, 3], [0, 1, 2]]
    torch.testing.assert_close(top_TN, noisy_TE.gather(1, expert_TN), equal_nan=True)


def test_nan_in_a_raw_logit_is_seen():
    """A raw logit of NaN makes that expert's noisy logit and its chance NaN."""
    logit_TF = torch.zeros(1, 6)
    logit_TF[0, 4] = torch.nan
    top_TN, expert_TN, noisy_TE, chance_TE = noisy_top_k(logit_TF, torch.zeros(1, 3), 0.01, 1)
    assert noisy_TE.isnan().tolist() == [[False, True, False]]
    assert expert_TN[0, 0] == 1
    assert top_TN[0, 0].isnan()
    assert chance_TE[0, 1].isnan()


def test_small_and_large_deviations():
    """Softplus keeps float32's precision where 1 + e would lose e, and where the exponential would overflow."""
    raw = [-18.0, -9.0, -0.5, 0.0, 19.9, 20.1, 90.0]
    logit_TF = torch.tensor([[0.0] * 7 + raw])
    draw_TE = torch.tensor([[1.0, 2.0, -1.0, 3.0, 1.0, -2.0, 1.0]])
    noisy_TE = noisy_top_k(logit_TF, draw_TE, 1e-12, 2)[2]
    want = [draw * (math.log1p(math.exp(x)) + 1e-12) for draw, x in zip(draw_TE[0].tolist(), raw, strict=True)]
    torch.testing.assert_close(noisy_TE[0].double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)


def test_equal_logits_at_the_border():
    """Experts 1 and 2 tie for the second place and neither counts as chosen: only expert 0 has the third as threshold.

    There is no noise, and each std is s = softplus(0.3) + 0.01. Expert i's chance has the slope c_i phi(z_i) / s in
    its own logit; the second largest logit loses the slopes of all unchosen experts, the third loses that of expert 0.
    """
    logit_TF = torch.tensor([[1.0, 0.0, 0.0, -1.0, 0.3, 0.3, 0.3, 0.3]]).requires_grad_()
    top_TN, expert_TN, _, chance_TE = noisy_top_k(logit_TF, torch.zeros(1, 4), 0.01, 2)
    assert top_TN.tolist() == [[1, 0, 0]]
    assert expert_TN.tolist() == [[0, 1, 2]]
    (chance_TE * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    deviation = math.log1p(math.exp(0.3)) + 0.01
    z = [x / deviation for x in (1.0, 0.0, 0.0, -1.0)]
    slopes = [
        c * math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / deviation for c, x in zip((1, 2, 3, 4), z, strict=True)
    ]
    want = [slopes[0], slopes[1] - sum(slopes[1:]), slopes[2] - slopes[0], slopes[3]]
    torch.testing.assert_close(logit_TF.grad[0, :4], torch.tensor(want), rtol=1e-5, atol=1e-6)
