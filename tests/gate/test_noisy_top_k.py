"""Noisy top-k gating against the paper's equations, written out as loops over tokens and experts.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import math

import naive
import pytest
import torch

from moe_lm.gate.noisy_top_k import NoisyTopK

EPSILON = 0.01


def make(num_experts, k, width=5, dtype=torch.float64, train=True, seed=0, num_groups=None):
    """A gate with random matrices, as after some training."""
    gate = NoisyTopK(width=width, num_experts=num_experts, k=k, noise_epsilon=EPSILON, num_groups=num_groups)
    gate = gate.to(dtype).train(train)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (gate.gate_DE, gate.noise_DE):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype))
    return gate


def replayed(gate, x_TD, seed=7, group_T=None):
    """The gate's decision and the noise it drew."""
    torch.manual_seed(seed)
    gating = gate(x_TD) if group_T is None else gate(x_TD, group_T)
    torch.manual_seed(seed)
    return gating, torch.randn(x_TD.shape[0], gate.num_experts, dtype=x_TD.dtype)


def by_hand(gate, x_TD, noise_TE):
    """Return dense gates (eq. 3-5) and the chances of being chosen (eq. 8-9), as nested lists."""
    gates_TE, chance_TE = [], []
    num_experts = gate.gate_DE.shape[1]
    for x_D, noise_E in zip(x_TD, noise_TE, strict=True):
        clean = naive.logits(x_D, gate.gate_DE)
        deviation = [(1 + value.exp()).log() + EPSILON for value in naive.logits(x_D, gate.noise_DE)]
        noisy = [clean[i] + noise_E[i] * deviation[i] for i in range(num_experts)]
        kept = sorted(range(num_experts), key=lambda i: -noisy[i])[: gate.k]
        total = sum(noisy[i].exp() for i in kept)
        gates_TE.append([noisy[i].exp() / total if i in kept else noisy[i] * 0 for i in range(num_experts)])
        chances = []
        for i in range(num_experts):
            others = sorted((noisy[j] for j in range(num_experts) if j != i), reverse=True)
            z = (clean[i] - others[gate.k - 1]) / deviation[i] if gate.k < num_experts else None
            chances.append(z if z is None else (1 + torch.erf(z / math.sqrt(2))) / 2)
        chance_TE.append(chances)
    return gates_TE, chance_TE


@naive.each(("num_tokens", "num_experts", "k"), [(0, 4, 2), (1, 4, 2), (30, 6, 2), (9, 5, 1), (9, 5, 4)])
def test_training_follows_equations_3_to_10(num_tokens, num_experts, k):
    """Gates, importance and smooth load are those of the equations for the noise that was drawn."""
    gate, x_TD = make(num_experts, k), naive.tokens(num_tokens)
    gating, noise_TE = replayed(gate, x_TD)
    gates, chances = by_hand(gate, x_TD, noise_TE)
    want_TE = naive.stacked(gates, num_experts)
    torch.testing.assert_close(naive.dense(gating), want_TE)
    torch.testing.assert_close(gating.importance_E, want_TE.sum(dim=0))
    torch.testing.assert_close(gating.load_E, naive.stacked(chances, num_experts).sum(dim=0))


@naive.each(("num_tokens", "num_experts", "k"), [(0, 4, 2), (1, 1, 1), (30, 6, 2), (9, 3, 3)])
@naive.each("train", [True, False])
def test_every_token_gets_k_experts_whose_gates_sum_to_one(num_tokens, num_experts, k, train):
    """The list holds k distinct experts a token, sorted by expert and then token, with weights that sum to 1."""
    gating = make(num_experts, k, train=train)(naive.tokens(num_tokens))
    naive.check_order(gating)
    for token in range(num_tokens):
        mine = gating.gate_A[gating.token_A == token].tolist()
        assert len(mine) == k
        assert sum(mine) == pytest.approx(1, abs=1e-12)
    assert len(gating.token_A) == gating.num_requested == num_tokens * k
    assert gating.num_dropped == 0


def test_evaluation_has_no_noise_and_counts_assignments():
    """In eval mode the logits are x W_g alone, whatever the seed, and the load is the number of assignments."""
    gate, x_TD = make(6, 2, train=False), naive.tokens(30)
    gating, _ = replayed(gate, x_TD, seed=7)
    again, _ = replayed(gate, x_TD, seed=8)
    gates, _ = by_hand(gate, x_TD, torch.zeros(30, 6))
    torch.testing.assert_close(naive.dense(gating), naive.stacked(gates, 6))
    assert torch.equal(naive.dense(gating), naive.dense(again))
    assert gating.load_E.tolist() == [gating.expert_A.tolist().count(i) for i in range(6)]


