"""The GPU's passes over weights, run by Triton's interpreter on the CPU, against torch's operators in float64."""

import math
import os

import pytest
import torch
from optimizers_in_kernels import MATRICES, VOCABULARIES, factored_steps, lazy_steps

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.optimizer import factored, lazy, triton_factored, triton_lazy


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
    assert in_kernels == ["square_means", "divide_"] * (4 if math.prod(shape) else 0)


@pytest.mark.parametrize("shape", [*VOCABULARIES, (7,)], ids=str)
def test_lazy(shape, in_kernels):
    """Rows, moments and last steps; a vector is torch's, as is float64."""
    for got, want in zip(lazy_steps(shape, torch.float32), lazy_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert in_kernels == ["update_rows_"] * (6 if len(shape) == 2 else 0)
