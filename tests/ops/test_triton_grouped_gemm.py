"""Grouped products by Triton's interpreter on the CPU against float64, an expert at a time.

Shape suffixes: A rows, D inputs, H outputs, E experts, M tiles.
"""

import os
from itertools import product

import pytest
import torch
from grouped_gemm_cases import SIZES, products

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

from moe_lm.ops.grouped_gemm import ExpertRows
from moe_lm.ops.grouped_linear import grouped_linear
from moe_lm.ops.triton import grouped_gemm as kernels
from moe_lm.ops.triton import tiles as module
from moe_lm.ops.triton.grouped_gemm import differentiable_grouped_mm, grouped_mm, grouped_outer
from moe_lm.train.step import _float32_as_tf32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter's bfloat16 is wrong
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes, dtype):
    """Rows with and without a gather, matrices of any type, as they are and transposed; outer products in float32."""
    others = (torch.float16, torch.float64) if sum(sizes[0]) < 100 else ()  # more rows say nothing more of a type
    for gather, matrix_dtype in product((False, True), (torch.float32, *others)):
        for place, (got, want) in enumerate(products(*sizes, dtype, gather=gather, matrix_dtype=matrix_dtype)):
            assert got.dtype == (torch.float32 if place == 3 else dtype)
            precision = 1e-6 if got.dtype == torch.float32 else 1e-3
            torch.testing.assert_close(got.double(), want, rtol=precision, atol=precision)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 300, 17, 2, 0], [0], [64] * 5, [1] * 40])
