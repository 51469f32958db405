"""Strictly balanced gating against the equations of Appendix F, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts, A assignments, G groups.
"""

import json
import math
from pathlib import Path

import naive
import torch
from tiny_training import TRAINING, call, with_overrides

from moe_lm.gate.strictly_balanced import StrictlyBalanced

SIZES = [(0, 4, 2), (1, 1, 1), (1, 4, 2), (30, 6, 2), (9, 5, 1), (9, 5, 3), (9, 3, 3), (3, 8, 1), (7, 64, 2)]
"""Tokens, experts and experts a token; the last two have fewer tokens than experts."""
BALANCED = ["gate@model.layers.middle.gate=strictly_balanced", "balance=[batchwise]"]


def make(num_experts, k, num_groups=None, dtype=torch.float64, train=True, seed=0):
    """A gate with random matrix and thresholds, as after some training."""
    gate = StrictlyBalanced(width=5, num_experts=num_experts, k=k, num_groups=num_groups).to(dtype).train(train)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.gate_DE.normal_(generator=generator)
        gate.threshold_E.uniform_(0.5 / num_experts, 2 / num_experts, generator=generator)
    return gate


def by_hand(x_TD, w_DE, threshold_E, k, train):
    """Return G(x) of every token as a table, and the sum L_batchwise, from the printed formulas."""
    num_tokens, num_experts = len(x_TD), len(threshold_E)
    share = []
    for x_D in x_TD:
        e = [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))).exp() for i in range(num_experts)]
        share.append([value / sum(e) for value in e])
    m = min(max(math.floor(k * num_tokens / num_experts + 0.5), 1), num_tokens)
    batchwise = [[0] * num_experts for _ in x_TD]
    for i in range(num_experts):
        for j in sorted(range(num_tokens), key=lambda j: (-share[j][i].item(), j))[:m]:
            batchwise[j][i] = 1
    threshold = [[int(share[j][i] > threshold_E[i]) for i in range(num_experts)] for j in range(num_tokens)]
    mask = batchwise if train else threshold
    g_TE = torch.zeros(num_tokens, num_experts, dtype=x_TD.dtype)
    loss = torch.zeros((), dtype=x_TD.dtype)
    for j in range(num_tokens):
        total = sum(share[j][i] * mask[j][i] for i in range(num_experts))
        for i in range(num_experts):
            loss = loss + (threshold[j][i] - batchwise[j][i]) * (share[j][i] - threshold_E[i])
            if mask[j][i]:
                g_TE = g_TE.index_put((torch.tensor(j), torch.tensor(i)), share[j][i] / total)
    return g_TE, loss


