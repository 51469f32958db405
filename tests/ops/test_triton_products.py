"""Products by Triton's interpreter on the CPU against float64, an expert at a time.

Shape suffixes: A rows, D inputs, H outputs, E experts, M tiles.
"""

import os

import pytest
import torch
from products_in_kernels import SIZES, made

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops import grouped_linear as module
from moe_lm.ops.grouped_gemm import InKernels
from moe_lm.ops.grouped_linear import grouped_product
from moe_lm.ops.triton import outer_products as triton_outer_products
from moe_lm.ops.triton import products as triton_products
from moe_lm.ops.triton import tiles as of_tiles
from moe_lm.train.step import _float32_as_tf32


@pytest.mark.parametrize("taken", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # its products of bfloat16 are wrong
@pytest.mark.parametrize("of_matrices", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes, of_matrices, dtype, taken):
    """Of rows with matrices in any type, as they are and transposed, with ReLU; outer ones and squares in float32."""
    for place, (got, want) in enumerate(made(*sizes, dtype, taken=taken, of_matrices=of_matrices)):
        assert got.dtype == (torch.float32 if place >= 3 else dtype)
        precision = 1e-6 if got.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got.double(), want, rtol=precision, atol=precision)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 300, 17, 2, 0], [0], [64] * 5, [1] * 40])
def test_each_row_is_in_one_tile(counts):
    """Of its expert; the other tiles are nobody's."""
    tiles = of_tiles.tiles_of(torch.tensor(counts).cumsum(0), sum(counts))
    expert_A = [e for e, count in enumerate(counts) for _ in range(count)]
    found = {}
    for expert, first in zip(tiles.expert_M.tolist(), tiles.first_M.tolist(), strict=True):
        if expert < len(counts):
            for row in range(first, min(first + tiles.side, tiles.ends_E[expert])):
                assert row not in found
                found[row] = expert
    assert found == dict(enumerate(expert_A))


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_outer_products_of_an_experts_rows_in_shares(programs, monkeypatch):
    """Whatever the number of programs; in float64's sums, as an expert's share may be empty."""
    monkeypatch.setattr(triton_outer_products, "_PROGRAMS", programs)
    for dtype in (torch.float32, torch.float16):
        got, want = made([300, 0, 1, 90], 20, 24, dtype, taken=True)[3]
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def told(monkeypatch, key):
    """What both kernels are told of this name, call by call."""
    found = []

    class Told:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(kwargs[key])

    for module_, name in ((triton_products, "_product"), (triton_outer_products, "_outer")):
        monkeypatch.setattr(module_, name, Told(getattr(module_, name)))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [227 << 10, 64 << 10, 1 << 10], ids=["Hopper", "little", "least"])
