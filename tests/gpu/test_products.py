"""Products, the noisy choice, LSTM, cross-entropy and optimizers on a GPU against float64 on the CPU.

Shape suffixes: A assignments, D width, H hidden, E experts, T tokens, C candidates.
"""

import pytest
import torch
from grouped_gemm_cases import SIZES as PRODUCTS
from grouped_gemm_cases import products
from lstm_cases import ours_and_theirs
from naive_experts import by_assignment, by_row, gradients, make, results
from noisy_top_k_cases import SIZES, chosen
from optimizer_cases import MATRICES, VOCABULARIES, factored_steps, lazy_steps
from row_cases import SEGMENTS, segment_case

from moe_lm.ops import grouped_gemm
from moe_lm.ops.cross_entropy import candidate_nats, token_nats
from moe_lm.ops.experts import grouped_mlp, moe_mlp
from moe_lm.ops.grouped_gemm import ExpertRows
from moe_lm.ops.grouped_linear import grouped_linear
from moe_lm.ops.operation import reference_only, triton_runs
from moe_lm.ops.routing import noisy_top_k
from moe_lm.ops.sparse_rows import SparseRowGrad, set_row_grad
from moe_lm.ops.token_dispatch import row_order
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam
from moe_lm.train.step import _float32_as_tf32

COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [200, 17, 0, 64], [0, 4, 0, 9]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_in_bfloat16(gpu, counts, recompute):
    """Outputs and gradients to bfloat16's rounding; an expert without tokens has gradients of zero."""
    # Exact in bfloat16, or hidden units near 0 would change sides.
    case = make(counts, torch.bfloat16, width=32, hidden=64).to(torch.float32)
    here, there = case.to(torch.float64), case.to(device=gpu)
    rows_here, rows_there = here.rows, there.rows
    with torch.autocast("cuda", torch.bfloat16):
        got = results(moe_mlp, there, recompute=recompute)
        y_AD = grouped_mlp(*rows_there, recompute=recompute)
        got += [y_AD, *gradients(y_AD, (rows_there[0], *rows_there[2:]))]
    y_AD = by_row(*rows_here)
    want = [*results(by_assignment, here), y_AD, *gradients(y_AD, (rows_here[0], *rows_here[2:]))]
    for mine, theirs in zip(got, want, strict=True):
        mine, theirs = mine.detach().cpu().double(), theirs.detach()
        assert mine.isfinite().all()
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-6
    for grad in got[3:5]:
        assert (grad[[count == 0 for count in counts]] == 0).all()


@pytest.mark.parametrize(("max_torch_experts", "max_outer_rows"), [(0, 0), (1023, 0), (1023, 1536)])
def test_versions_equal_the_references(gpu, monkeypatch, max_torch_experts, max_outer_rows):
    """With Triton for some products or all, outputs and gradients are the references' to bfloat16's rounding."""
    monkeypatch.setattr(grouped_gemm, "max_torch_experts", max_torch_experts)
    monkeypatch.setattr(grouped_gemm, "max_outer_rows", max_outer_rows)
    case = make([30, 0, 50, 9], torch.bfloat16, width=32, hidden=64).to(torch.float32).to(device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        ours = results(moe_mlp, case)
        with reference_only():
            theirs = results(moe_mlp, case)
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [*PRODUCTS, ([300, 0, 77, 900] * 64, 512, 1024), ([40000, 9], 512, 32)], ids=str)
def test_products_of_any_number_of_experts(gpu, sizes, dtype):
    """By Triton, of factors that all types hold: sums in float32, rounded once."""
    for got, want in products(*sizes, dtype, gather=True, device="cuda"):
        precision = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}[got.dtype]
        torch.testing.assert_close(got.cpu().double(), want, rtol=precision, atol=precision)


def test_products_in_tf32(gpu):
    """As gates take them: to 10 bits of mantissa, outer ones to 16."""
    torch.manual_seed(0)
    x_AD, weight_GDE, grad_AE = torch.randn(1000, 512), torch.randn(3, 512, 96), torch.randn(1000, 96)
    group_A = torch.arange(3).repeat_interleave(torch.tensor([700, 0, 300]))
    ours, theirs = [], []
    for found, on, dtype in ((ours, gpu, torch.float32), (theirs, "cpu", torch.float64)):
        leaves = [x.to(on, dtype, copy=True).requires_grad_() for x in (x_AD, weight_GDE)]
        with _float32_as_tf32(found is ours):
            y_AE = grouped_linear(*leaves, group_A.to(on))
            found += [y_AE, *torch.autograd.grad(y_AE, leaves, grad_AE.to(on, dtype))]
    for got, want, precision in zip(ours, theirs, (1e-3, 1e-3, 2e-5), strict=True):
        assert (got.detach().cpu().double() - want.detach()).norm() <= precision * want.detach().norm()


@pytest.mark.parametrize("width", [1, 20, 512])
@pytest.mark.parametrize("counts", [*SEGMENTS, [20_000, *[1] * 3000, 900]], ids=lambda counts: str(counts[:5]))
def test_sums_of_many_rows(gpu, counts, width):
    """As additions in float64 make them; twice the same bits."""
    from moe_lm.ops.triton.rows import sum_segments  # Triton is not installed everywhere

    segment_A, y_AD, want_UD = segment_case(counts, width)
    arguments = y_AD.to(gpu), *row_order(segment_A.to(gpu), len(counts))
    got, again = (sum_segments(*arguments) for _ in range(2))
    torch.testing.assert_close(got.cpu().double(), want_UD, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, again)


