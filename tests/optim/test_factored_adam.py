"""The factored second moment against the full one, and against its own equations number by number.

Shape suffixes: E experts (M matrices), D rows, H columns, T tokens.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.model.moe import MoE
from moe_lm.ops import adam
from moe_lm.optim.factored_adam import FactoredAdam

BETA2, EPSILON = 0.9, 1e-3
CHUNKS = [1, 15, 40, 1 << 20]
"""Sizes of the largest temporary: a row of (4, 3, 5), a matrix, two matrices and a part, everything."""


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation allocates; views of older memory do not count."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def parameter_of(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def by_hand(w, gradients, rates):
    """Return the weights of one matrix after the updates of Appendix D, in lists of Python numbers."""
    num_rows, num_columns = len(w), len(w[0])
    r, c = [0.0] * num_rows, [0.0] * num_columns
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i in range(num_rows):
            r[i] = BETA2 * r[i] + (1 - BETA2) * sum(x * x for x in g[i]) / num_columns
        for j in range(num_columns):
            c[j] = BETA2 * c[j] + (1 - BETA2) * sum(row[j] ** 2 for row in g) / num_rows
        mean = sum(r) / num_rows
        for i in range(num_rows):
            for j in range(num_columns):
                v = r[i] * c[j] / mean / (1 - BETA2**step) if mean else 0.0
                w[i][j] -= rate * g[i][j] / (math.sqrt(v) + EPSILON)
    return w


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", [(4, 3, 5), (7, 5), (2, 2, 3, 5), (1, 1)], ids=str)
def test_any_gradients_follow_the_equations(shape, chunk, monkeypatch):
    """Six steps at changing rates are right for any chunk size; one matrix is idle."""
    monkeypatch.setattr(adam, "_CHUNK_ON_CPU", chunk)
    w = parameter_of(*shape)
    want = w.detach().reshape(-1, *shape[-2:]).tolist()
    optimizer = FactoredAdam([w], lr=0.1, beta2=BETA2, epsilon=EPSILON)
    gradients, rates = torch.randn(6, *shape, dtype=torch.float64), [0.01, 0.02, 0.03, 0.02, 0.01, 0.05]
    if len(shape) > 2:
        gradients[:, -1] = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        w.grad = gradient.clone()
        optimizer.step()
    by_matrix = gradients.reshape(6, -1, *shape[-2:])
    want = [by_hand(matrix, by_matrix[:, m].tolist(), rates) for m, matrix in enumerate(want)]
    want = torch.tensor(want, dtype=torch.float64).view(shape)
    torch.testing.assert_close(w.detach(), want, rtol=1e-12, atol=1e-12)


def test_rank_one_squared_gradients_give_adams_own_second_moment():
    """With g^2 = u v_t^T each of 50 steps in float64 equals Adam with beta1 = 0 and all of V."""
    w_EDH = parameter_of(3, 6, 4)
    full_EDH, v_EDH = w_EDH.detach().clone(), torch.zeros(3, 6, 4, dtype=torch.float64)
    optimizer = FactoredAdam([w_EDH], lr=0.01, beta2=0.99, epsilon=1e-8)
    u_ED1 = torch.rand(3, 6, 1, dtype=torch.float64) + 0.1
    for step in range(1, 51):
        v_E1H = torch.rand(3, 1, 4, dtype=torch.float64) * 1e-6
        g_EDH = (u_ED1 * v_E1H).sqrt() * torch.randn(3, 6, 4, dtype=torch.float64).sign()
        v_EDH = 0.99 * v_EDH + 0.01 * g_EDH**2
        full_EDH -= 0.01 * g_EDH / ((v_EDH / (1 - 0.99**step)).sqrt() + 1e-8)
        w_EDH.grad = g_EDH
        optimizer.step()
        torch.testing.assert_close(w_EDH.detach(), full_EDH, rtol=1e-11, atol=1e-11)
    v_hat_EDH = optimizer.state[w_EDH]["row_mean"][..., None] * optimizer.state[w_EDH]["column_mean"][:, None]
    v_hat_EDH /= optimizer.state[w_EDH]["row_mean"].mean(1)[:, None, None]
    torch.testing.assert_close(v_hat_EDH, v_EDH, rtol=1e-11, atol=0)


def test_an_expert_without_tokens_stays_and_its_averages_decay():
    """Gradients of zero never change the weights, and shrink the averages once there are any."""
    w_EDH = parameter_of(3, 4, 5, dtype=torch.float32)
    before_EDH = w_EDH.detach().clone()
    optimizer = FactoredAdam([w_EDH], lr=0.1, beta2=BETA2, epsilon=1e-8)
    w_EDH.grad = torch.zeros_like(w_EDH)
    w_EDH.grad[1] = 1e-3
    optimizer.step()
    assert torch.equal(w_EDH[[0, 2]], before_EDH[[0, 2]])
    assert (w_EDH[1] != before_EDH[1]).all()
    before_EDH, state = w_EDH.detach().clone(), optimizer.state[w_EDH]
    row_ED, column_EH = state["row_mean"].clone(), state["column_mean"].clone()
    w_EDH.grad = torch.zeros_like(w_EDH)
    optimizer.step()
    assert torch.equal(w_EDH, before_EDH)
    torch.testing.assert_close(state["row_mean"], BETA2 * row_ED, rtol=1e-5, atol=0)
    torch.testing.assert_close(state["column_mean"], BETA2 * column_EH, rtol=1e-5, atol=0)
    for mean in (row_ED[1], column_EH[1]):
        torch.testing.assert_close(mean, torch.full_like(mean, (1 - BETA2) * 1e-6), rtol=1e-5, atol=0)


def test_dead_rows_and_columns_stay():
    """A hidden unit that never fires, a column of zeros, stays as it is; other columns are as without it."""
    w, alone = parameter_of(6, 5), nn.Parameter(parameter_of(6, 5).detach()[:, :4].clone())
    before = w.detach().clone()
    for step in range(3):
        w.grad = torch.randn(6, 5, dtype=torch.float64)
        w.grad[:, 4] = 0
        alone.grad = w.grad[:, :4].clone()
        if step == 0:
            both = FactoredAdam([w, alone], lr=0.1, beta2=BETA2, epsilon=1e-12)
        both.step()
    assert torch.equal(w[:, 4], before[:, 4])
    torch.testing.assert_close(w[:, :4], alone)


def test_bytes_of_state_are_as_stated():
    """State takes 4 E (D + H) + 4 bytes; with weight and gradient a parameter costs 8 + 4 (1/D + 1/H) bytes."""
    num_experts, width, hidden = 7, 64, 128
    w_EDH = parameter_of(num_experts, width, hidden, dtype=torch.float32)
    w_EDH.grad = torch.ones_like(w_EDH)
    optimizer = FactoredAdam([w_EDH], lr=0.1, beta2=BETA2, epsilon=EPSILON)
    optimizer.step()
    state = sum(value.untyped_storage().nbytes() for value in optimizer.state[w_EDH].values())
    assert state == 4 * num_experts * (width + hidden) + 4
    a_parameter = (w_EDH.nbytes + w_EDH.grad.nbytes + state) / w_EDH.numel()
    assert a_parameter == pytest.approx(8 + 4 * (1 / width + 1 / hidden), abs=1e-4)


@pytest.mark.parametrize("shape", [(64, 8, 16), (3, 64, 32), (4096, 2), (2, 3, 4)], ids=str)
def test_no_temporary_is_of_full_size(shape, monkeypatch):
    """A step allocates nothing larger than a chunk of 1,024 numbers or its state, nor than the parameter."""
    monkeypatch.setattr(adam, "_CHUNK_ON_CPU", 1024)
    w = parameter_of(*shape)
    w.grad = torch.ones_like(w)
    optimizer = FactoredAdam([w], lr=0.1, beta2=BETA2, epsilon=EPSILON)
    with Largest() as seen:
        optimizer.step()
    state = max(value.numel() for value in optimizer.state[w].values())
    assert 0 < seen.numbers <= min(w.numel(), max(1024, state))


def test_state_survives_a_state_dict():
    """Restored state is the same bit for bit, and so are the steps after it."""
    gradients = torch.randn(4, 3, 4, 5)
    results = []
    for interrupted in (False, True):
        w_EDH = parameter_of(3, 4, 5, dtype=torch.float32)
        settings = {"lr": 0.1, "beta2": BETA2, "epsilon": EPSILON}
        optimizer = FactoredAdam([w_EDH], **settings)
        for step, gradient in enumerate(gradients):
            if interrupted and step == 2:
                saved = optimizer.state_dict()
                stored = {kind: value.clone() for kind, value in saved["state"][0].items()}
                optimizer = FactoredAdam([w_EDH], **settings)
                optimizer.load_state_dict({"state": {0: stored}, "param_groups": saved["param_groups"]})
                assert list(stored) == ["step", "row_mean", "column_mean"]
                for kind, value in optimizer.state[w_EDH].items():
                    assert value.dtype == torch.float32
                    assert torch.equal(value, stored[kind])
            w_EDH.grad = gradient.clone()
            optimizer.step()
        assert optimizer.state[w_EDH]["step"].item() == 4
        results.append(w_EDH.detach())
    assert torch.equal(*results)


def test_a_parameter_without_gradient_is_left_alone_and_a_closure_is_called():
    """As in any PyTorch optimizer."""
    used, unused = parameter_of(2, 3), parameter_of(2, 3)
    optimizer = FactoredAdam([used, unused], lr=0.1, beta2=BETA2, epsilon=EPSILON)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(unused, parameter_of(2, 3))
    assert list(optimizer.state) == [used]


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_a_vector_cannot_be_factored(shape):
    """The constructor refuses scalars and vectors."""
    with pytest.raises(ValueError, match="cannot be factored"):
        FactoredAdam([parameter_of(2, 2), parameter_of(*shape)], lr=0.1, beta2=BETA2, epsilon=EPSILON)


def trained_loss(seed, factored_experts):
    """Return an MoE layer's mean squared error of the last 50 steps on eight noisy maps; the noise alone is 0.25."""
    torch.manual_seed(seed)
    width, num_experts, num_tokens, num_steps, rate = 16, 8, 256, 300, 0.01
    centre_ED, map_EDD = torch.randn(num_experts, width) * 2, torch.randn(num_experts, width, width) / 4
    gate = partial(NoisyTopK, noise_epsilon=0.01)
    moe, last = MoE(width=width, hidden=32, num_experts=num_experts, k=2, gate=gate), nn.Linear(width, width)
    optimizers = [torch.optim.Adam([*moe.gate.parameters(), *last.parameters()])]
    if factored_experts:
        optimizers.append(FactoredAdam(moe.experts.parameters(), lr=rate, beta2=0.999, epsilon=1e-8))
    else:
        optimizers.append(torch.optim.Adam(moe.experts.parameters()))
    losses = []
    for step in range(num_steps):
        expert_T, z_TD = torch.randint(num_experts, (num_tokens,)), torch.randn(num_tokens, width)
        target_TD = torch.einsum("td,tdh->th", z_TD, map_EDD[expert_T]).tanh() + 0.5 * torch.randn(num_tokens, width)
        y_TD, gating = moe(centre_ED[expert_T] + z_TD, PaddedLayout(num_tokens, 1, None))
        loss = (last(y_TD) - target_TD).square().mean()
        importance_E = gating.importance_E
        (loss + 0.1 * importance_E.var(unbiased=False) / importance_E.mean() ** 2).backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / num_steps)
            optimizer.step()
            optimizer.zero_grad()
    return sum(losses[-50:]) / 50


def test_training_reaches_the_loss_of_plain_adam():
    """The mean loss of two seeds is within 2 % of plain Adam's; experts that are not trained end near 0.6."""
    plain, ours = (sum(trained_loss(seed, is_factored) for seed in (0, 1)) / 2 for is_factored in (False, True))
    assert 0.25 < plain < 0.4
    assert ours < 1.02 * plain
