"""The optimizers' Triton kernels, run by Triton's interpreter on the CPU, against PyTorch in float64."""

import math
import os

import pytest
import torch
from optimizer_cases import MATRICES, SETTINGS, VOCABULARIES, factored_steps, lazy_steps

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops import adam
from moe_lm.ops.triton import adam as triton_adam
from moe_lm.optim import factored_adam
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.optim.factored_adam import FactoredAdam


@pytest.fixture
def kernel_calls(monkeypatch):
    """Run the kernels on the CPU; return the names of those that were called."""
    calls = []

    def watch(name):
        real = getattr(triton_adam, name)
        monkeypatch.setattr(triton_adam, name, lambda *args, **kwargs: [calls.append(name), real(*args, **kwargs)][1])

    for name in ("square_means", "factored_adam_", "lazy_adam_"):
        watch(name)
    for module in (adam, factored_adam):
        monkeypatch.setattr(module, "triton_runs", lambda x: x.dtype == torch.float32)
    return calls


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_factored_adam(shape, kernel_calls):
    """Weights and averages after four steps agree; float64 runs without kernels."""
    for got, want in zip(factored_steps(shape, torch.float32), factored_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    step = ["factored_adam_", "square_means"]
    # Before the second step and the third one the norm was asked for; then the third gradient was changed.
    expected = [*step, "square_means", "factored_adam_", "square_means", *step, *step]
    assert kernel_calls == (expected if math.prod(shape) else [])


def test_norms(kernel_calls):
    """Norms are right, alone and with other optimizers'; missing, empty and foreign gradients are left out."""
    torch.manual_seed(0)
    some, idle, none, other = (torch.nn.Parameter(torch.zeros(3, 5, 7)) for _ in range(4))
    for parameter in (some, other):
        parameter.grad = torch.randn(3, 5, 7)
    empty = torch.nn.Parameter(torch.zeros(0, 5, 7))
    empty.grad, idle.grad = torch.zeros(0, 5, 7), torch.zeros(3, 5, 7)
    factored = FactoredAdam([some, idle, none, empty], **SETTINGS)
    both = CompositeOptimizer([factored, torch.optim.Adam([other])])
    found = factored.norms([some, idle, none, empty, other])
    assert {id(p) for p in found} == {id(some), id(idle)}
    assert found[some].item() == pytest.approx(some.grad.double().norm().item(), rel=1e-6)
    whole = torch.cat([some.grad, other.grad]).double().norm().item()
    assert both.norm().item() == pytest.approx(whole, rel=1e-6)
    assert both.norm([other]).item() == pytest.approx(other.grad.double().norm().item(), rel=1e-6)
    assert both.norm([some, idle]).item() == pytest.approx(some.grad.double().norm().item(), rel=1e-6)
    some.grad[0, 0, 0] = torch.inf
    assert both.norm().item() == math.inf


@pytest.mark.parametrize("forget", ["step", "zero_grad"])
def test_mean_squares_belong_to_one_gradient(kernel_calls, forget):
    """After a step or `zero_grad` the optimizer holds no gradient, and a new one is squared anew."""
    weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    optimizer = FactoredAdam([weight], **SETTINGS)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.norms([weight])
    getattr(optimizer, forget)()
    assert not optimizer._square_means
    optimizer.norms([weight])
    weight.grad = torch.full_like(weight, 3.0)  # another gradient than the known one
    optimizer.step()
    row_mean = optimizer.state[weight]["row_mean"]
    before = 0.1 * 4 * 0.9 if forget == "step" else 0.0
    torch.testing.assert_close(row_mean, torch.full_like(row_mean, before + 0.1 * 9))


@pytest.mark.parametrize("kernels", [False, True])
def test_a_graph_from_before_a_step_is_refused(kernel_calls, monkeypatch, kernels):
    """A backward pass through a weight that a step has changed is an error, also where a kernel changed it."""
    monkeypatch.setattr(adam, "triton_runs", lambda _: kernels)
    weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    weight.grad = torch.ones_like(weight)
    graph = (weight * weight).sum()
    FactoredAdam([weight], **SETTINGS).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


@pytest.mark.parametrize("shape", [*VOCABULARIES, (7,)], ids=str)
def test_lazy_adam(shape, kernel_calls):
    """Rows, moments and last steps agree; vectors and float64 run without kernels."""
    for got, want in zip(lazy_steps(shape, torch.float32), lazy_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert kernel_calls == (["lazy_adam_"] * 6 if len(shape) == 2 else [])
