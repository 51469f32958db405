"""Sinkhorn gating against its equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import pytest
import torch

from moe_lm.gate.sinkhorn import Sinkhorn
from moe_lm.mistake import Mistake

SIZES = [(0, 4, 2), (1, 1, 1), (2, 4, 2), (30, 6, 2), (40, 5, 1), (9, 5, 4), (9, 3, 3), (3, 16, 2)]
"""Tokens, experts and experts a token."""
ROUNDS = [(1e-4, 100), (1e-30, 1), (1e-30, 3), (1e9, 100), (0.3, 100)]
"""Tolerance and largest number of rounds: to the end, one or three rounds, one by the tolerance, and a few."""
ROWS = [9, 0, 14, 2]
"""Rows of each group, one of them empty."""
GROUP = torch.repeat_interleave(torch.arange(4), torch.tensor(ROWS))
ZERO = torch.zeros((), dtype=torch.float64)


def make(num_experts, k, tolerance=1e-4, max_iterations=100, num_groups=None, width=5, **cast):
    """A gate with a random matrix whose first expert is the best for most of the tokens below."""
    groups = {} if num_groups is None else {"num_groups": num_groups}
    gate = Sinkhorn(
        width=width, num_experts=num_experts, k=k, tolerance=tolerance, max_iterations=max_iterations, **groups
    )
    with torch.no_grad():
        gate.gate_DE.normal_(generator=torch.Generator().manual_seed(0))
        gate.gate_DE[..., 0, 0] += 2
    return gate.to(cast.get("dtype", torch.float64)).train(cast.get("train", True))


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    x_TD = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x_TD[:, 0] += 1
    return x_TD


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def weights(k_TE, tolerance, max_iterations):
    """Return d1 and the number of rounds, from the table K = exp(logits) of floats."""
    num_tokens, num_experts = len(k_TE), len(k_TE[0])
    d1, rounds, change = [1.0] * num_experts, 0, math.inf
    while rounds < max_iterations and change >= tolerance:
        d0 = [1 / num_tokens / sum(row[i] * d1[i] for i in range(num_experts)) for row in k_TE]
        new = [1 / num_experts / sum(k_TE[t][i] * d0[t] for t in range(num_tokens)) for i in range(num_experts)]
        change = sum(abs(a - b) for a, b in zip(new, d1, strict=True)) / num_experts
        d1, rounds = new, rounds + 1
    return d1, rounds


def by_hand(x_TD, w_DE, k, tolerance, max_iterations, train):
    """Return the table of gate values and the sum of squares of log Z."""
    num_experts = w_DE.shape[1]
    logit = [[sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))) for i in range(num_experts)] for x_D in x_TD]
    k_TE = [[math.exp(z.item()) for z in row] for row in logit]
    d1 = weights(k_TE, tolerance, max_iterations)[0] if train and k_TE else [1.0] * num_experts
    rows, log_z_squared = [], ZERO
    for z, k_E in zip(logit, k_TE, strict=True):
        total = sum(value.exp() for value in z)
        chosen = sorted(range(num_experts), key=lambda i: -d1[i] * k_E[i])[:k]
        gate = [1 / (1 + (-value).exp()) if k == 1 else value.exp() / total for value in z]
        rows.append(torch.stack([gate[i] if i in chosen else ZERO for i in range(num_experts)]))
        log_z_squared = log_z_squared + total.log() ** 2
    return torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.float64), log_z_squared


def by_hand_in_groups(x_TD, w_GDE, *options):
    """The same for each group's rows and matrix: the table has a block for each group."""
    parts = [by_hand(part, w_DE, *options) for part, w_DE in zip(x_TD.split(ROWS), w_GDE, strict=True)]
    return torch.block_diag(*(table_TE for table_TE, _ in parts)), sum(log_z_squared for _, log_z_squared in parts)