@naive.each("train", [True, False])
@naive.each(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, train):
    """Gates, importance, load and the loss's sum are those of the loops, for either mask."""
    gate, x_TD = make(num_experts, k, train=train), naive.tokens(num_tokens)
    gating = gate(x_TD)
    want_TE, loss = by_hand(x_TD, gate.gate_DE, gate.threshold_E, k, train)
    torch.testing.assert_close(naive.dense(gating), want_TE)
    torch.testing.assert_close(gating.importance_E, want_TE.sum(dim=0))
    assert gating.load_E.tolist() == (want_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_requested == int((want_TE > 0).sum()) == len(gating.token_A)
    naive.check_order(gating)
    assert gating.sums.keys() == (
        {"threshold_gap", "threshold_tokens", "num_tokens", "log_z_squared"} if train else set()
    )
    if train:
        torch.testing.assert_close(gating.sums["threshold_gap"], loss)
        assert gating.sums["threshold_tokens"].item() == num_tokens


@naive.each("what", ["gate", "importance", "loss"])
@naive.each(("num_tokens", "num_experts", "k"), [(1, 4, 2), (8, 5, 2), (3, 6, 1), (5, 3, 3)])
def test_gradients_are_those_of_the_equations(what, num_tokens, num_experts, k):
    """Gradients to x, W_g and T through gates, importance and loss equal those of the loops."""
    gate, x_TD = make(num_experts, k), naive.tokens(num_tokens).requires_grad_()
    gating = gate(x_TD)
    want_TE, loss = by_hand(x_TD, gate.gate_DE, gate.threshold_E, k, train=True)
    factor_TE = torch.randn(want_TE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, want = {
        "gate": ((naive.dense(gating) * factor_TE).sum(), (want_TE * factor_TE).sum()),
        "importance": ((gating.importance_E * factor_TE[0]).sum(), (want_TE.sum(dim=0) * factor_TE[0]).sum()),
        "loss": (gating.sums["threshold_gap"], loss),
    }[what]
    inputs = (x_TD, gate.gate_DE, gate.threshold_E) if what == "loss" else (x_TD, gate.gate_DE)
    naive.same_gradients(got, want, inputs)


@naive.each("train", [True, False])
def test_one_group_is_the_flat_gate(train):
    """With one group everything is that of the flat gate with the same matrix and thresholds."""
    flat, grouped, x_TD = make(6, 2, train=train), make(6, 2, num_groups=1, train=train), naive.tokens(25)
    one, other = flat(x_TD), grouped(x_TD, torch.zeros(25, dtype=torch.int64))
    assert torch.equal(one.token_A, other.token_A)
    assert torch.equal(one.expert_A, other.expert_A)
    assert (one.num_requested, one.num_tokens) == (other.num_requested, other.num_tokens)
    torch.testing.assert_close(one.gate_A, other.gate_A)
    torch.testing.assert_close(one.statistics(), other.statistics())


@naive.each("train", [True, False])
@naive.each("sizes", [[7, 0, 12, 1], [0, 5], [20]])
def test_groups_are_flat_gates_on_their_own_rows(sizes, train):
    """Each group's part is what a flat gate gives on the group's rows; rows and experts are counted over all."""
    num_experts, k, num_groups = 5, 2, len(sizes)
    gate = make(num_experts, k, num_groups, train=train)
    x_TD = naive.tokens(sum(sizes)).requires_grad_()
    x_TD.data[3] = x_TD.data[4]  # equal gate values inside a group
    gating = gate(x_TD, torch.arange(num_groups).repeat_interleave(torch.tensor(sizes)))

    table = torch.zeros(sum(sizes), num_groups * num_experts).double()
    gap, load, start = torch.zeros(()).double(), [], 0
    for group, size in enumerate(sizes):
        rows, columns = slice(start, start + size), slice(group * num_experts, (group + 1) * num_experts)
        flat = make(num_experts, k, train=train)
        own = {"gate_DE": gate.gate_DE[group], "threshold_E": gate.threshold_E[columns]}
        for name, value in own.items():
            delattr(flat, name)
            setattr(flat, name, value)
        part = flat(x_TD[rows])
        torch.testing.assert_close(naive.dense(part), by_hand(x_TD[rows], *own.values(), k, train)[0])
        table[rows, columns] = naive.dense(part)
        gap = gap + part.sums.get("threshold_gap", 0)
        load += part.load_E.tolist()
        start += size

    naive.check_order(gating)
    assert gating.num_experts == num_groups * num_experts
    assert gating.load_E.tolist() == load
    torch.testing.assert_close(naive.dense(gating), table)
    torch.testing.assert_close(gating.importance_E, table.sum(dim=0))
    factor_TE = torch.randn(table.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, want = (naive.dense(gating) * factor_TE).sum(), (table * factor_TE).sum()
    inputs = [x_TD, gate.gate_DE]
    if train:
        torch.testing.assert_close(gating.sums["threshold_gap"], gap)
        assert gating.sums["threshold_tokens"].item() == sum(sizes)
        got, want, inputs = got + gating.sums["threshold_gap"], want + gap, [*inputs, gate.threshold_E]
    naive.same_gradients(got, want, inputs)


def test_evaluation_looks_at_one_token_and_training_at_all():
    """Another token's gates change when the last token changes in training only: training's choice sees ahead."""
    gate, x_TD = make(6, 2, train=False), naive.tokens(30)
    others_TD = x_TD.clone()
    others_TD[-1] = x_TD[0] * 3
    assert torch.equal(naive.dense(gate(x_TD))[:-1], naive.dense(gate(others_TD))[:-1])
    torch.testing.assert_close(naive.dense(gate(x_TD))[:5], naive.dense(gate(x_TD[:5])))
    gate.train()
    assert not torch.equal(naive.dense(gate(x_TD))[:-1] > 0, naive.dense(gate(others_TD))[:-1] > 0)


def test_a_token_above_no_threshold_gets_no_expert():
    """Thresholds that softmax values cannot pass leave an empty list; of 0, every expert."""
    gate, x_TD = make(6, 2, train=False), naive.tokens(10)
    with torch.no_grad():
        gate.threshold_E.fill_(1)
    assert gate(x_TD).num_requested == 0
    assert gate(x_TD).importance_E.tolist() == [0] * 6
    with torch.no_grad():
        gate.threshold_E.fill_(0)
    torch.testing.assert_close(naive.dense(gate(x_TD)), (x_TD @ gate.gate_DE).softmax(dim=1))


def test_gates_stay_finite_where_the_softmax_underflows():
    """An expert must take m tokens even where its gate value is 0 in float32; the shares still sum to 1."""
    gate, x_TD = make(6, 1, dtype=torch.float32), (naive.tokens(30, dtype=torch.float32) * 1000).requires_grad_()
    gating = gate(x_TD)
    assert (gating.load_E == 5).all()
    taken_T = naive.dense(gating).sum(dim=1)
    assert torch.equal(taken_T[gating.token_A], torch.ones(30))
    gating.gate_A.square().sum().backward()
    assert x_TD.grad.isfinite().all()
    assert gate.gate_DE.grad.isfinite().all()


def test_a_new_gate_spreads_the_tokens():
    """A fresh matrix already tells the experts apart: 64 experts that each take 50 of 400 tokens reach nearly all."""
    torch.manual_seed(0)
    gate, x_TD = StrictlyBalanced(width=32, num_experts=64, k=8), torch.randn(400, 32)
    gating = gate(x_TD)
    assert (gating.load_E == 50).all()
    assert gating.token_A.unique().numel() > 390
    torch.testing.assert_close(gate.threshold_E.data, torch.full((64,), 1 / 64))
    # Gate values near 1/n, where the thresholds lie: the loss starts small beside nats of about 10.
    assert 0 < gating.sums["threshold_gap"].item() / 400 < 0.05


def test_the_command_trains_and_evaluates(workspace, moe_lm):
    """Balanced from the first step, better and better, and evaluated as its result says; resuming: test_routing.py."""
    assert call("train", *with_overrides(TRAINING, *BALANCED)) == 0
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "balance_batchwise" in line]
    assert training
    assert all(line["balance_batchwise"] >= 0 and line["max_over_mean_load"] == 1 for line in training)
    perplexity = json.loads(Path("runs/tiny/result.json").read_text())["perplexity"]
    assert perplexity["valid"] < next(line["perplexity"] for line in lines if "perplexity" in line) - 3
    outcome = moe_lm("evaluate", "run=runs/tiny", "split=test")
    assert outcome.code == 0
    assert f"{perplexity['test']:.4f}" in outcome.out