def test_steps_on_their_way_fit_shared_memory(shared, dtype, monkeypatch):
    """Of rows and matrices together, in whatever type each is; one at least."""
    monkeypatch.setattr(of_tiles, "_shared_bytes", lambda _: shared)
    stages, size = told(monkeypatch, "num_stages"), torch.finfo(dtype).bits // 8
    made([200, 0, 200], 512, 512, dtype, taken=True)
    form, outer = triton_products.FORMS[size, 4], triton_outer_products.FORMS[size]
    step = form.depth * (of_tiles.MOST_ROWS * size + form.columns * 4)
    outer_step = outer.depth * (triton_outer_products.DOWN + outer.columns) * size
    assert stages[:3] == [max(1, min(form.stages, shared // step))] * 3
    assert stages[3:] == [max(1, min(outer.stages, shared // outer_step))]
    assert min(stages) >= (1 if shared < 64 << 10 else 2)


@pytest.mark.parametrize("form", [(256, 64, 2), (16, 16, 1)], ids=str)
def test_in_any_form(form, monkeypatch):
    """Of tiles as wide as a matrix, of narrow ones; the least of steps."""
    form = of_tiles.Form(*form)
    monkeypatch.setattr(triton_products, "FORMS", {(4, 4): form})
    monkeypatch.setattr(triton_outer_products, "FORMS", {4: form})
    monkeypatch.setattr(triton_outer_products, "DOWN", 128)
    for got, want in made([3, 0, 300], 130, 260, torch.float32, taken=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("allowed", [False, True])
def test_precision_is_that_of_torchs_products(allowed, monkeypatch):
    """TF32 where torch's may take it, else all of float32's bits; both kernels are told."""
    precisions = told(monkeypatch, "PRECISION")
    with _float32_as_tf32(allowed):
        made([3, 2], 8, 8, torch.float32, taken=False)
    assert precisions == ["tf32" if allowed else "ieee"] * 4


def test_of_32_bits_the_matrix_lies_along_the_inputs(monkeypatch):
    """As tensor cores take TF32: transposed in memory, unless it lies so already; else it stays as it is."""
    strides = []

    class StepAccumulator:
        def __getitem__(self, grid):
            return lambda *args, **_: strides.append(args[-2:])  # of the matrix: a row's, a column's

    monkeypatch.setattr(triton_products, "_product", StepAccumulator())
    tiles = of_tiles.tiles_of(torch.tensor([3, 5]), 5)
    x, weight_EDH = torch.ones(5, 8), torch.ones(2, 8, 12)
    for allowed, matrices in ((True, weight_EDH), (True, weight_EDH.mT.contiguous().mT), (False, weight_EDH)):
        with _float32_as_tf32(allowed):
            triton_products.products(x, None, matrices, tiles)
            triton_products.products(x.half(), None, matrices, tiles)
    assert strides == [(1, 8), (12, 1), (1, 8), (1, 8), (12, 1), (12, 1)]


def test_gates_products_without_tf32_are_torchs(monkeypatch):
    """In all of float32's bits cuBLAS is faster."""
    monkeypatch.setattr(module, "by_triton", lambda _: True)
    monkeypatch.setattr(module, "InKernels", None)
    y_TE = grouped_product(torch.ones(3, 4), torch.ones(2, 4, 8), torch.tensor([0, 0, 1]))
    assert (y_TE == 4).all()


def test_tokens_with_gaps():
    """Every other number of a longer list."""
    token_A = torch.tensor([1, 9, 0, 9, 1, 9])[::2]
    x_TD, weight_EDH = torch.arange(6.0).view(2, 3), torch.eye(3).unsqueeze(0)
    by = InKernels(torch.tensor([3]), 3, torch.float32)
    assert torch.equal(by.products(x_TD, token_A, weight_EDH), x_TD[[1, 0, 1]])
    outer_EDH = by.outer_products(x_TD, token_A, torch.ones(3, 1), torch.empty(1, 3, 1))
    assert torch.equal(outer_EDH[0], x_TD[[1, 0, 1]].sum(dim=0, keepdim=True).t())


def test_what_is_no_number_stays():
    """NaN goes through the ReLU, and into the rows and matrices of its expert alone."""
    x_AD, weight_EDH, ends_E = torch.ones(5, 8), torch.ones(2, 8, 4), torch.tensor([3, 5])
    x_AD[1, 2] = torch.nan
    by = InKernels(ends_E, 5, torch.float32)
    y_AH = by.products(x_AD, None, weight_EDH, relu=True)
    assert y_AH.isnan().all(dim=1).tolist() == [False, True, False, False, False]
    outer_EDH = by.outer_products(x_AD, None, y_AH, weight_EDH)
    assert outer_EDH[0].isnan().all()
    assert not outer_EDH[1].isnan().any()


@pytest.mark.parametrize("sizes", [[0, 5, 0], [60, 1, 1, 0], [4] * 6, [0, 0]], ids=str)
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
@_float32_as_tf32(True)
def test_gates_products(sizes, frozen, monkeypatch):
    """Where a GPU may round to TF32 the rows of groups meet their matrices in our kernel; gradients as needed."""
    made = []
    real = module.InKernels
    monkeypatch.setattr(module, "InKernels", lambda *args: made.append(args) or real(*args))
    monkeypatch.setattr(module, "by_triton", lambda _: True)
    torch.manual_seed(0)
    group_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x_TD, weight_GDE = torch.randn(sum(sizes), 20), torch.randn(len(sizes), 20, 12)
    leaves = [x.requires_grad_(name != frozen) for name, x in (("x", x_TD), ("weight", weight_GDE))]
    needed = [x for x in leaves if x.requires_grad]
    y_TE = grouped_product(x_TD, weight_GDE, group_T)
    assert len(made) == 1
    want_TE = torch.einsum("td,tde->te", x_TD.double(), weight_GDE.double()[group_T])
    torch.testing.assert_close(y_TE.double(), want_TE, rtol=1e-5, atol=1e-5)
    factor_TE = torch.randn(12, sum(sizes)).t()
    got, want = (torch.autograd.grad((y * factor_TE).sum(), needed) for y in (y_TE, want_TE))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_program_writes_anothers_rows():
    """In the opposite order the answers are the same: a GPU runs them side by side."""
    counts = [40, 3, 0, 65, 17]
    torch.manual_seed(0)
    x_AD, weight_EDH = torch.randn(125, 8), torch.randn(5, 8, 6)
    tiles = of_tiles.tiles_of(torch.tensor(counts).cumsum(0), 125)
    flipped = tiles._replace(expert_M=tiles.expert_M.flip(0), first_M=tiles.first_M.flip(0))
    one, other = (triton_products.products(x_AD, None, weight_EDH, order) for order in (tiles, flipped))
    assert torch.equal(one, other)