def check(gating, table_TE, log_z_squared, k, train):
    """Everything in the gating is that of the loops."""
    torch.testing.assert_close(dense(gating), table_TE)
    torch.testing.assert_close(gating.importance_E, table_TE.sum(dim=0))
    assert gating.load_E.tolist() == (table_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_asked == k * gating.num_tokens == len(gating.token_A)
    assert gating.num_dropped == 0
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(gating.sums) == ({"log_z_squared", "num_tokens"} if train else set())
    if train:
        torch.testing.assert_close(gating.sums["log_z_squared"], log_z_squared)
        assert gating.sums["num_tokens"].item() == gating.num_tokens


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rounds", ROUNDS, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), SIZES)
def test_gating_follows_the_equations(num_tokens, num_experts, k, rounds, train):
    """Choice, gates, importance, load and sums are those of the loops; evaluation takes the k largest logits."""
    gate, x_TD = make(num_experts, k, *rounds, train=train), tokens(num_tokens)
    check(gate(x_TD), *by_hand(x_TD, gate.gate_DE, k, *rounds, train), k, train)


def test_the_rounds_of_the_tests_differ():
    """One round, a few and all of them choose differently, so that the tests above see when the loop ends."""
    x_TD = tokens(400)
    gate = make(5, 1)
    k_TE = (x_TD @ gate.gate_DE).exp().tolist()
    assert weights(k_TE, 1e-30, 1)[1] < weights(k_TE, 0.3, 100)[1] < weights(k_TE, 1e-4, 100)[1] < 100
    choices = []
    for rounds in [*ROUNDS[:3], ROUNDS[4]]:
        gating = make(5, 1, *rounds)(x_TD)
        check(gating, *by_hand(x_TD, gate.gate_DE, 1, *rounds, True), 1, True)
        choices.append(gating.expert_A[gating.token_A.argsort()].tolist())
    assert len(set(map(tuple, choices))) == 4


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rounds", ROUNDS, ids=str)
@pytest.mark.parametrize(("num_experts", "k"), [(5, 1), (5, 2), (4, 4), (1, 1), (16, 3)])
def test_groups_follow_the_equations_each_by_itself(num_experts, k, rounds, train):
    """Each group's rows and experts are balanced by themselves, and stop by themselves."""
    gate, x_TD = make(num_experts, k, *rounds, num_groups=4, train=train), tokens(sum(ROWS))
    check(gate(x_TD, GROUP), *by_hand_in_groups(x_TD, gate.gate_DE, k, *rounds, train), k, train)


@pytest.mark.parametrize("what", ["gate", "importance", "log_z_squared"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(5, 2), (5, 1), (3, 3)])
def test_gradients_are_those_of_the_equations(what, grouped, num_experts, k):
    """Gradients to x and W_g equal those of the loops, where the choice is a constant."""
    gate, x_TD = make(num_experts, k, num_groups=4 if grouped else None), tokens(sum(ROWS)).requires_grad_()
    gating = gate(x_TD, GROUP) if grouped else gate(x_TD)
    table_TE, log_z_squared = (by_hand_in_groups if grouped else by_hand)(x_TD, gate.gate_DE, k, 1e-4, 100, True)
    factor_TE = torch.randn(table_TE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got, want = {
        "gate": ((dense(gating) * factor_TE).sum(), (table_TE * factor_TE).sum()),
        "importance": ((gating.importance_E * factor_TE[0]).sum(), (table_TE.sum(dim=0) * factor_TE[0]).sum()),
        "log_z_squared": (gating.sums["log_z_squared"], log_z_squared),
    }[what]
    inputs = (x_TD, gate.gate_DE)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 1e-6


def test_by_hand_on_paper():
    """Four tokens of K = (4, 1), (3, 1), (3, 2), (1, 2): one round moves the third from expert 0 to expert 1.

    d0 = 1/20, 1/16, 1/20, 1/12, so expert 0's sum is 0.6208 and expert 1's 0.3792: d1_1 / d1_0 = 1.637, above 3/2.
    Gate values are e^z / (1 + e^z): 4/5 and 3/4, then 2/3 of expert 1 twice.
    """
    logit_TE = torch.tensor([[4.0, 1.0], [3.0, 1.0], [3.0, 2.0], [1.0, 2.0]]).double().log()
    gate = make(2, 1, 1e-4, 1, width=2)
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(2))
    gating = gate(logit_TE)
    assert (gating.expert_A.tolist(), gating.token_A.tolist()) == ([0, 0, 1, 1], [0, 1, 2, 3])
    assert gating.gate_A.tolist() == pytest.approx([4 / 5, 3 / 4, 2 / 3, 2 / 3])
    plain = gate.eval()(logit_TE)
    assert (plain.expert_A.tolist(), plain.token_A.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 3])
    assert plain.gate_A.tolist() == pytest.approx([4 / 5, 3 / 4, 3 / 4, 2 / 3])


