"""The experts' grouped products against one row at a time.

Shape suffixes: A assignments, D width, H hidden, E experts.
"""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lm.experts import Experts, grouped_products, recompute_hidden

WIDTH, HIDDEN = 8, 12
COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 4, 0, 9], [6]]


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


class Made(TorchDispatchMode):
    """Counts the operations within and notes the memory behind every tensor that they make."""

    def __init__(self):
        super().__init__()
        self.calls, self._bytes = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage()
                self._bytes.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def largest(self):
        """The most bytes that any had."""
        return max(nbytes for _, nbytes in self._bytes)

    def alive(self):
        """The bytes of those that are still there."""
        return sum(nbytes for storage, nbytes in self._bytes if not storage.expired())


def make(counts, dtype=torch.float64, width=WIDTH, hidden=HIDDEN):
    torch.manual_seed(0)
    experts = Experts(width=width, hidden=hidden, num_experts=len(counts)).to(dtype)
    x_AD = torch.randn(sum(counts), width, dtype=dtype).requires_grad_()
    expert_A = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    return experts, x_AD, expert_A


def by_row(x_AD, expert_A, w1_EDH, w2_EHD):
    """ReLU(x W1) W2, a row at a time."""
    rows = [torch.clamp(x_D @ w1_EDH[e], min=0) @ w2_EHD[e] for x_D, e in zip(x_AD, expert_A.tolist(), strict=True)]
    return torch.stack(rows) if rows else x_AD * 1


def gradients(y_AD, inputs):
    factor_AD = torch.randn(y_AD.shape, generator=torch.Generator().manual_seed(1), dtype=y_AD.dtype)
    return torch.autograd.grad((y_AD * factor_AD).sum(), inputs, materialize_grads=True)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_equal_one_row_at_a_time(counts, nan_memory):
    """Outputs and all gradients are those of the loop in float64; an expert without rows has gradient 0."""
    experts, x_AD, expert_A = make(counts)
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    got_AD, want_AD = experts(x_AD, expert_A), by_row(x_AD, expert_A, *inputs[1:])
    torch.testing.assert_close(got_AD, want_AD)
    got, want = gradients(got_AD, inputs), gradients(want_AD, inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    for e, count in enumerate(counts):
        if count == 0:
            assert (got[1][e] == 0).all()
            assert (got[2][e] == 0).all()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_equal_one_row_at_a_time(counts, recompute, nan_memory):
    """The grouped GEMM of a GPU, run in float32 on the CPU, agrees with the loop, with empty groups too."""
    experts, x_AD, expert_A = make(counts, torch.float32)
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
        experts, x_AD, expert_A = make([30, 0, 50, 10])
        experts, x_AD = experts.to(dtype), x_AD.detach().to(dtype).requires_grad_()
        y_AD = experts(x_AD, expert_A)
        factor_AD = torch.linspace(-1, 1, y_AD.numel(), dtype=dtype).view_as(y_AD)
        grads = torch.autograd.grad((y_AD * factor_AD).sum(), (x_AD, experts.w1_EDH, experts.w2_EHD))
        results[dtype] = [y_AD, *grads]
    for single, double in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_transposed_gradient_is_no_trouble():
    """The gradient that comes back may lie transposed in memory."""
    experts, x_AD, expert_A = make([3, 0, 5])
    factor_DA = torch.randn(WIDTH, 8, dtype=torch.float64)
    inputs = (x_AD, experts.w1_EDH, experts.w2_EHD)
    got = torch.autograd.grad((experts(x_AD, expert_A).t() * factor_DA).sum(), inputs)
    want = torch.autograd.grad((by_row(x_AD, expert_A, *inputs[1:]).t() * factor_DA).sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(WIDTH, HIDDEN), (33, 7), (64, 130)])
@pytest.mark.parametrize("counts", [*COUNTS, [17, 1, 0, 40, 3, 9, 2]], ids=str)
def test_recomputation_changes_no_bit(counts, width, hidden, dtype, nan_memory):
    """Must hold: outputs and gradients are equal, also where an expert's rows begin amid a cache line."""
    experts, x_AD, expert_A = make(counts, dtype, width, hidden)
    results = []
    for on in (False, True):
        recompute_hidden(experts, on)
        y_AD = experts(x_AD, expert_A)
        results.append([y_AD, *gradients(y_AD, (x_AD, experts.w1_EDH, experts.w2_EHD))])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def saved_bytes(run):
    """What autograd is given to keep, in bytes."""
    seen = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        run()
    return sum(seen)


def test_recomputation_keeps_no_hidden_activations():
    """Kept are x_AD and the weights; without recomputation h_AH too, and h_AH is all that differs."""
    experts, x_AD, expert_A = make([9, 3, 0, 8], torch.float32)
    inputs = x_AD.nbytes + experts.w1_EDH.nbytes + experts.w2_EHD.nbytes
    assert saved_bytes(lambda: experts(x_AD, expert_A)) == inputs + 4 * 20 * HIDDEN
    recompute_hidden(experts, True)
    assert saved_bytes(lambda: experts(x_AD, expert_A)) == inputs


def alive_after(run):
    """The bytes that a forward pass leaves behind for its backward pass, beside its inputs and its result."""
    with Made() as made:
        y_AD = run()
    return made.alive() - y_AD.nbytes


def test_recomputation_leaves_nothing_behind():
    """Memory itself: h_AH stays without recomputation, nothing with it; of grouped products the casts go too."""
    counts, rows, hidden = [9, 3, 0, 8], 20, 16
    experts, x_AD, expert_A = make(counts, torch.float32, hidden=hidden)
    w1_EDH, w2_EHD, ends_E = experts.w1_EDH, experts.w2_EHD, torch.tensor(counts).cumsum(0)
    looped, grouped = {}, {}
    for on in (False, True):
        recompute_hidden(experts, on)
        looped[on] = alive_after(lambda: experts(x_AD, expert_A))
        grouped[on] = alive_after(
            lambda on=on: grouped_products(x_AD, ends_E, w1_EDH, w2_EHD, torch.bfloat16, recompute=on)
        )
    assert looped == {False: 4 * rows * hidden, True: 0}
    ends = 4 * len(counts)
    casts = 2 * (x_AD.numel() + w1_EDH.numel() + w2_EHD.numel())
    assert grouped == {False: 2 * rows * hidden + casts + ends, True: ends}


def test_recomputation_never_holds_all_hidden_activations():
    """Neither pass makes anything of A H numbers: an expert's share of h and of its gradient at a time."""
    counts = [30] * 10
    experts, x_AD, expert_A = make(counts, torch.float32, width=4, hidden=16)
    largest = {}
    for on in (False, True):
        recompute_hidden(experts, on)
        with Made() as made:
            experts(x_AD, expert_A).sum().backward()
        largest[on] = made.largest()
    assert largest == {False: 4 * 300 * 16, True: 4 * 300 * 4}


def test_grouped_products_recompute_one_product():
    """One product more than without, for the hidden activations; the second product is not repeated."""
    experts, x_AD, _ = make([9, 3, 0, 8], torch.float32)
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
        recompute_hidden(model, on)
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
