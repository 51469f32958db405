"""Passes over rows on a CPU, compiled and by torch's operators, against float64.

Shape suffixes: T tokens, D width, R rows, H hidden.
"""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from made import Made
from rows_of_tokens import SIZES, rows_of

from moe_lm.ops import backend as available
from moe_lm.ops.cpu_rows import add_, hidden_gradient_
from moe_lm.ops.noisy_top_k import noisy_choice

TYPES = [torch.float32, torch.float64]


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request, compile_loops):
    """Whether loops are compiled."""
    compile_loops(request.param)
    return request.param


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "as they are"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_add(sizes, dtype, weighted, compiled):
    """A loop over rows, added to what was there."""
    token_R, gate_R, y_RD = rows_of(*sizes, dtype)
    got_TD = torch.randn(sizes[0], sizes[1], dtype=dtype)
    want_TD = got_TD.double()
    for token, gate, y_D in zip(token_R.tolist(), gate_R.double(), y_RD.double(), strict=True):
        want_TD[token] += (gate if weighted else 1) * y_D
    with Made() as made:
        add_(got_TD, token_R, y_RD, gate_R if weighted else None)
    torch.testing.assert_close(got_TD.double(), want_TD, rtol=1e-5, atol=1e-5)
    assert made.calls[torch.ops.aten.index_add_.default] == (not compiled)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_hidden_gradient(sizes, dtype, compiled):
    """Dots with the gradient as it came, then the gradient masked and weighted, in its place."""
    _, gate_R, grad_RH = rows_of(*sizes, dtype)
    h_RH, grad_gate_R = torch.randn_like(grad_RH).relu(), torch.full_like(gate_R, torch.nan)
    want_R = (grad_RH.double() * h_RH.double()).sum(dim=1)
    want_RH = grad_RH.double() * (h_RH > 0) * gate_R.double().unsqueeze(1)
    with Made() as made:
        hidden_gradient_(grad_RH, h_RH, gate_R, grad_gate_R)
    torch.testing.assert_close(grad_gate_R.double(), want_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_RH.double(), want_RH, rtol=1e-5, atol=1e-5)
    assert made.calls[torch.ops.aten.threshold_backward.grad_input] == (not compiled)


def test_nothing_that_is_not_a_number_is_lost(compiled):
    """NaN and infinity come through, so that a training that diverges is seen to; a gradient of 0 stays 0."""
    nan, inf = torch.nan, torch.inf
    grad_RH = torch.tensor([[1.0, nan, inf, 2.0], [nan, 3.0, inf, inf]])
    h_RH = torch.tensor([[nan, 1.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    grad_gate_R = torch.zeros(2)
    hidden_gradient_(grad_RH, h_RH, torch.tensor([2.0, 0.5]), grad_gate_R)
    torch.testing.assert_close(grad_RH, torch.tensor([[2.0, nan, inf, 0.0], [0.0, 1.5, 0.0, 0.0]]), equal_nan=True)
    assert grad_gate_R.isnan().all()
    y_TD = torch.zeros(2, 2)
    add_(y_TD, torch.tensor([1, 1]), torch.tensor([[nan, inf], [1.0, 1.0]]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(y_TD, torch.tensor([[0.0, 0.0], [nan, inf]]), equal_nan=True)


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_equal_and_odd_logits_still_choose_different_experts(k, compiled):
    """Of any six of these a token gets N different experts, the largest first, NaN before all."""
    clean_TE = torch.tensor(list(product([torch.nan, 1.0, 2.0, torch.inf, -torch.inf], repeat=6)))
    logit_TF, draw_TE = torch.cat([clean_TE, torch.zeros_like(clean_TE)], dim=1), torch.zeros_like(clean_TE)
    top_TN, expert_TN, noisy_TE, _ = noisy_choice(logit_TF, draw_TE, 0.01, k)
    torch.testing.assert_close(noisy_TE, clean_TE, equal_nan=True)
    torch.testing.assert_close(top_TN, noisy_TE.topk(min(k + 1, 6), dim=1).values, equal_nan=True)
    torch.testing.assert_close(noisy_TE.gather(1, expert_TN), top_TN, equal_nan=True)
    assert all(len(set(row)) == min(k + 1, 6) for row in expert_TN.tolist())


def test_of_equal_logits_the_first_chosen_is_the_threshold_of_all(compiled):
    """By hand: P(x, i) grows with each clean logit by c = 1 / (deviation sqrt(2 pi)), and falls with the k-th largest.

    Gradients that come in are left as they were.
    """
    logit_TF, draw_TE = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True), torch.zeros(1, 3).double()
    grad_top_TN, grad_chance_TE = torch.tensor([[5.0, 7.0]]).double(), torch.tensor([[1.0, 2.0, 4.0]]).double()
    top_TN, expert_TN, _, chance_TE = noisy_choice(logit_TF, draw_TE, 0.01, 1)
    torch.autograd.backward([top_TN, chance_TE], [grad_top_TN, grad_chance_TE])
    c = 1 / ((math.log(2) + 0.01) * math.sqrt(2 * math.pi))
    want_E = c * grad_chance_TE[0]
    want_E[expert_TN[0]] += torch.tensor([5 - 7 * c, 7.0]).double()
    torch.testing.assert_close(logit_TF.grad, torch.cat([want_E, torch.zeros(3).double()]).unsqueeze(0))
    assert grad_top_TN.tolist() == [[5, 7]]
    assert grad_chance_TE.tolist() == [[1, 2, 4]]


def test_loops_are_compiled_for_many_numbers_on_one_thread(set_threads, monkeypatch):
    """Several threads are faster by torch's operators; half precision, other devices and few numbers are torch's."""
    many = torch.empty(512, 512)
    set_threads(1)
    assert available.by_numba(many)
    assert available.by_numba(many.double())
    assert not available.by_numba(many[1:])
    assert not available.by_numba(many.bfloat16())
    assert not available.by_numba(many.to("meta"))
    set_threads(2)
    assert not available.by_numba(many)
    set_threads(1)
    monkeypatch.setattr(available, "plain", True)
    assert not available.by_numba(many)


@pytest.mark.parametrize(
    ("module", "variables", "said"),
    [
        (None, {}, ""),
        ("raise RuntimeError('an older NumPy')", {}, "no compiled loops, torch's operators instead: an older NumPy"),
        ("", {}, "no compiled loops, torch's operators instead: module 'numba' has no"),
        ("", {"NUMBA_DISABLE_JIT": "1"}, ""),
    ],
    ids=["missing", "refuses", "is another", "switched off"],
)
def test_without_numba_torch_does_the_work(module, variables, said, tmp_path):
    """Where it is missing or switched off nothing is said; where it does not work, one line is."""
    program = """
import sys, warnings, torch
from made import Made
from moe_lm.ops.cpu_rows import add_
torch.set_num_threads(1)
if sys.argv[1] == "missing":
    sys.modules["numba"] = None
y = torch.zeros(1, 1 << 18)
with warnings.catch_warnings(record=True) as said, Made() as made:
    warnings.simplefilter("always")
    for _ in range(2):
        add_(y, torch.tensor([0]), torch.ones(1, 1 << 18))
assert (y == 2).all()
assert made.calls[torch.ops.aten.index_add_.default] == 2
print(*(w.message for w in said))
"""
    path = [str(Path(__file__).parents[1])]
    if module is not None and not variables:
        (tmp_path / "numba.py").write_text(module)
        path.insert(0, str(tmp_path))
    command = [sys.executable, "-c", program, "missing" if module is None else "there"]
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([*path, *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith(said)
    assert bool(done.stdout.strip()) == bool(said)
