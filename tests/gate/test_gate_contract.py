"""What every gate under configs/gate promises; a new gate is found by its YAML and tested as it declares itself.

Shape suffixes: T tokens, D width, E experts, A assignments, G groups.
"""

import copy
import math

import naive
import pytest
import torch

from moe_lm.config_files import choices
from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gate
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.moe import MoE

WIDTH = 6
GATES = choices("gate")
BY_EXPERT = {"expert_choice", "strictly_balanced"}
BY_TOKEN = {"gshard", "hash", "loss_free", "noisy_top_k", "sinkhorn", "switch", "top_k"}
"""Gates whose experts choose tokens, and gates whose tokens choose experts, of those that are known here."""
ROWS = [[0, 0, 0], [0, 1, 0], [5, 0, 0, 40], [30], [100, *[2] * 15]]
"""Rows of each group: none, one row, empty groups, one group alone, very unequal ones."""


def k_of(name, num_experts=2):
    """Two experts a token, or as many as the gate is defined for."""
    return min(naive.partial_of(name).func.only_k or 2, num_experts)


def make(name, num_experts, train, num_groups=None):
    """A gate with random parameters (a new gate's may all be zero), adapted to a batch."""
    sizes = {"width": WIDTH, "num_experts": num_experts, "num_groups": num_groups}
    gate = naive.partial_of(name)(**sizes, k=k_of(name, num_experts))
    gate.register_forward_pre_hook(with_words, with_kwargs=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    group_T = num_groups and torch.arange(num_groups).repeat_interleave(-(-40 // num_groups))[:40]
    gate.adapt(gate.train()(tokens(40, seed=3), group_T).statistics())
    return gate.train(train)


def with_words(gate, arguments, named):
    """Add input words that follow from the tokens, so that equal tokens have equal words."""
    return arguments, {"input_T": (arguments[0][:, 0].float().abs() * 1000).long(), **named}


def tokens(num_tokens, seed=1):
    return naive.tokens(num_tokens, WIDTH, seed, torch.float32)


def test_gates_are_found():
    """The folder of configurations is the right one, and gates that look at other tokens in training say so."""
    causal = {name for name in BY_EXPERT | BY_TOKEN if naive.partial_of(name).func.non_causal_note is None}
    assert causal == {"hash", "loss_free", "noisy_top_k", "top_k"}
    assert set(GATES) >= BY_EXPERT | BY_TOKEN


def check(gate, gating, x_TD, num_experts, train):
    """Types, order, ranges, counts and sums of a gating are as `Gating` says; gradients are finite."""
    num_tokens = len(x_TD)
    assert gating.token_A.dtype == gating.expert_A.dtype == torch.int64
    assert gating.gate_A.dtype == gating.importance_E.dtype == gating.load_E.dtype == torch.float32
    assert gating.token_A.shape == gating.expert_A.shape == gating.gate_A.shape
    assert gating.importance_E.shape == gating.load_E.shape == (num_experts,)
    assert (gating.num_tokens, gating.num_experts) == (num_tokens, num_experts)

    naive.check_order(gating)
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert all(0 <= expert < num_experts and 0 <= token < num_tokens for expert, token in pairs)
    assert isinstance(gating.num_requested, int)
    assert isinstance(gating.num_dropped, int)
    assert len(pairs) == gating.num_requested - gating.num_dropped
    assert gating.num_dropped >= 0
    assert gating.num_unrouted() == num_tokens - len({token for _, token in pairs})

    importance, count = [0.0] * num_experts, [0] * num_experts
    for (expert, _), value in zip(pairs, gating.gate_A.tolist(), strict=True):
        importance[expert] += value
        count[expert] += 1
    assert gating.gate_A.isfinite().all()
    torch.testing.assert_close(gating.importance_E, torch.tensor(importance), rtol=1e-4, atol=1e-5)
    assert gating.load_E.isfinite().all()
    assert (gating.load_E >= 0).all()
    assert gating.load_E.sum() <= gating.num_tokens * num_experts + 1e-3
    if not train and not gating.num_dropped:
        assert gating.load_E.tolist() == count
    assert all(isinstance(x, torch.Tensor) and x.isfinite().all() for x in gating.sums.values())

    total = gating.gate_A.square().sum() + gating.importance_E.square().sum() + gating.load_E.square().sum()
    if total.requires_grad:
        total.backward()
    for parameter in (x_TD, *gate.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", GATES)
@naive.each("train", [True, False])
@naive.each("num_tokens", [0, 1, 200])
@naive.each("num_experts", [1, 2, 7, 64])
def test_contract(name, num_experts, num_tokens, train):
    """Types, order, ranges, counts and sums of a gating are as `Gating` says; gradients are finite."""
    gate, x_TD = make(name, num_experts, train), tokens(num_tokens).requires_grad_()
    check(gate, gate(x_TD), x_TD, num_experts, train)


@pytest.mark.parametrize("name", GATES)
@naive.each("train", [True, False])
@naive.each("num_tokens", [0, 1, 200])
@naive.each("num_experts", [1, 2, 7, 64])
def test_assignments_are_as_many_as_requested(name, num_experts, num_tokens, train):
    """Token choice: k * T; expert choice in training: E * m, every expert m; kept + dropped = requested."""
    gate, k = make(name, num_experts, train), k_of(name, num_experts)
    gating = gate(tokens(num_tokens))
    counts = torch.bincount(gating.expert_A, minlength=num_experts)
    assert len(gating.token_A) + gating.num_dropped == gating.num_requested
    if name in BY_TOKEN:
        assert gating.num_requested == k * num_tokens
        assert gating.num_dropped == 0 or (train and name in ("switch", "gshard"))
        if not gating.num_dropped:
            assert torch.bincount(gating.token_A, minlength=num_tokens).tolist() == [k] * num_tokens
    elif name in BY_EXPERT and train:
        m = min(max(math.floor(k * num_tokens / num_experts + 0.5), 1), num_tokens)
        assert counts.tolist() == [m] * num_experts
        assert gating.num_requested == num_experts * m


@pytest.mark.parametrize("name", GATES)
@naive.each("num_experts", [2, 7, 64])
def test_evaluation_decides_about_each_token_alone(name, num_experts):
    """In evaluation a batch's choices, importance, load and sums are those of its two parts together."""
    gate, x_TD = make(name, num_experts, train=False), tokens(120)
    whole, parts = gate(x_TD), [gate(x_TD[:50]), gate(x_TD[50:])]
    pairs = {
        (token + offset, expert)
        for part, offset in zip(parts, (0, 50), strict=True)
        for token, expert in zip(part.token_A.tolist(), part.expert_A.tolist(), strict=True)
    }
    assert pairs == set(zip(whole.token_A.tolist(), whole.expert_A.tolist(), strict=True))
    torch.testing.assert_close(whole.importance_E, parts[0].importance_E + parts[1].importance_E)
    torch.testing.assert_close(whole.load_E, parts[0].load_E + parts[1].load_E)
    assert whole.num_requested == parts[0].num_requested + parts[1].num_requested
    assert set(whole.sums) == set(parts[0].sums) == set(parts[1].sums)
    for key, value in whole.sums.items():
        torch.testing.assert_close(value, parts[0].sums[key] + parts[1].sums[key])


@pytest.mark.parametrize("name", GATES)
def test_training_looks_at_other_tokens_only_where_the_gate_says_so(name, monkeypatch):
    """Without noise the first tokens are gated alike alone and among others, but for a gate with `non_causal_note`."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    gate, x_TD = make(name, 6, train=True), tokens(60)
    alone, among = naive.dense(gate(x_TD[-20:])), naive.dense(gate(x_TD))[-20:]
    assert torch.equal(alone > 0, among > 0) == (gate.non_causal_note is None)


@pytest.mark.parametrize("name", GATES)
@naive.each("train", [True, False])
@naive.each("rows", ROWS)
@naive.each("num_experts", [1, 3, 8])
def test_contract_with_groups(name, num_experts, rows, train):
    """The contract over all groups' experts; a row is offered the experts of its group alone."""
    group_T = naive.groups(rows)
    gate, x_TD = make(name, num_experts, train, num_groups=len(rows)), tokens(sum(rows)).requires_grad_()
    gating = gate(x_TD, group_T)
    check(gate, gating, x_TD, len(rows) * num_experts, train)
    assert torch.equal(gating.expert_A // num_experts, group_T[gating.token_A])


@pytest.mark.parametrize("name", [name for name in GATES if naive.partial_of(name).func.has_matrix])
@naive.each("train", [True, False])
@naive.each("rows", ROWS)
@naive.each("num_experts", [1, 3, 8])
def test_groups_are_gates_of_their_own(monkeypatch, name, num_experts, rows, train):
    """A group's gate decides, counts and learns as the gate without groups does on the group's rows alone."""
    gate, x_TD = make(name, num_experts, train, num_groups=len(rows)).double(), tokens(sum(rows)).double()
    flat = make(name, num_experts, train).double()
    noise_TE = tokens(sum(rows), seed=2)[:, :1] * torch.linspace(-1, 1, num_experts).double()
    draws = iter([noise_TE, *noise_TE.split(rows)])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    chance_T1 = (noise_TE[:, :1] / 8 + 0.5).clamp(0.01, 0.99)
    chances = iter([chance_T1, *chance_T1.split(rows)])
    monkeypatch.setattr(torch, "rand_like", lambda x: next(chances).expand(-1, 2)[:, 0 if x.dim() == 1 else slice(1)])
    together = gate(x_TD, naive.groups(rows))
    value_of(together).backward()
    gatings = []
    for g, part_TD in enumerate(x_TD.split(rows)):
        alone = copy.deepcopy(flat)
        with torch.no_grad():
            for key, value in alone.state_dict().items():
                value.copy_(gate.state_dict()[key].view(len(rows), *value.shape)[g])
        gating, mine = alone(part_TD), together.expert_A // num_experts == g
        value_of(gating).backward()
        gatings.append(gating)
        assert torch.equal(together.expert_A[mine], gating.expert_A + g * num_experts)
        assert torch.equal(together.token_A[mine], gating.token_A + sum(rows[:g]))
        torch.testing.assert_close(together.gate_A[mine], gating.gate_A)
        for key, parameter in alone.named_parameters():
            whole = gate.get_parameter(key)
            assert (whole.grad is None) == (parameter.grad is None)  # evaluation does not use all of them
            if whole.grad is not None:
                grad = whole.grad.view(len(rows), *parameter.shape)[g]
                assert torch.allclose(grad, parameter.grad, rtol=1e-9, atol=1e-12)
    assert together.num_requested == sum(gating.num_requested for gating in gatings)
    assert together.num_dropped == sum(gating.num_dropped for gating in gatings)
    torch.testing.assert_close(together.importance_E, torch.cat([gating.importance_E for gating in gatings]))
    torch.testing.assert_close(together.load_E, torch.cat([gating.load_E for gating in gatings]))
    assert all(set(together.sums) == set(gating.sums) for gating in gatings)
    for key, value in together.sums.items():
        parts = [gating.sums[key] for gating in gatings]
        torch.testing.assert_close(value, torch.cat(parts) if key.endswith("_E") else sum(parts))


def value_of(gating):
    """A number that depends on every part of a gating and adds up over groups."""
    parts = [gating.gate_A.square(), gating.importance_E.square(), gating.load_E.square()]
    return sum(part.sum() for part in [*parts, *gating.sums.values()])


@pytest.mark.parametrize("name", GATES)
@naive.each("num_groups", [None, 4])
def test_autocast_leaves_the_gate_in_float32(name, num_groups):
    """Under bfloat16 autocast the gating is bit for bit that of float32, for float32 and for bfloat16 tokens."""
    gate, x_TD = make(name, 6, True, num_groups), tokens(20)
    group_T = None if num_groups is None else naive.groups([4, 0, 15, 1])

    def seeded(x_TD):
        torch.manual_seed(0)
        return gate(x_TD, group_T)

    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_rounded = seeded(x_TD), seeded(x_TD.bfloat16())
    plain, rounded = seeded(x_TD), seeded(x_TD.bfloat16().float())
    for got, want in ((cast, plain), (cast_rounded, rounded)):
        assert torch.equal(naive.dense(got), naive.dense(want))
        assert torch.equal(got.gate_A, want.gate_A)
        assert got.statistics().keys() == want.statistics().keys()
        for key, value in got.statistics().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, want.statistics()[key])


@pytest.mark.parametrize("name", GATES)
def test_operations_are_those_of_the_matrices(name):
    """512 x 256 multiply-adds, and with 16 groups of 16 experts 512 x 16, one group's; noise has a second matrix.

    So a width of 512 and 256 experts cost noisy gating 0.262 M, as Table 7's 8.6 M for MoE-256 implies.
    """
    gate, k = naive.partial_of(name), k_of(name)
    matrices = gate.func.has_matrix + gate.func.has_noise
    assert matrices == {"noisy_top_k": 2, "hash": 0}.get(name, 1) or name not in BY_EXPERT | BY_TOKEN
    assert gate(width=512, num_experts=256, k=k).operations_per_timestep() == matrices * 131_072
    assert gate(width=512, num_experts=16, k=k, num_groups=16).operations_per_timestep() == matrices * 8_192


@pytest.mark.parametrize("name", GATES)
def test_a_wrong_k_is_refused_in_one_line(name):
    """More experts a token than there are, none, or a number that the gate is not defined for."""
    gate = naive.partial_of(name)
    only_k = gate.func.only_k
    wrong = [(4, 0), (4, 5), (4, -1), (0, 1), (1, 2), *[(4, k) for k in (1, 2, 3) if only_k not in (k, None)]]
    for num_experts, k in wrong:
        with pytest.raises(ValueError, match=f"model.k={k}|model.k={only_k}") as caught:
            gate(width=3, num_experts=num_experts, k=k)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GATES)
@naive.each("num_groups", [None, 3])
def test_parameters_are_reset_as_the_constructor_draws_them(name, num_groups):
    """A gate made without memory and materialised becomes the one that the constructor makes, buffers included."""

    def made():
        return naive.partial_of(name)(width=5, num_experts=6, k=k_of(name), num_groups=num_groups)

    torch.manual_seed(3)
    want, after = made(), torch.get_rng_state()
    with torch.device("meta"):
        gate = made()
    gate.to_empty(device="cpu")
    for tensor in (*gate.parameters(), *gate.buffers()):
        tensor.data.fill_(torch.nan)
    torch.manual_seed(3)
    gate.reset_parameters()
    assert gate.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(value, want.state_dict()[key]) for key, value in gate.state_dict().items())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", GATES)
def test_only_the_statistics_that_losses_read_are_computed(name):
    """Those of the losses alone: none of the softmax over all experts is made for nobody."""
    gate, x_TD = make(name, 6, train=True), tokens(30)
    torch.manual_seed(0)
    every = gate(x_TD).sums
    for stat, own in (("log_z_squared", {"num_tokens"}), ("probability_E", {"requested_E", "first_choice_E"})):
        gate.required_stats = frozenset({stat})
        torch.manual_seed(0)
        some = gate(x_TD).sums
        assert (stat in some) == (stat in gate.differentiable_stats) == (stat in every)
        others = {"log_z_squared", "num_tokens", "probability_E", "requested_E", "first_choice_E"} - {stat, *own}
        assert not others & some.keys()
        assert all(torch.equal(value, every[key]) for key, value in some.items())
    assert gate.differentiable_stats <= every.keys() | {"importance_E", "load_E"}
    assert ("load_E" in gate.differentiable_stats) == gate(x_TD).load_E.requires_grad


@pytest.mark.parametrize("name", GATES)
@naive.each("levels", [1, 2])
def test_adapting_depends_on_the_sums_over_micro_batches_alone(name, levels):
    """Two processes with a micro-batch each name the same sums, and adapt alike by them; parameters stay."""
    torch.manual_seed(0)
    gate, k = naive.partial_of(name), k_of(name)
    sizes = {"width": WIDTH, "hidden": 4, "num_experts": 12, "k": k, "gate": gate}
    layer = MoE(**sizes) if levels == 1 else HierarchicalMoE(**sizes, num_groups=3, primary_gate=gate)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    copies, passed = [copy.deepcopy(layer), copy.deepcopy(layer)], []
    for seed, (own, size) in enumerate(zip(copies, (40, 23), strict=True)):
        gating = own(tokens(size, seed=seed), PaddedLayout(size, 1, None, torch.arange(size)))[1]
        passed.append({key: value.detach() for key, value in gating.statistics().items()})
    assert passed[0].keys() == passed[1].keys()
    sums = {key: value + passed[1][key] for key, value in passed[0].items()}
    for own in copies:
        own.adapt(sums)
    states = [own.state_dict() for own in copies]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    moved = {key for key, value in states[0].items() if not torch.equal(value, before[key])}
    assert not moved & {key for key, _ in layer.named_parameters()}
    assert bool(moved) == (gate.func.adapt is not Gate.adapt)
