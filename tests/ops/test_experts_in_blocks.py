"""The blocked loop over experts: blocks, threads, and the passes between products.

Shape suffixes: T tokens, A assignments, D width, H hidden, E experts, R rows.
"""

import pytest
import torch
from made import Made
from naive_experts import COUNTS, HIDDEN, WIDTH, assert_right, assert_rows_right, make, results
from row_cases import SIZES, rows_of

from moe_lm.ops import experts
from moe_lm.ops.experts import hidden_gradient_, moe_mlp


@pytest.fixture(params=[(1, 1), (200, 1), (1 << 20, 1), (200, 3)], ids=str)
def block_bytes(request, monkeypatch, set_threads):
    """The size of blocks and chunks, and the number of threads that take experts of their own."""
    size, threads = request.param
    monkeypatch.setattr(experts, "_BLOCK_BYTES", size)
    monkeypatch.setattr(experts, "_CHUNK_BYTES", size)
    monkeypatch.setattr(experts, "_MIN_PARALLEL_WORK", 1)
    monkeypatch.setattr(experts, "_MAX_IMBALANCE", threads)
    set_threads(threads)


def test_experts_equal_one_assignment_at_a_time(nan_memory, block_bytes):
    """Outputs and all gradients are those of equation 1 in float64."""
    for counts in COUNTS:
        for recompute in (False, True):
            assert_right(moe_mlp, counts, torch.float64, 1e-7, recompute=recompute)
            assert_rows_right(experts.grouped_mlp, counts, torch.float64, 1e-7, recompute=recompute)


def test_gradients_by_differences(block_bytes):
    """torch's own check by finite differences, of all four arguments."""
    x_TD, token_A, expert_A, *floats = make([2, 0, 3], width=3, hidden=4)
    assert torch.autograd.gradcheck(lambda x_TD, *floats: moe_mlp(x_TD, token_A, expert_A, *floats), (x_TD, *floats))


def test_recomputation_changes_no_bit(nan_memory, block_bytes):
    """Outputs and gradients are equal, also where an expert's rows begin amid a cache line."""
    for counts in [*COUNTS, [17, 1, 0, 40, 3, 9, 2]]:
        for dtype in (torch.float32, torch.float64):
            for sizes in ((WIDTH, HIDDEN), (33, 7), (64, 130)):
                case = make(counts, dtype, *sizes)
                kept, recomputed = (results(moe_mlp, case, recompute=on) for on in (False, True))
                for mine, theirs in zip(recomputed, kept, strict=True):
                    assert torch.equal(mine, theirs), (counts, dtype, sizes)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([8] * 6, [16, 16, 16]),
        ([5, 6, 7, 0, 6, 5, 8, 4, 7], [18, 11, 19]),  # 19 of 48: within a quarter of a third
        ([5, 6, 30, 0, 6, 5], [52]),  # two would wait for one
        ([0, 0], [0]),
    ],
    ids=str,
)
def test_threads_get_equal_shares(counts, wanted, monkeypatch):
    """All experts, in order, each in one part; all in one part if the shares would differ too much."""
    monkeypatch.setattr(experts, "_MIN_PARALLEL_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ends = torch.tensor(counts).cumsum(0).tolist()
    parts = experts._parts(ends, torch.empty(len(counts), 2, 4))
    assert [sum(sum(block.sizes) for block in part) for part in parts] == wanted
    blocks = [block for part in parts for block in part]
    assert [size for block in blocks for size in block.sizes] == counts
    assert [block.rows.stop for block in blocks] == [ends[block.experts.stop - 1] for block in blocks]


def test_recomputation_never_holds_all_hidden_activations(monkeypatch):
    """Neither pass makes anything of A H numbers: a block's share of h and of its gradient at a time."""
    monkeypatch.setattr(experts, "_BLOCK_BYTES", 4 * 30 * 16)
    case = make([30] * 10, torch.float32, width=4, hidden=16)
    largest = {}
    for on in (False, True):
        with Made() as made:
            moe_mlp(*case, recompute=on).sum().backward()
        largest[on] = made.largest()
    line = 64
    weights = case.w1_EDH.nbytes  # and so many bytes their gradient has
    assert largest == {False: 4 * 300 * 16, True: max(4 * 30 * 16 + line, weights)}


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 19])
def test_hidden_gradient(chunk_bytes, monkeypatch):
    """Dots with the gradient as it came, then the gradient masked and weighted, in place."""
    monkeypatch.setattr(experts, "_CHUNK_BYTES", chunk_bytes)
    for sizes in SIZES:
        for dtype in (torch.float32, torch.float64):
            _, gate_R, grad_RH = rows_of(*sizes, dtype)
            h_RH, grad_gate_R = torch.randn_like(grad_RH).relu(), torch.full_like(gate_R, torch.nan)
            want_R = (grad_RH.double() * h_RH.double()).sum(dim=1)
            want_RH = grad_RH.double() * (h_RH > 0) * gate_R.double().unsqueeze(1)
            hidden_gradient_(grad_RH, h_RH, gate_R, grad_gate_R)
            torch.testing.assert_close(grad_gate_R.double(), want_R, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad_RH.double(), want_RH, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_come_through():
    """A training that diverges is noticed; a gradient of 0 stays 0."""
    nan, inf = torch.nan, torch.inf
    grad_RH = torch.tensor([[1.0, nan, inf, 2.0], [nan, 3.0, inf, inf]])
    h_RH = torch.tensor([[nan, 1.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    grad_gate_R = torch.zeros(2)
    hidden_gradient_(grad_RH, h_RH, torch.tensor([2.0, 0.5]), grad_gate_R)
    torch.testing.assert_close(grad_RH, torch.tensor([[2.0, nan, inf, 0.0], [0.0, 1.5, 0.0, 0.0]]), equal_nan=True)
    assert grad_gate_R.isnan().all()
    case = make([2, 1, 3], torch.float32)
    case.x_TD.data[case.token_A[0]] = nan
    rows = moe_mlp(*case).isnan().all(dim=1)
    assert rows.tolist() == [token == case.token_A[0] for token in range(len(rows))]