def test_each_row_is_in_one_tile(counts):
    """A tile's rows are of one expert; the other tiles are not used."""
    tiles = module.tiles_of(torch.tensor(counts).cumsum(0), sum(counts))
    expert_A = [e for e, count in enumerate(counts) for _ in range(count)]
    found = {}
    for expert, first in zip(tiles.expert_M.tolist(), tiles.first_M.tolist(), strict=True):
        if expert < len(counts):
            for row in range(first, min(first + tiles.block_m, tiles.ends_E[expert])):
                assert row not in found
                found[row] = expert
    assert found == dict(enumerate(expert_A))


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_outer_products_with_split_rows(programs, monkeypatch):
    """Whatever the number of programs that share an expert's rows; a split may be empty."""
    monkeypatch.setattr(kernels, "_MIN_PROGRAMS", programs)
    for dtype in (torch.float32, torch.float16):
        got, want = products([300, 0, 1, 90], 20, 24, dtype, gather=True)[3]
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def launches(monkeypatch, key):
    """The value of this launch option, call by call, of kernels that do not run."""
    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(args if key is None else kwargs[key])

    for name in ("_grouped_mm", "_grouped_outer"):
        monkeypatch.setattr(kernels, name, Kernel())
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [227 << 10, 64 << 10, 1 << 10], ids=["Hopper", "little", "least"])
def test_stages_fit_shared_memory(shared, dtype, monkeypatch):
    """Rows and matrices together, in whatever type each is; at least one stage."""
    monkeypatch.setattr(module, "_shared_bytes", lambda _: shared)
    stages, size = launches(monkeypatch, "num_stages"), torch.finfo(dtype).bits // 8
    products([200, 0, 200], 512, 512, dtype, gather=True)
    shape, outer = kernels.MM_SHAPES[size, 4], kernels.OUTER_SHAPES[size]
    step = shape.block_k * (module.MAX_BLOCK_M * size + shape.block_n * 4)
    outer_step = outer.block_k * (kernels.OUTER_BLOCK_M + outer.block_n) * size
    assert stages[:3] == [max(1, min(shape.stages, shared // step))] * 3
    assert stages[3:] == [max(1, min(outer.stages, shared // outer_step))]
    assert min(stages) >= (1 if shared < 64 << 10 else 2)


@pytest.mark.parametrize(
    ("shape", "sizes"), [((256, 64, 2), ([3, 0, 300], 130, 260)), ((16, 16, 1), ([3, 0, 70], 40, 60))], ids=str
)
def test_any_block_shape(shape, sizes, monkeypatch):
    """Blocks as wide as a matrix, and narrow ones with the smallest steps."""
    shape = module.BlockShape(*shape)
    monkeypatch.setattr(kernels, "MM_SHAPES", {(4, 4): shape})
    monkeypatch.setattr(kernels, "OUTER_SHAPES", {4: shape})
    monkeypatch.setattr(kernels, "OUTER_BLOCK_M", 128)
    for got, want in products(*sizes, torch.float32, gather=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("allowed", [False, True])
def test_precision_is_that_of_pytorchs_products(allowed, monkeypatch):
    """Both kernels take TF32 where PyTorch may take it, else all of float32's bits."""
    precisions = launches(monkeypatch, "PRECISION")
    with _float32_as_tf32(allowed):
        products([3, 2], 8, 8, torch.float32, gather=False)
    assert precisions == ["tf32" if allowed else "ieee"] * 4


def test_for_tf32_the_matrix_lies_along_the_inputs(monkeypatch):
    """As tensor cores take TF32: transposed in memory, unless it lies so already; else it stays as it is."""
    arguments = launches(monkeypatch, None)
    rows = ExpertRows(torch.tensor([3, 5]), 5)
    x, weight_EDH = torch.ones(5, 8), torch.ones(2, 8, 12)
    for allowed, matrices in ((True, weight_EDH), (True, weight_EDH.mT.contiguous().mT), (False, weight_EDH)):
        with _float32_as_tf32(allowed):
            grouped_mm(x, None, matrices, rows)
            grouped_mm(x.half(), None, matrices, rows)
    strides = [given[-2:] for given in arguments]  # of the matrix: a row's, a column's
    assert strides == [(1, 8), (12, 1), (1, 8), (1, 8), (12, 1), (12, 1)]


def test_tokens_with_gaps():
    """Token numbers may be every other number of a longer list."""
    token_A = torch.tensor([1, 9, 0, 9, 1, 9])[::2]
    x_TD, weight_EDH = torch.arange(6.0).view(2, 3), torch.eye(3).unsqueeze(0)
    rows = ExpertRows(torch.tensor([3]), 3)
    assert torch.equal(grouped_mm(x_TD, token_A, weight_EDH, rows), x_TD[[1, 0, 1]])
    outer_EDH = grouped_outer(x_TD, token_A, torch.ones(3, 1), rows, torch.float32)
    assert torch.equal(outer_EDH[0], x_TD[[1, 0, 1]].sum(dim=0, keepdim=True).t())


def test_nan_stays():
    """NaN goes through the ReLU, and into the rows and matrices of its expert alone."""
    x_AD, weight_EDH, rows = torch.ones(5, 8), torch.ones(2, 8, 4), ExpertRows(torch.tensor([3, 5]), 5)
    x_AD[1, 2] = torch.nan
    y_AH = grouped_mm(x_AD, None, weight_EDH, rows, relu=True)
    assert y_AH.isnan().all(dim=1).tolist() == [False, True, False, False, False]
    outer_EDH = grouped_outer(x_AD, None, y_AH, rows, torch.float32)
    assert outer_EDH[0].isnan().all()
    assert not outer_EDH[1].isnan().any()


@pytest.mark.parametrize("sizes", [[0, 5, 0], [60, 1, 1, 0], [4] * 6, [0, 0]], ids=str)
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
@_float32_as_tf32(True)
def test_differentiable_product(sizes, frozen, triton_on_cpu, monkeypatch):
    """A gate's rows meet the matrix of their group, with the gradients that are needed; float32 rounded to TF32."""
    called = []
    real = kernels.differentiable_grouped_mm
    monkeypatch.setattr(kernels, "differentiable_grouped_mm", lambda *a: [called.append(1), real(*a)][1])
    torch.manual_seed(0)
    group_A = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x_AD, weight_EDH = torch.randn(sum(sizes), 20), torch.randn(len(sizes), 20, 12)
    leaves = [x.requires_grad_(name != frozen) for name, x in (("x", x_AD), ("weight", weight_EDH))]
    needed = [x for x in leaves if x.requires_grad]
    y_AH = grouped_linear(x_AD, weight_EDH, group_A)
    assert called == [1]
    want_AH = torch.einsum("ad,adh->ah", x_AD.double(), weight_EDH.double()[group_A])
    torch.testing.assert_close(y_AH.double(), want_AH, rtol=1e-5, atol=1e-5)
    factor_AH = torch.randn(12, sum(sizes)).t()
    got, want = (torch.autograd.grad((y * factor_AH).sum(), needed) for y in (y_AH, want_AH))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_differentiable_product_of_16_bit_rows():
    """Outputs have the rows' type, gradients that of their argument."""
    x_AD, weight_EDH = torch.ones(3, 8).half().requires_grad_(), torch.ones(2, 8, 4, requires_grad=True)
    y_AH = differentiable_grouped_mm(x_AD, weight_EDH, ExpertRows(torch.tensor([1, 3]), 3))
    y_AH.sum().backward()
    assert (y_AH.dtype, x_AD.grad.dtype, weight_EDH.grad.dtype) == (torch.float16, torch.float16, torch.float32)
    assert weight_EDH.grad[:, 0, 0].tolist() == [1, 2]


def test_no_program_writes_anothers_rows():
    """In the opposite order the outputs are the same: a GPU runs programs side by side."""
    counts = [40, 3, 0, 65, 17]
    torch.manual_seed(0)
    x_AD, weight_EDH = torch.randn(125, 8), torch.randn(5, 8, 6)
    rows, flipped = (ExpertRows(torch.tensor(counts).cumsum(0), 125) for _ in range(2))
    tiles = rows.tiles
    flipped.tiles = tiles._replace(expert_M=tiles.expert_M.flip(0), first_M=tiles.first_M.flip(0))
    one, other = (grouped_mm(x_AD, None, weight_EDH, order) for order in (rows, flipped))
    assert torch.equal(one, other)
