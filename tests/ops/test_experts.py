"""The experts' weighted sum and their grouped products against one row at a time.

Shape suffixes: T tokens, A assignments, D width, H hidden, E experts.
"""

import math
from dataclasses import replace

import pytest
import torch
from made import Made
from mixture_by_hand import COUNTS, HIDDEN, WIDTH, by_assignment, by_row, gradients, make
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe_lm.model.experts import Experts, grouped_products, set_recompute
from moe_lm.ops import cpu_rows as cached_rows
from moe_lm.ops import experts_loop as experts_loop
from moe_lm.ops.gradient_memory import forget_gradient


@pytest.fixture
def nan_memory():
    """Fresh memory is NaN everywhere, so a place that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(
    params=[(1, 1, ""), (200, 1, ""), (1 << 20, 1, ""), (200, 3, ""), (200, 1, "compiled"), (200, 3, "compiled")],
    ids=str,
)
def block_bytes(request, monkeypatch, set_threads, compile_loops):
    """Of as many experts as are worked on together, in how many threads, and by whose loops."""
    some, threads, loops = request.param
    compile_loops(bool(loops))
    monkeypatch.setattr(experts_loop, "_BYTES", some)
    monkeypatch.setattr(cached_rows, "_HOT_BYTES", some)
    monkeypatch.setattr(experts_loop, "_WORTHWHILE", 1)
    monkeypatch.setattr(experts_loop, "_UNEQUAL", threads)
    set_threads(threads)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_equal_one_assignment_at_a_time(counts, recompute, nan_memory, block_bytes):
    """Outputs and all gradients are those of the loop in float64; an expert without rows has gradient 0."""
    experts, x_TD, gating = make(counts)
    set_recompute(experts, recompute)
    inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
    got_TD, want_TD = experts(x_TD, gating), by_assignment(x_TD, gating, *inputs[1:])
    torch.testing.assert_close(got_TD, want_TD)
    got, want = gradients(got_TD, inputs), gradients(want_TD, inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    for e, count in enumerate(counts):
        if count == 0:
            assert (got[2][e] == 0).all()
            assert (got[3][e] == 0).all()


def test_gradients_by_differences(block_bytes):
    """torch's own check by finite differences, of all four arguments."""
    experts, x_TD, gating = make([2, 0, 3], width=3, hidden=4)
    x_TD = x_TD.detach().requires_grad_()

    def mixture(x_TD, gate_A, w1_EDH, w2_EHD):
        ends_E = torch.tensor([2, 2, 5])
        return experts_loop.experts_loop(x_TD, gating.token_A, gate_A, ends_E, w1_EDH, w2_EHD)

    weights = (w.detach().clone().requires_grad_() for w in experts.parameters())
    assert torch.autograd.gradcheck(mixture, (x_TD, gating.gate_A, *weights))


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
    """All experts, in order, each in one part; all in one where the shares would differ by too much."""
    monkeypatch.setattr(experts_loop, "_WORTHWHILE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ends = torch.tensor(counts).cumsum(0).tolist()
    parts = experts_loop._parts(ends, torch.empty(len(counts), 2, 4))
    assert [sum(sum(block.sizes) for block in part) for part in parts] == wanted
    blocks = [block for part in parts for block in part]
    assert [size for block in blocks for size in block.sizes] == counts
    assert [block.rows.stop for block in blocks] == [ends[block.experts.stop - 1] for block in blocks]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_torchs_checkpointing_may_surround_experts(recompute, block_bytes):
    """It hands out what was kept once; outputs and gradients are the same bits."""
    experts, x_TD, gating = make([2, 0, 3])
    set_recompute(experts, recompute)
    inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
    plain_TD, surrounded_TD = experts(x_TD, gating), checkpoint(experts, x_TD, gating, use_reentrant=False)
    assert torch.equal(surrounded_TD, plain_TD)
    for mine, theirs in zip(gradients(surrounded_TD, inputs), gradients(plain_TD, inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_lie_where_the_forgotten_ones_lay():
    """From one update to the next each weight's gradient keeps its memory, and nothing of it its old numbers."""
    experts, x_TD, gating = make([2, 0, 3], torch.float32)
    places, sums = [], []
    for _ in range(3):
        experts(x_TD, gating).sum().backward()
        places.append([w.grad.data_ptr() for w in experts.parameters()])
        sums.append([w.grad.clone() for w in experts.parameters()])
        for w in experts.parameters():
            forget_gradient(w)
            assert w.grad is None
    assert places[1] == places[2]
    for now, before in zip(sums[2], sums[0], strict=True):
        assert torch.equal(now, before)


def test_a_gradient_that_shares_its_memory_is_not_kept():
    """A view would keep a whole message, and be overwritten with it."""
    experts, x_TD, gating = make([2, 1], torch.float32)
    experts(x_TD, gating).sum().backward()
    message = torch.cat([experts.w1_EDH.grad.view(-1), torch.ones(3)])
    experts.w1_EDH.grad = message[:-3].view_as(experts.w1_EDH)
    before = message.clone()
    forget_gradient(experts.w1_EDH)
    experts(2 * x_TD, gating).sum().backward()
    assert torch.equal(message, before)


def test_gradients_of_two_passes_add_up():
    """Of micro-batches, also where the first one's took kept memory."""
    experts, x_TD, gating = make([2, 1], torch.float32)
    for _ in range(2):
        for w in experts.parameters():
            forget_gradient(w)
        experts(x_TD, gating).sum().backward()
        once = experts.w2_EHD.grad.clone()
        experts(x_TD, gating).sum().backward()
        torch.testing.assert_close(experts.w2_EHD.grad, 2 * once)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_equal_one_row_at_a_time(counts, recompute, nan_memory):
    """The grouped GEMM of a GPU, run in float32 on the CPU, agrees with the loop, with empty groups too."""
    experts, x_TD, gating = make(counts, torch.float32)
    x_AD, expert_A = x_TD.detach()[gating.token_A].requires_grad_(), gating.expert_A
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    ends_E = torch.tensor(counts).cumsum(0)
    got_AD = grouped_products(x_AD, ends_E, experts.w1_EDH, experts.w2_EHD, torch.float32, recompute=recompute)
    want_AD = by_row(x_AD, expert_A, *inputs[1:])
    torch.testing.assert_close(got_AD, want_AD, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(got_AD, inputs), gradients(want_AD, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_float32_agrees_with_float64():
    """In float32 outputs and gradients are those of float64 to rounding."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        experts, x_TD, gating = make([30, 0, 50, 10], torch.float32)
        experts, x_TD = experts.to(dtype), x_TD.detach().to(dtype).requires_grad_()
        gating = replace(gating, gate_A=gating.gate_A.detach().to(dtype).requires_grad_())
        y_TD = experts(x_TD, gating)
        factor_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=dtype).view_as(y_TD)
        inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
        results[dtype] = [y_TD, *torch.autograd.grad((y_TD * factor_TD).sum(), inputs)]
    for single, double in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_a_transposed_gradient_is_no_trouble():
    """The gradient that comes back may lie transposed in memory."""
    experts, x_TD, gating = make([3, 0, 5])
    factor_DT = torch.randn(WIDTH, len(x_TD), dtype=torch.float64)
    inputs = (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD)
    got = torch.autograd.grad((experts(x_TD, gating).t() * factor_DT).sum(), inputs)
    want = torch.autograd.grad((by_assignment(x_TD, gating, *inputs[1:]).t() * factor_DT).sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(WIDTH, HIDDEN), (33, 7), (64, 130)])
@pytest.mark.parametrize("counts", [*COUNTS, [17, 1, 0, 40, 3, 9, 2]], ids=str)
def test_recomputation_changes_no_bit(counts, width, hidden, dtype, nan_memory, block_bytes):
    """Must hold: outputs and gradients are equal, also where an expert's rows begin amid a cache line."""
    experts, x_TD, gating = make(counts, dtype, width, hidden)
    results = []
    for on in (False, True):
        set_recompute(experts, on)
        y_TD = experts(x_TD, gating)
        results.append([y_TD, *gradients(y_TD, (x_TD, gating.gate_A, experts.w1_EDH, experts.w2_EHD))])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def saved_bytes(run):
    """What autograd is given to keep, in bytes."""
    seen = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        run()
    return sum(seen)


def test_recomputation_keeps_no_hidden_activations():
    """Kept are x_TD, the assignments and the weights; without recomputation h_AH too, and h_AH is all that differs."""
    experts, x_TD, gating = make([9, 3, 0, 8], torch.float32)
    inputs = x_TD.nbytes + gating.token_A.nbytes + gating.gate_A.nbytes + experts.w1_EDH.nbytes + experts.w2_EHD.nbytes
    assert saved_bytes(lambda: experts(x_TD, gating)) == inputs + 4 * 20 * HIDDEN
    set_recompute(experts, True)
    assert saved_bytes(lambda: experts(x_TD, gating)) == inputs


def alive_after(run):
    """The bytes that a forward pass leaves behind for its backward pass, beside its inputs and its result."""
    with Made() as made:
        y_AD = run()
    return made.alive() - y_AD.nbytes


def test_recomputation_leaves_nothing_behind():
    """Memory itself: h_AH stays without recomputation, nothing with it; of grouped products the casts go too."""
    counts, rows, hidden = [9, 3, 0, 8], 20, 16
    experts, x_TD, gating = make(counts, torch.float32, hidden=hidden)
    x_AD = x_TD.detach()[gating.token_A].requires_grad_()
    w1_EDH, w2_EHD, ends_E = experts.w1_EDH, experts.w2_EHD, torch.tensor(counts).cumsum(0)
    looped, grouped = {}, {}
    for on in (False, True):
        set_recompute(experts, on)
        looped[on] = alive_after(lambda: experts(x_TD, gating))
        grouped[on] = alive_after(
            lambda on=on: grouped_products(x_AD, ends_E, w1_EDH, w2_EHD, torch.bfloat16, recompute=on)
        )
    assert looped == {False: 4 * rows * hidden, True: 0}
    ends = 4 * len(counts)  # int32, as torch's product takes them
    casts = 2 * (x_AD.numel() + w1_EDH.numel() + w2_EHD.numel())
    assert grouped == {False: 2 * rows * hidden + casts + ends, True: 0}


def test_recomputation_never_holds_all_hidden_activations(monkeypatch):
    """Neither pass makes anything of A H numbers: a block's share of h and of its gradient at a time."""
    monkeypatch.setattr(experts_loop, "_BYTES", 4 * 30 * 16)
    experts, x_TD, gating = make([30] * 10, torch.float32, width=4, hidden=16)
    largest = {}
    for on in (False, True):
        set_recompute(experts, on)
        with Made() as made:
            experts(x_TD, gating).sum().backward()
        largest[on] = made.largest()
    line = 64
    weights = experts.w1_EDH.nbytes  # and so many bytes their gradient has
    assert largest == {False: 4 * 300 * 16, True: max(4 * 30 * 16 + line, weights)}


def test_grouped_products_recompute_one_product():
    """One product more than without, for the hidden activations; the second product is not repeated."""
    experts, x_TD, gating = make([9, 3, 0, 8], torch.float32)
    x_AD = x_TD.detach()[gating.token_A].requires_grad_()
    inputs, ends_E = (x_AD, experts.w1_EDH, experts.w2_EHD), torch.tensor([9, 12, 12, 20])
    calls = {}
    for on in (False, True):
        with Made() as made:
            gradients(grouped_products(x_AD, ends_E, *inputs[1:], torch.float32, recompute=on), inputs)
        calls[on] = made.calls[torch.ops.aten._grouped_mm.default]
    assert calls == {False: 6, True: 7}


def test_recomputation_is_set_for_every_layer():
    """All experts of a model, on and off; off is where they begin."""
    model = nn.ModuleDict({name: Experts(width=2, hidden=3, num_experts=4) for name in ("lower", "upper")})
    assert [layer.recompute for layer in model.values()] == [False, False]
    for on in (True, False):
        set_recompute(model, on)
        assert [layer.recompute for layer in model.values()] == [on, on]


def test_two_matrices_without_biases_and_their_spread():
    """Two tensors of E D H numbers, no biases, of standard deviations sqrt(2/D) and sqrt(1/H)."""
    experts = Experts(width=64, hidden=128, num_experts=16)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {"w1_EDH": (16, 64, 128), "w2_EHD": (16, 128, 64)}
    # 131,072 uniform numbers: the deviation's standard error is about 0.13 %.
    assert experts.w1_EDH.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.01)
    assert experts.w2_EHD.std().item() == pytest.approx(math.sqrt(1 / 128), rel=0.01)


def test_operations_of_a_row_are_the_papers():
    """512 -> 1024 -> 512 costs 1.05 M multiply-adds a token (Appendix C.1)."""
    with torch.device("meta"):
        assert Experts(width=512, hidden=1024, num_experts=4).operations_per_row() == 1_048_576