def test_k_of_all_experts_counts_every_token():
    """With k = num_experts the load is the number of tokens, and the gates are the softmax of all noisy logits."""
    gate, x_TD = make(4, 4), naive.tokens(12)
    gating, noise_TE = replayed(gate, x_TD)
    assert gating.load_E.tolist() == [12.0] * 4
    torch.testing.assert_close(naive.dense(gating), naive.stacked(by_hand(gate, x_TD, noise_TE)[0], 4))


def test_a_new_gate_draws_noise_of_deviation_ln2_plus_epsilon():
    """Zero matrices leave logits of pure noise: log(g_1 / g_0) of two experts has variance 2 (ln 2 + 0.01)^2."""
    num_tokens = 400_000
    gate = NoisyTopK(width=3, num_experts=2, k=2, noise_epsilon=EPSILON)
    torch.manual_seed(0)
    g_TE = torch.cat([naive.dense(gate(torch.randn(num_tokens // 4, 3))) for _ in range(4)])
    deviation = (g_TE[:, 1] / g_TE[:, 0]).log().double().std().item() / math.sqrt(2)
    want = math.log(2) + EPSILON
    # The standard error of a standard deviation is sigma / sqrt(2 n): 0.0008, an eighth of epsilon.
    assert abs(deviation - want) < 4 * want / math.sqrt(2 * num_tokens)


def test_load_is_the_chance_of_being_chosen_again():
    """Redrawing one expert's noise 40,000 times gives its P(x, i) within five standard errors (eq. 8)."""
    num_experts, k, draws = 5, 2, 40_000
    gate, x_TD = make(num_experts, k, seed=3), naive.tokens(1, seed=4)
    gating, noise_TE = replayed(gate, x_TD)
    clean_E = (x_TD @ gate.gate_DE)[0].detach()
    deviation_E = (x_TD @ gate.noise_DE)[0].detach().exp().add(1).log() + EPSILON
    noisy_E = clean_E + noise_TE[0] * deviation_E
    generator = torch.Generator().manual_seed(5)
    unsure = 0
    for i in range(num_experts):
        redrawn = noisy_E.repeat(draws, 1)
        redrawn[:, i] = clean_E[i] + torch.randn(draws, generator=generator, dtype=torch.float64) * deviation_E[i]
        rank = (redrawn > redrawn[:, i : i + 1]).sum(dim=1)
        frequency, chance = (rank < k).double().mean().item(), gating.load_E[i].item()
        unsure += 0.02 < chance < 0.98
        assert abs(frequency - chance) <= 5 * math.sqrt(chance * (1 - chance) / draws) + 1e-4
    assert unsure >= 3  # else the test would show little


def test_smooth_load_estimates_the_hard_count():
    """Over many draws, smooth load minus the assignments made averages 0 for every expert, so it sums to k T."""
    gate, x_TD = make(6, 2), naive.tokens(50)
    torch.manual_seed(0)
    rows = []
    for _ in range(600):
        gating = gate(x_TD)
        rows.append((gating.load_E - torch.bincount(gating.expert_A, minlength=6)).detach())
    gap_NE = torch.stack(rows)
    gap_NE = torch.cat([gap_NE, gap_NE.sum(dim=1, keepdim=True)], dim=1)  # the sum's target is k T = 100
    error_E = gap_NE.std(dim=0) / math.sqrt(len(rows))
    assert (gap_NE.mean(dim=0).abs() < 4 * error_E).all()
    assert (error_E < 0.5).all()


@naive.each("what", ["gate", "importance", "load", "all of them"])
@naive.each(("num_tokens", "num_experts", "k"), [(1, 4, 2), (8, 5, 2), (6, 4, 1)])
def test_gradients_are_those_of_the_equations(what, num_tokens, num_experts, k):
    """Gradients to x, W_g and W_noise through gates, importance and load equal those of the loops."""
    gate, x_TD = make(num_experts, k), naive.tokens(num_tokens).requires_grad_()
    gating, noise_TE = replayed(gate, x_TD)
    gates, chances = by_hand(gate, x_TD, noise_TE)
    gates_TE, chance_TE = naive.stacked(gates, num_experts), naive.stacked(chances, num_experts)
    factor_TE = naive.tokens(num_tokens, width=num_experts, seed=9)
    pairs = {
        "gate": ((naive.dense(gating) * factor_TE).sum(), (gates_TE * factor_TE).sum()),
        "importance": ((gating.importance_E * factor_TE[0]).sum(), (gates_TE.sum(dim=0) * factor_TE[0]).sum()),
        "load": ((gating.load_E * factor_TE[0]).sum(), (chance_TE.sum(dim=0) * factor_TE[0]).sum()),
    }
    got, want = pairs.get(what) or map(sum, zip(*pairs.values(), strict=True))
    inputs = (x_TD, gate.gate_DE, gate.noise_DE)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
        # One gate a token is the constant 1; everything else must really depend on all three.
        assert mine.abs().max() > 1e-6 or (k == 1 and what in ("gate", "importance"))


@naive.each("dtype", [torch.float32, torch.float64])
@naive.each("train", [True, False])
@naive.each(("num_tokens", "k"), [(0, 2), (1, 3), (50, 1), (50, 2), (50, 3), (50, 4)])
def test_one_group_is_the_gate_without_groups(num_tokens, k, train, dtype):
    """The same noise is drawn, and the list, importance, load and every gradient are those of the flat gate."""
    flat, one = make(4, k, 8, dtype, train), make(4, k, 8, dtype, train, num_groups=1)
    results = []
    for gate, group_T in ((flat, None), (one, torch.zeros(num_tokens, dtype=torch.int64))):
        x_TD = naive.tokens(num_tokens, 8, dtype=dtype).requires_grad_()
        gating, _ = replayed(gate, x_TD, group_T=group_T)
        after = torch.rand(1)
        total = (gating.gate_A.square() * (gating.expert_A + 1)).sum() + gating.importance_E.square().sum()
        total = total + (gating.load_E * torch.arange(4)).sum()
        grads = torch.autograd.grad(total, (x_TD, gate.gate_DE, gate.noise_DE), materialize_grads=True)
        results.append((gating, grads, after))
    (want, grads, after), (got, grads_of_one, after_one) = results
    assert torch.equal(after, after_one)
    assert got.token_A.tolist() == want.token_A.tolist()
    assert got.expert_A.tolist() == want.expert_A.tolist()
    assert (got.num_tokens, got.num_requested, got.num_experts) == (num_tokens, num_tokens * k, 4)
    for name in ("gate_A", "importance_E", "load_E"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    for mine, theirs in zip(grads_of_one, grads, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs)


@naive.each("train", [True, False])
@naive.each(("num_experts", "k"), [(5, 1), (5, 2), (4, 4), (3, 2)])
def test_groups_follow_the_equations_each_with_its_own_matrices(num_experts, k, train):
    """Gates, importance and load of each group are those of equations 3-10 for its rows, its matrices, its noise."""
    rows = [4, 0, 9, 1]
    gate, x_TD = make(num_experts, k, train=train, num_groups=4), naive.tokens(14)
    gating, noise_TE = replayed(gate, x_TD, group_T=torch.tensor([0] * 4 + [2] * 9 + [3]))
    table_TGE = naive.dense(gating).view(14, 4, num_experts)
    want_TGE = torch.zeros_like(table_TGE)
    for g, (part_TD, part_TE) in enumerate(zip(x_TD.split(rows), noise_TE.split(rows), strict=True)):
        flat = make(num_experts, k)
        with torch.no_grad():
            flat.gate_DE.copy_(gate.gate_DE[g])
            flat.noise_DE.copy_(gate.noise_DE[g])
        gates, chances = by_hand(flat, part_TD, part_TE * train)
        first = sum(rows[:g])
        want_TGE[first : first + rows[g], g] = naive.stacked(gates, num_experts)
        counted_TE = (want_TGE[first : first + rows[g], g] > 0).double()
        load_E = (naive.stacked(chances, num_experts) if train and k < num_experts else counted_TE).sum(dim=0)
        torch.testing.assert_close(gating.load_E.view(4, -1)[g], load_E)
    torch.testing.assert_close(table_TGE, want_TGE)
    torch.testing.assert_close(gating.importance_E, want_TGE.sum(dim=0).view(-1))


def test_parameters_are_all_groups_two_matrices():
    """Each group has two matrices of its own, at first all zero."""
    gate = NoisyTopK(width=512, num_experts=16, k=2, noise_epsilon=EPSILON, num_groups=16)
    assert sum(p.numel() for p in gate.parameters()) == 16 * 2 * 512 * 16
    assert not any(p.any() for p in gate.parameters())


@naive.each(("scale", "schedule", "progress"), [(0.25, "constant", 0.5), (1.0, "linear", 0.75), (2.0, "linear", 0.875)])
def test_scaled_noise_is_noise_of_a_smaller_deviation(scale, schedule, progress):
    """At a scale of 0.25, which a linear schedule reaches too, gates and load are those of a quarter of the noise."""
    gate, x_TD = make(6, 2), naive.tokens(40)
    gate.noise_scale, gate.noise_schedule, gate.progress = scale, schedule, progress
    gating, noise_TE = replayed(gate, x_TD)
    load_E = torch.zeros(6, dtype=torch.float64)
    for token, (x_D, noise_E) in enumerate(zip(x_TD, noise_TE, strict=True)):
        clean = naive.logits(x_D, gate.gate_DE)
        deviation = [((1 + value.exp()).log() + EPSILON) / 4 for value in naive.logits(x_D, gate.noise_DE)]
        noisy = [clean[i] + noise_E[i] * deviation[i] for i in range(6)]
        kept = sorted(range(6), key=lambda i: -noisy[i])[:2]
        total = sum(noisy[i].exp() for i in kept)
        for i in range(6):
            want = noisy[i].exp() / total if i in kept else torch.zeros(())
            assert naive.dense(gating)[token, i].item() == pytest.approx(want.item(), abs=1e-12)
            second = sorted((noisy[j] for j in range(6) if j != i), reverse=True)[1]
            load_E[i] += (1 + torch.erf((clean[i] - second) / deviation[i] / math.sqrt(2))) / 2
    torch.testing.assert_close(gating.load_E, load_E)


def test_without_noise_training_chooses_as_evaluation_does():
    """noise_scale=0: no second matrix, no operations for it, the load is a count, and its loss has no gradient."""
    torch.manual_seed(2)
    gate = NoisyTopK(width=5, num_experts=6, k=2, noise_epsilon=EPSILON, noise_scale=0.0, init_std=0.5)
    assert [name for name, _ in gate.named_parameters()] == ["gate_DE"]
    assert gate.operations_per_timestep() == 30
    assert "load_E" not in gate.differentiable_stats
    x_TD = naive.tokens(40, dtype=torch.float32)
    train, evaluation = gate.train()(x_TD), gate.eval()(x_TD)
    assert torch.equal(naive.dense(train), naive.dense(evaluation))
    assert train.load_E.tolist() == torch.bincount(train.expert_A, minlength=6).tolist()


def test_initial_deviation_and_temperature():
    """W_g has the deviation asked for, W_noise stays zero; the gate values are those of logits over the temperature."""
    torch.manual_seed(2)
    gate = NoisyTopK(width=200, num_experts=300, k=2, noise_epsilon=EPSILON, init_std=0.3)
    assert gate.gate_DE.std().item() == pytest.approx(0.3, rel=0.02)  # of 60,000 numbers: 0.3 +- 0.001
    assert abs(gate.gate_DE.mean().item()) < 0.005
    assert not gate.noise_DE.any()
    plain, cold = (
        NoisyTopK(width=5, num_experts=6, k=2, noise_epsilon=EPSILON, temperature=t).eval() for t in (1.0, 0.5)
    )
    with torch.no_grad():
        cold.gate_DE.copy_(torch.randn(5, 6))
        plain.gate_DE.copy_(2 * cold.gate_DE)
    x_TD = naive.tokens(10, dtype=torch.float32)
    torch.testing.assert_close(naive.dense(cold(x_TD)), naive.dense(plain(x_TD)))


def test_wrong_settings_are_refused_by_name():
    sizes = {"width": 5, "num_experts": 6, "k": 2, "noise_epsilon": EPSILON}
    for wrong, message in (
        ({"noise_scale": -1.0}, r"model\.gate_noise_scale=-1\.0"),
        ({"noise_schedule": "cosine"}, r"gate\.noise_schedule=cosine: choose constant or linear"),
        ({"noise_scale": 1e-40}, r"model\.gate_noise_scale=1e-40: must be 0, or at least 1e-6"),
        ({"init_std": 1e300}, r"model\.gate_init_std=1e\+300"),
        ({"init_std": -0.1}, r"model\.gate_init_std=-0\.1"),
        ({"temperature": 0.0}, r"gate_temperature=0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            NoisyTopK(**sizes | wrong)