@pytest.mark.parametrize("k", [1, 2])
def test_training_spreads_what_evaluation_crowds(k):
    """Plain top-k gives one expert more than 1.7 times its share, training none more than 1.35 times."""
    gate, x_TD = make(8, k, 1e-6, 500), tokens(2000)
    share = k * 2000 / 8
    assert gate(x_TD).load_E.max() < 1.35 * share
    assert gate.eval()(x_TD).load_E.max() > 1.7 * share


def test_training_sees_other_tokens_and_evaluation_does_not():
    """In evaluation a token's experts are its own affair, so the first tokens alone are gated alike."""
    gate, x_TD = make(6, 2), tokens(60)
    assert not torch.equal(dense(gate(x_TD))[:20] > 0, dense(gate(x_TD[:20])) > 0)
    gate.eval()
    torch.testing.assert_close(dense(gate(x_TD))[:20], dense(gate(x_TD[:20])))


@pytest.mark.parametrize("rounds", ROUNDS, ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_a_token_alone_gets_k_experts(k, rounds):
    """Balance over one token makes all experts equal, d1 K d0 = 1/E, so any k will do, with the gates of theirs."""
    gate, x_TD = make(4, k, *rounds), tokens(1)
    gating, logit_E = gate(x_TD), (x_TD @ gate.gate_DE)[0]
    assert gating.token_A.tolist() == [0] * k
    gate_E = logit_E.sigmoid() if k == 1 else logit_E.softmax(dim=0)
    torch.testing.assert_close(gating.gate_A, gate_E[gating.expert_A])


@pytest.mark.parametrize("k", [1, 2])
def test_equal_logits_give_every_token_k_experts(k):
    """Where all ties, each token still has k different experts with the gate of its logit."""
    gate = make(4, k, width=4)
    with torch.no_grad():
        gate.gate_DE.zero_()
    gating = gate(torch.ones(8, 4).double())
    assert (dense(gating) > 0).sum(dim=1).tolist() == [k] * 8
    assert gating.gate_A.tolist() == pytest.approx([0.5 if k == 1 else 0.25] * 8 * k)


@pytest.mark.parametrize("scale", [300, 3000])
@pytest.mark.parametrize("k", [1, 2])
def test_large_logits_leave_a_choice(scale, k):
    """Logits whose exponentials overflow still give k experts a token, and finite gates and gradients."""
    gate, x_TD = make(6, k, dtype=torch.float32), (tokens(30, dtype=torch.float32) * scale).requires_grad_()
    gating = gate(x_TD)
    assert torch.bincount(gating.token_A, minlength=30).tolist() == [k] * 30
    assert gating.gate_A.isfinite().all()
    (gating.gate_A.square().sum() + gating.sums["log_z_squared"]).backward()
    assert x_TD.grad.isfinite().all()
    assert gate.gate_DE.grad.isfinite().all()


def test_autocast_leaves_the_gate_in_float32():
    """Under bfloat16 autocast the gating is bit for bit that of float32, and costs one matrix in any case."""
    gate, x_TD = make(6, 2, dtype=torch.float32), tokens(20, dtype=torch.float32)
    torch.manual_seed(0)
    want = gate(x_TD)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x_TD)
    assert got.gate_A.dtype == torch.float32
    assert torch.equal(dense(got), dense(want))
    assert torch.equal(got.sums["log_z_squared"], want.sums["log_z_squared"])
    assert gate.operations_per_timestep() == 5 * 6


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 5), (0, 1)])
def test_a_wrong_k_is_a_mistake_of_one_line(num_experts, k):
    """More experts a token than there are, or none, is refused."""
    with pytest.raises(Mistake) as caught:
        make(num_experts, k)
    assert f"model.k={k}" in str(caught.value)
    assert "\n" not in str(caught.value)
