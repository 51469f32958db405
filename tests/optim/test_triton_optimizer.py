"""The GPU's passes over weights, run by Triton's interpreter on the CPU, against torch's operators in float64."""

import math
import os

import pytest
import torch
from optimizers_in_kernels import MATRICES, SETTINGS, VOCABULARIES, factored_steps, lazy_steps

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops.triton import factored_adam as triton_factored
from moe_lm.ops.triton import lazy_adam as triton_lazy
from moe_lm.optim import CompositeOptimizer
from moe_lm.optim import factored_adam as factored
from moe_lm.optim import lazy_adam as lazy


@pytest.fixture
def in_kernels(monkeypatch):
    """As on a GPU; says which kernels were asked for."""
    asked = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: [asked.append(name), real(*args, **kwargs)][1])

    for module, name in (
        (triton_factored, "square_means"),
        (triton_factored, "divide_"),
        (triton_lazy, "update_rows_"),
    ):
        watch(module, name)
    monkeypatch.setattr(factored, "by_triton", lambda _: True)
    monkeypatch.setattr(lazy, "by_triton", lambda _: True)
    return asked


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_factored(shape, in_kernels):
    """Weights and averages after four steps; a parameter in float64 is torch's."""
    for got, want in zip(factored_steps(shape, torch.float32), factored_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # Of the third step's gradient the norm was asked for, and then it was changed.
    counted = ["square_means", "divide_"] * 2 + ["square_means"] + ["square_means", "divide_"] * 2
    assert in_kernels == (counted if math.prod(shape) else [])


def test_norms(in_kernels):
    """Those of gradients in kernels, and of all together with others'; `None` and foreign gradients are left out."""
    torch.manual_seed(0)
    some, idle, none, other = (torch.nn.Parameter(torch.zeros(3, 5, 7)) for _ in range(4))
    for parameter in (some, other):
        parameter.grad = torch.randn(3, 5, 7)
    empty = torch.nn.Parameter(torch.zeros(0, 5, 7))
    empty.grad, idle.grad = torch.zeros(0, 5, 7), torch.zeros(3, 5, 7)
    ours = factored.FactoredAdam([some, idle, none, empty], **SETTINGS)
    both = CompositeOptimizer([ours, torch.optim.Adam([other])])
    found = ours.norms([some, idle, none, empty, other])
    assert {id(p) for p in found} == {id(some), id(idle)}
    assert found[some].item() == pytest.approx(some.grad.double().norm().item(), rel=1e-6)
    whole = torch.cat([some.grad, other.grad]).double().norm().item()
    assert both.norm().item() == pytest.approx(whole, rel=1e-6)
    assert both.norm([other]).item() == pytest.approx(other.grad.double().norm().item(), rel=1e-6)
    assert both.norm([some, idle]).item() == pytest.approx(some.grad.double().norm().item(), rel=1e-6)
    some.grad[0, 0, 0] = torch.inf
    assert both.norm().item() == math.inf


@pytest.mark.parametrize("shape", [*VOCABULARIES, (7,)], ids=str)
def test_lazy(shape, in_kernels):
    """Rows, moments and last steps; a vector is torch's, as is float64."""
    for got, want in zip(lazy_steps(shape, torch.float32), lazy_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert in_kernels == ["update_rows_"] * (6 if len(shape) == 2 else 0)
