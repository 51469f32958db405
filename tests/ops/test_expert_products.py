"""Each expert's products, whole and in pieces, against float64.

Shape suffixes: R rows, D width, H hidden, E experts.
"""

from pathlib import Path

import pytest
import torch
from made import Made

from moe_lm.ops import expert_products
from moe_lm.ops.expert_products import outer_products, products

SIZES = [0, 1, 23, 24, 43, 44, 100, 176, 177, 192, 193]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, set_threads):
    """How many threads torch multiplies by."""
    set_threads(request.param)
    return request.param


@pytest.fixture(params=[True, False], ids=["Intel", "another"])
def cuts(request, monkeypatch, threads):
    """Whether products are cut: on one thread of an Intel processor."""
    monkeypatch.setattr(expert_products, "_on_intel", lambda: request.param)
    return request.param and threads == 1


@pytest.mark.parametrize(("vendor", "found"), [("GenuineIntel", True), ("AuthenticAMD", False), (None, False)])
def test_the_processor(vendor, found, monkeypatch):
    """Linux tells who made it; elsewhere it is nobody's."""

    def read_text(self):
        if vendor is None:
            raise FileNotFoundError(self)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert expert_products._on_intel.__wrapped__() is found


@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize(("width", "hidden"), [(130, 1024), (64, 1024), (200, 1000), (12, 8)])
def test_products(width, hidden, turned, cuts):
    """Of every number of rows at which the way changes; a width that pieces do not divide."""
    x_RD, out_RH = torch.randn(sum(SIZES), width), torch.full((sum(SIZES), hidden), torch.nan)
    w_EDH = torch.randn(len(SIZES), hidden, width).mT if turned else torch.randn(len(SIZES), width, hidden)
    with Made() as made:
        assert products(x_RD, SIZES, w_EDH, out_RH) is out_RH
    parts = zip(x_RD.double().split(SIZES), w_EDH.double(), strict=True)
    torch.testing.assert_close(out_RH.double(), torch.cat([x @ w for x, w in parts]), rtol=0, atol=1e-4)
    cut = cuts and (width, hidden) == (130, 1024) and not turned
    # 24, 43, 44, 100 and 176 rows: after the first of three pieces two are added.
    assert made.calls[torch.ops.aten.addmm_.default] == (2 * 5 if cut else 0)


@pytest.mark.parametrize(("width", "hidden"), [(300, 1024), (128, 40), (12, 8)])
def test_outer_products(width, hidden, cuts):
    """An expert of no rows gets zeros."""
    x_RD, grad_RH = torch.randn(sum(SIZES), width), torch.randn(sum(SIZES), hidden)
    out_EDH = torch.full((len(SIZES), width, hidden), torch.nan)
    with Made() as made:
        outer_products(x_RD, SIZES, grad_RH, out_EDH)
    parts = zip(x_RD.double().split(SIZES), grad_RH.double().split(SIZES), strict=True)
    torch.testing.assert_close(out_EDH.double(), torch.stack([x.t() @ g for x, g in parts]), rtol=0, atol=1e-4)
    # 44, 100, 176, 177 and 192 rows: three pieces each.
    cut = cuts and width == 300
    assert made.calls[torch.ops.aten.mm.out] == len(SIZES) + (2 * 5 if cut else 0)
