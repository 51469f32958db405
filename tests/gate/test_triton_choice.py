"""The GPU's kernels of the noisy choice, run by Triton's interpreter, against torch's operators in float64.

Those are held against the paper's equations in test_noisy_top_k. Shape suffixes: T tokens, E experts, F = 2 E.
"""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from choices_of_kernels import KINDS, SIZES, chosen

from moe_lm.gate.noisy_choice import _ChoiceInAKernel, _NoisyChoice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_choice_and_gradient(sizes, kind):
    """What is chosen, all noisy logits, chances, and the logits' gradient, whichever results have one."""
    for got, want in zip(chosen(_ChoiceInAKernel, *sizes, kind), chosen(_NoisyChoice, *sizes, kind), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3.0])
def test_odd_logits(odd):
    """k distinct experts whatever the logits: NaN and infinity first; of equal ones those of the lowest numbers."""
    logit_TF = torch.zeros(3, 12)
    logit_TF[1, [1, 4]] = odd
    logit_TF[2] = odd
    with np.errstate(invalid="ignore"):  # chances of infinite logits
        top_TN, expert_TN, noisy_TE, _ = _ChoiceInAKernel.apply(logit_TF, torch.zeros(3, 6), 0.01, 2)
    largest = odd != -torch.inf
    assert expert_TN.tolist() == [[0, 1, 2], [1, 4, 0] if largest else [0, 2, 3], [0, 1, 2]]
    torch.testing.assert_close(top_TN, noisy_TE.gather(1, expert_TN), equal_nan=True)


def test_equal_logits_at_the_border():
    """Experts that tie at the border have one threshold, and the gradient of sums that test_noisy_top_k derives."""
    logit_TF = torch.tensor([[1.0, 0.0, 0.0, -1.0, 0.3, 0.3, 0.3, 0.3]])
    grads = []
    for function, dtype in ((_ChoiceInAKernel, torch.float32), (_NoisyChoice, torch.float64)):
        logit = logit_TF.to(dtype, copy=True).requires_grad_()
        *_, chance_TE = function.apply(logit, torch.zeros(1, 4, dtype=dtype), 0.01, 2)
        (chance_TE * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
        grads.append((chance_TE.detach().double(), logit.grad.double()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-6)
    # Which of equal experts is the k-th and which the next is open; their gradients together are not.
    mine, theirs = (torch.stack([grad[0, 1:3].sum(), grad[0, 0], grad[0, 3]]) for _, grad in grads)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
