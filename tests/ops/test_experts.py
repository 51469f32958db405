"""The two operations of experts: what they compute, what they keep, and which version runs.

Shape suffixes: T tokens, A assignments, D width, H hidden, E experts.
"""

import math
from functools import partial

import pytest
import torch
from made import Made
from naive_experts import COUNTS, HIDDEN, WIDTH, assert_right, assert_rows_right, by_assignment, make, results
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe_lm.model.moe import Experts, set_recompute
from moe_lm.ops import experts, experts_gpu
from moe_lm.ops.experts import grouped_mlp, moe_mlp
from moe_lm.ops.operation import reference_only

BOTH = [False, True]


@pytest.mark.parametrize("recompute", BOTH, ids=["kept", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_both_operations_equal_the_equation(counts, recompute, nan_memory):
    """The references and the versions that a CPU runs, in float64; experts and rows may be missing."""
    for function in (moe_mlp, moe_mlp.reference):
        assert_right(function, counts, torch.float64, 1e-10, recompute=recompute)
    for function in (grouped_mlp, grouped_mlp.reference):
        assert_rows_right(function, counts, torch.float64, 1e-10, recompute=recompute)


def test_a_process_without_experts_gets_its_rows_back():
    """There are none: more processes than experts."""
    arguments = torch.ones(0, 3), torch.ones(0, dtype=torch.int64), torch.ones(0, 3, 4), torch.ones(0, 4, 3)
    assert grouped_mlp(*arguments).shape == grouped_mlp.reference(*arguments).shape == (0, 3)


def test_which_version_runs(monkeypatch):
    """Grouped GEMM under autocast on a GPU for rows of whole 16 bytes, if there are any; else the loop."""
    ran = []
    for name, called in (("moe_mlp", moe_mlp), ("grouped_mlp", grouped_mlp)):
        monkeypatch.setattr(experts_gpu, name, lambda *_, by=f"gpu {name}", **__: ran.append(by))
        gpu, (*decision, _) = called._versions
        blocks = (*decision, lambda *_, by=f"cpu {name}", **__: ran.append(by))
        monkeypatch.setattr(called, "_versions", [gpu, blocks])

    class OnGpu:
        """As much of a tensor as the decision reads."""

        is_cuda, shape = True, (2, 8, 16)

        def __init__(self, rows=3):
            self.rows = rows

        def __len__(self):
            return self.rows

    odd = OnGpu()
    odd.shape = 2, 8, 12
    for autocast in (True, False):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, on=autocast: on)
        for x, w1 in ((OnGpu(), OnGpu()), (OnGpu(), odd), (OnGpu(0), OnGpu())):
            moe_mlp(x, x, x, x, w1, w1)
            grouped_mlp(x, x, w1, w1, recompute=True)
    case = make([2, 1])
    moe_mlp(*case)
    grouped_mlp(*case.rows)
    with reference_only():
        assert torch.equal(moe_mlp(*case), moe_mlp.reference(*case))
    assert ran == ["gpu moe_mlp", "gpu grouped_mlp", *["cpu moe_mlp", "cpu grouped_mlp"] * 6]


def test_products_have_the_type_of_autocast_on_a_gpu_only(monkeypatch):
    """It is also the type of rows that are sent to other processes."""
    x = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float32})
    assert experts.products_dtype(x) == torch.float32
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float16)
    assert experts.products_dtype(x) == torch.float16
    assert experts.products_dtype(torch.ones(1)) == torch.float32


def test_types_of_arguments_may_differ():
    """Tokens in bfloat16 are multiplied in the matrices' type; outputs and gradients have their argument's type."""
    case = make([3, 0, 5], torch.float32)
    case = case._replace(x_TD=case.x_TD.detach().bfloat16().requires_grad_(), gate_A=case.gate_A.detach().double())
    case.gate_A.requires_grad_()
    for function in (moe_mlp, moe_mlp.reference):
        got, want = results(function, case), results(by_assignment, case.to(torch.float64))
        types = [x.dtype for x in (case.x_TD, *case.differentiable)]
        assert [x.dtype for x in got] == types
        for mine, theirs in zip(got, want, strict=True):
            assert (mine.double() - theirs).norm() <= 0.02 * theirs.norm()