@pytest.mark.parametrize("max_logits", [64, 10_000])
def test_cross_entropy(gpu, max_logits):
    """The blocked sum and its gradients, and exact nats, as one float64 softmax on the CPU gives them."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 16), (90, 16), (90,)))
    target = torch.randint(90, (40,), generator=generator)
    leaves = [x.to(gpu, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    none = torch.full((40,), -1, device=gpu)
    apart = torch.full((40,), -1e9, device=gpu)
    hit = target.to(gpu)
    true = (leaves[0] * leaves[1][hit]).sum(dim=1) + leaves[2][hit]
    total = candidate_nats(*leaves, true, hit, max_logits)
    wanted = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    nats = torch.nn.functional.cross_entropy(wanted[0] @ wanted[1].t() + wanted[2], target, reduction="none")
    assert total.item() == pytest.approx(nats.sum().item(), rel=1e-5)
    for got, want in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(nats.sum(), wanted), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-3, atol=1e-4)
    exact = token_nats(leaves[0].detach(), leaves[1].detach(), leaves[2].detach(), hit, max_logits)
    torch.testing.assert_close(exact.cpu(), nats.detach(), rtol=1e-4, atol=1e-4)
    assert candidate_nats(*(x.detach() for x in leaves), apart, none, max_logits).item() > 1e9


@pytest.mark.parametrize("sizes", [*SIZES, (5000, 4, 3), (5000, 32, 4), (5000, 256, 4), (700, 4096, 4)], ids=str)
def test_choice(gpu, sizes):
    """What is chosen, all noisy logits, chances and the logits' gradient, of all results together."""
    ours = chosen(noisy_top_k, *sizes, "all", torch.float32, "cuda")
    theirs = chosen(noisy_top_k.reference, *sizes, "all", torch.float64)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.cpu().double(), want.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 4, 8, 8), (7, 2, 16, 600), (30, 64, 512, 512), (1, 100, 32, 24)], ids=str)
def test_lstm(gpu, sizes):
    """Outputs and all gradients, to bfloat16's rounding."""
    for got, want in ours_and_theirs(sizes, torch.bfloat16, device="cuda"):
        assert (got - want).norm() <= 0.02 * want.norm() + 1e-6


def test_kernels_are_there(gpu):
    """Triton compiles here, so that these tests test its kernels."""
    assert triton_runs(torch.ones(1, device=gpu))


@pytest.mark.parametrize("shape", [*MATRICES, (300, 512, 1024)], ids=str)
def test_factored(gpu, shape):
    """Weights and both averages after four steps."""
    for got, want in zip(
        factored_steps(shape, torch.float32, "cuda"), factored_steps(shape, torch.float64), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", VOCABULARIES, ids=str)
def test_lazy(gpu, shape):
    """Rows, moments and last steps after six steps."""
    for got, want in zip(lazy_steps(shape, torch.float32, "cuda"), lazy_steps(shape, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.fixture
def large_gpu(gpu):
    """One with room for two tensors of 2^31 numbers and more."""
    if torch.cuda.mem_get_info(gpu)[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    return gpu


def test_numbers_beyond_32_bits(large_gpu):
    """Of more than 2^31 numbers the last ones are updated as they are alone, and the first ones stay."""
    shape = 4100, 512, 1024
    many, alone = (torch.nn.Parameter(torch.zeros(count, *shape[1:], device=large_gpu)) for count in (shape[0], 1))
    optimizer = FactoredAdam([many, alone], lr=0.1, beta2=0.9, epsilon=1e-3)
    gradient = torch.randn(shape[1:], device=large_gpu)
    many.grad, alone.grad = torch.zeros_like(many), gradient.unsqueeze(0)
    many.grad[-1] = gradient
    optimizer.step()
    assert torch.equal(many[-1], alone[0])
    assert alone.any()
    assert not many[:2].any()


def test_products_beyond_32_bits(large_gpu):
    """The last of 4,100 experts has 5 rows, all others none."""
    ends_E = torch.zeros(4100, dtype=torch.int64, device=large_gpu)
    ends_E[-1] = 5
    rows = ExpertRows(ends_E, 5)
    weight_EDH = torch.zeros(4100, 512, 1024, device=large_gpu)
    weight_EDH[-1].normal_()
    x_AD = torch.randn(5, 512, device=large_gpu).bfloat16()
    y_AH = grouped_gemm.grouped_mm(x_AD, None, weight_EDH, rows)
    torch.testing.assert_close(y_AH, x_AD @ weight_EDH[-1].bfloat16(), rtol=0.02, atol=0.1)
    outer_EDH = grouped_gemm.grouped_outer(x_AD, None, y_AH, rows, weight_EDH.dtype)
    torch.testing.assert_close(outer_EDH[-1], x_AD.float().t() @ y_AH.float(), rtol=1e-3, atol=1e-2)
    assert not outer_EDH[:-1].any()


def test_rows_beyond_32_bits(large_gpu):
    """A vocabulary of more than 2^31 numbers: its last row is updated as it is alone."""
    many, alone = (torch.nn.Parameter(torch.zeros(rows, 1024, device=large_gpu)) for rows in (2**21 + 8, 1))
    optimizer = LazyAdam([many, alone], lr=0.1, beta2=0.9, epsilon=1e-3)
    value = torch.randn(1, 1024, device=large_gpu)
    for matrix in (many, alone):
        set_row_grad(matrix, SparseRowGrad(torch.tensor([len(matrix) - 1], device=large_gpu), value))
    optimizer.step()
    assert torch.equal(many[-1], alone[0])
    assert alone.any()
    assert not many[:8].any()
