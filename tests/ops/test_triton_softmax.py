"""The cross-entropy's Triton kernel, run by Triton's interpreter on the CPU, against a softmax in float64.

Shape suffixes: T tokens, C candidate words.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops import cross_entropy
from moe_lm.ops.triton import softmax as triton_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (4, 5000), (2, 1), (0, 9)], ids=str)
def test_probabilities(shape, dtype):
    """The true word is a candidate or none, its logit far above or far below all candidates'."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_candidates = shape
    logits_TC = (3 * torch.randn(shape, generator=generator)).to(dtype)
    bias_C, true_T = torch.randn(num_candidates, generator=generator), torch.randn(num_tokens, generator=generator)
    true_T[1:2], true_T[2:3] = 60.0, -60.0
    hit_T = torch.arange(num_tokens) % (num_candidates + 1) - 1
    every = logits_TC.double() + bias_C.double()
    every[hit_T >= 0, hit_T[hit_T >= 0]] = -torch.inf
    want = torch.cat([every, true_T.double().unsqueeze(1)], dim=1).softmax(dim=1)
    got = logits_TC.clone()
    true_probability_T, nats_T = triton_softmax.probabilities_(got, bias_C, true_T, hit_T)
    tolerance = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(true_probability_T.double(), want[:, -1], **tolerance)
    torch.testing.assert_close(nats_T.double(), -want[:, -1].log(), rtol=1e-5, atol=1e-5)
    of_type = tolerance if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(got.double(), want[:, :-1], **of_type)
    assert (got[hit_T >= 0, hit_T[hit_T >= 0]] == 0).all()
    by_torch = cross_entropy._TorchSoftmax(num_tokens, bias_C, 10**6)
    by_torch = by_torch(logits_TC, torch.eye(num_candidates, dtype=dtype), bias_C, true_T, hit_T)
    for mine, theirs in zip((got, true_probability_T, nats_T), by_torch, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_and_its_gradients(monkeypatch, dtype):
    """Value and gradients by the kernel are those by PyTorch's operators."""
    generator = torch.Generator().manual_seed(1)
    shapes = (30, 8), (50, 8), (50,), (30,)
    hidden, weight, bias, true = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    hit_T = torch.arange(30) % 51 - 1
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(cross_entropy, "triton_runs", lambda _, on=kernel: on)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            total = cross_entropy.candidate_nats(hidden, weight, bias, true, hit_T, 50 * 7)
        results.append([total, *torch.autograd.grad(total, (hidden, weight, bias, true))])
    for mine, theirs in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