def test_float32_agrees_with_float64():
    """In float32 outputs and gradients are those of float64 to rounding."""
    case = make([30, 0, 50, 10], torch.float32)
    single, double = results(moe_mlp, case), results(moe_mlp, case.to(torch.float64))
    for mine, theirs in zip(single, double, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_any_layout_of_the_gradient_will_do():
    """The gradient that comes back may lie transposed in memory."""
    case = make([3, 0, 5])
    factor_DT = torch.randn(WIDTH, len(case.x_TD), dtype=torch.float64)
    got, want = (
        torch.autograd.grad((function(*case).t() * factor_DT).sum(), case.differentiable)
        for function in (moe_mlp, by_assignment)
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_two_passes_add_up():
    """As micro-batches need it; backward passes through one graph are equal, as nothing kept is used up."""
    case = make([2, 1], torch.float32)
    y_TD = moe_mlp(*case)
    once, again = (torch.autograd.grad(y_TD.sum(), case.differentiable, retain_graph=True) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)
    for _ in range(2):
        moe_mlp(*case).sum().backward()
    for x, first in zip(case.differentiable, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * first)


@pytest.mark.parametrize("recompute", BOTH, ids=["kept", "recomputed"])
def test_checkpointing_may_surround_experts(recompute):
    """`torch.utils.checkpoint` hands out saved tensors once; outputs and gradients are the same bits."""
    case = make([2, 0, 3])
    plain = results(moe_mlp, case, recompute=recompute)
    run = partial(moe_mlp, recompute=recompute)
    surrounded = results(lambda *arguments: checkpoint(run, *arguments, use_reentrant=False), case)
    for mine, theirs in zip(surrounded, plain, strict=True):
        assert torch.equal(mine, theirs)


def saved_bytes(run):
    """The bytes that autograd is given to keep."""
    seen = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        run()
    return sum(seen)


def test_recomputation_keeps_no_hidden_activations():
    """Kept are tokens, assignments and matrices; h_AH is all that recomputation saves."""
    case = make([9, 3, 0, 8], torch.float32)
    inputs = sum(x.nbytes for x in case) - case.expert_A.nbytes
    assert saved_bytes(lambda: moe_mlp(*case)) == inputs + 4 * 20 * HIDDEN
    assert saved_bytes(lambda: moe_mlp(*case, recompute=True)) == inputs


def alive_after(run):
    """The bytes that a forward pass saves for its backward pass, without its inputs and its result."""
    with Made() as made:
        y_AD = run()
    return made.alive() - y_AD.nbytes


def test_recomputation_leaves_nothing_behind():
    """Memory itself: h_AH stays without recomputation, nothing with it; grouped GEMM keeps its casts and ends too."""
    counts, rows, hidden = [9, 3, 0, 8], 20, 16
    case = make(counts, torch.float32, hidden=hidden)
    x_AD, *others = case.rows
    by_loop, grouped = (
        {on: alive_after(lambda on=on, run=run: run(recompute=on)) for on in BOTH}
        for run in (
            lambda recompute: moe_mlp(*case, recompute=recompute),
            lambda recompute: experts_gpu.grouped_mlp(x_AD, *others, recompute=recompute, dtype=torch.bfloat16),
        )
    )
    assert by_loop == {False: 4 * rows * hidden, True: 0}
    casts = 2 * (x_AD.numel() + case.w1_EDH.numel() + case.w2_EHD.numel())
    ends = 4 * len(counts)  # int32, as PyTorch's operator takes them
    assert grouped == {False: 2 * rows * hidden + casts + ends, True: 0}


def test_recomputation_is_set_for_every_layer():
    """All experts of a model, on and off; off is where they begin."""
    model = nn.ModuleDict({name: Experts(width=2, hidden=3, num_experts=4) for name in ("lower", "upper")})
    assert [layer.recompute for layer in model.values()] == [False, False]
    for on in (True, False):
        set_recompute(model, on)
        assert [layer.recompute for layer in model.values()] == [on, on]


def test_two_matrices_without_biases_and_their_spread():
    """Two tensors of E D H numbers, no biases, of standard deviations sqrt(2/D) and sqrt(1/H)."""
    made = Experts(width=64, hidden=128, num_experts=16)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert shapes == {"w1_EDH": (16, 64, 128), "w2_EHD": (16, 128, 64)}
    # 131,072 uniform numbers: the deviation's standard error is about 0.13 %.
    assert made.w1_EDH.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.01)
    assert made.w2_EHD.std().item() == pytest.approx(math.sqrt(1 / 128), rel=0.01)


def test_operations_of_a_row_are_the_papers():
    """512 -> 1024 -> 512 costs 1.05 M multiply-adds a token (Appendix C.1)."""
    with torch.device("meta"):
        assert Experts(width=512, hidden=1024, num_experts=4).operations_per_row() == 1_048_576
