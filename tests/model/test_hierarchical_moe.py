"""The hierarchical mixture of experts against the double sum of Appendix B, written out as loops.

Shape suffixes: T tokens, D width, G groups, E experts (of a group or of all), R rows sent to groups, A assignments.
"""

import json
import math
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from made import Made
from omegaconf import OmegaConf
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm.cli.machine import build
from moe_lm.config_files import folder
from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gating
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.loss.objective import Batchwise
from moe_lm.model.hierarchical_moe import HierarchicalGating, HierarchicalMoE
from moe_lm.model.moe import MoE
from moe_lm.ops.token_dispatch import dispatch

WIDTH, HIDDEN, EPSILON = 4, 6, 0.01
GATES = sorted(path.stem for path in (folder() / "gate").glob("*.yaml"))
GATE = partial(NoisyTopK, noise_epsilon=EPSILON)


def sentences(num_tokens):
    return PaddedLayout(num_tokens, 1, None)


def partial_of(name):
    """A gate as its YAML describes it, for the layer to complete."""
    return build(OmegaConf.to_container(OmegaConf.load(folder() / "gate" / f"{name}.yaml")))


def make(groups, experts, k, primary_k=None, *, train=True, dtype=torch.float64, primary_gate=GATE, gate=GATE):
    """A layer of `groups` times `experts` experts whose gates are random, as after some training."""
    torch.manual_seed(0)
    layer = HierarchicalMoE(
        width=WIDTH,
        hidden=HIDDEN,
        num_experts=groups * experts,
        num_groups=groups,
        k=k,
        primary_k=primary_k,
        primary_gate=primary_gate,
        gate=gate,
    )
    with torch.no_grad():
        for parameter in (*layer.primary_gate.parameters(), *layer.gate.parameters()):
            parameter.normal_()
    return layer.to(dtype).train(train)


def tokens(num_tokens, dtype=torch.float64):
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


def choice_by_hand(x_D, gate_DE, noise_DE, noise_E, k, train):
    """One token's gates by expert (eq. 3-5), and the chances of eq. 8-9: of the experts or, without noise, 0 and 1."""
    every = range(gate_DE.shape[1])
    clean = [sum(x_D[d] * gate_DE[d, i] for d in range(WIDTH)) for i in every]
    deviation = [(1 + sum(x_D[d] * noise_DE[d, i] for d in range(WIDTH)).exp()).log() + EPSILON for i in every]
    noisy = [clean[i] + train * noise_E[i] * deviation[i] for i in every]
    kept = sorted(every, key=lambda i: -noisy[i])[:k]
    gates = {i: noisy[i].exp() / sum(noisy[j].exp() for j in kept) for i in kept}
    if not train or k == len(every):
        return gates, [clean[i] * 0 + (i in kept) for i in every]
    kth = [sorted((noisy[j] for j in every if j != i), reverse=True)[k - 1] for i in every]
    return gates, [(1 + torch.erf((clean[i] - kth[i]) / deviation[i] / math.sqrt(2))) / 2 for i in every]


def by_hand(layer, x_TD, noise_TG, noise_RE):
    """Output (eq. 12), importance (eq. 13) and load (eq. 14), the noise of rows taken group by group."""
    first, second, k, train = layer.primary_gate, layer.gate, layer.k, layer.training
    groups, experts = second.gate_DE.shape[0], second.gate_DE.shape[2]
    primary = [
        choice_by_hand(x_D, first.gate_DE, first.noise_DE, e, k, train) for x_D, e in zip(x_TD, noise_TG, strict=True)
    ]
    answers = [x_D * 0 for x_D in x_TD]
    zero, noise = x_TD.sum() * 0, iter(noise_RE)
    importance, load = [zero] * (groups * experts), [zero] * (groups * experts)
    for i in range(groups):
        sent = [t for t in range(len(x_TD)) if i in primary[t][0]]
        primary_load = sum((chances[i] for _, chances in primary), start=zero)
        for t in sent:
            gates, chances = choice_by_hand(x_TD[t], second.gate_DE[i], second.noise_DE[i], next(noise), k, train)
            for j in range(experts):
                load[i * experts + j] = load[i * experts + j] + primary_load * chances[j] / len(sent)
            for j, value in gates.items():
                weight, expert = primary[t][0][i] * value, i * experts + j
                hidden_H = torch.clamp(x_TD[t] @ layer.experts.w1_EDH[expert], min=0)
                answers[t] = answers[t] + weight * (hidden_H @ layer.experts.w2_EHD[expert])
                importance[expert] = importance[expert] + weight
    y_TD = torch.stack([1 / (1 + (-answer).exp()) for answer in answers]) if answers else x_TD * 0
    return y_TD, torch.stack(importance), torch.stack(load)


def replayed(layer, x_TD, seed=3):
    """The layer's answer and the noise that its two levels drew, one after the other."""
    torch.manual_seed(seed)
    y_TD, gating = layer(x_TD, sentences(len(x_TD)))
    torch.manual_seed(seed)
    noise_TG = torch.randn(len(x_TD), layer.num_groups, dtype=x_TD.dtype)
    return y_TD, gating, noise_TG, torch.randn(len(x_TD) * layer.k, layer.gate.num_experts, dtype=x_TD.dtype)


# tokens, groups, experts of a group, k; with everything chosen at one level or at both, and groups without tokens
CASES = [
    (0, 2, 3, 1),
    (1, 2, 3, 2),
    (2, 4, 4, 2),
    (40, 4, 4, 2),
    (40, 2, 3, 1),
    (15, 4, 4, 3),
    (12, 3, 2, 2),
    (12, 2, 4, 2),
    (10, 3, 3, 3),
    (5, 16, 4, 2),
    (9, 1, 4, 1),
    (9, 4, 1, 1),
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "groups", "experts", "k"), CASES)
def test_layer_is_the_double_sum(num_tokens, groups, experts, k, train):
    """Output, importance, load, and the gradients of each to x and every parameter, are those of eq. 12-14."""
    layer, x_TD = make(groups, experts, k, train=train), tokens(num_tokens).requires_grad_()
    y_TD, gating, noise_TG, noise_RE = replayed(layer, x_TD)
    names = [name for name, _ in layer.named_parameters()]
    gates = ["primary_gate.gate_DE", "primary_gate.noise_DE", "gate.gate_DE", "gate.noise_DE"]
    assert names == [*gates, "experts.w1_EDH", "experts.w2_EHD"]
    inputs = (x_TD, *layer.parameters())
    found = (y_TD, gating.importance_E, gating.load_E)
    for got, want in zip(found, by_hand(layer, x_TD, noise_TG, noise_RE), strict=True):
        torch.testing.assert_close(got, want)
        factor = torch.randn(want.shape, dtype=want.dtype)
        grads = [
            torch.autograd.grad((part * factor).sum(), inputs, retain_graph=True, materialize_grads=True)
            if part.requires_grad
            else [torch.zeros_like(p) for p in inputs]
            for part in (got, want)
        ]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_load_teaches_the_primary_gate_too():
    """Load_H has gradients to both gates' matrices; Load_i(X^(i))_j alone, which the paper rejects, has none above."""
    layer = make(4, 4, 2)
    _, gating, *_ = replayed(layer, tokens(30))
    matrices = tuple(layer.primary_gate.parameters()) + tuple(layer.gate.parameters())
    grads = torch.autograd.grad(gating.load_E.square().sum(), matrices, retain_graph=True)
    assert all(grad.abs().max() > 1e-3 for grad in grads)
    alone = gating.parts["secondary_load_E"].square().sum()
    first, _, second, _ = torch.autograd.grad(alone, matrices, allow_unused=True)
    assert first is None
    assert second.abs().max() > 1e-3


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_tokens", [0, 1, 25])
def test_one_group_is_the_flat_layer(num_tokens, train):
    """One group with k = 1 gives the flat layer's output, gating and gradients, for the same noise."""
    layer, x_TD = make(1, 5, 1, train=train), tokens(num_tokens).requires_grad_()
    flat = MoE(width=WIDTH, hidden=HIDDEN, num_experts=5, k=1, gate=GATE).double().train(train)
    with torch.no_grad():
        flat.gate.gate_DE.copy_(layer.gate.gate_DE[0])
        flat.gate.noise_DE.copy_(layer.gate.noise_DE[0])
        flat.experts.load_state_dict(layer.experts.state_dict())
    torch.manual_seed(3)
    if train:
        torch.randn(num_tokens, 1, dtype=torch.float64)  # what the primary gate draws
    want = flat(x_TD, sentences(num_tokens))
    torch.manual_seed(3)
    got = layer(x_TD, sentences(num_tokens))
    grads = []
    for (y_TD, gating), model in ((got, layer), (want, flat)):
        total = (y_TD.square().sum() + gating.load_E.square().sum()) + gating.importance_E.square().sum()
        wanted = (x_TD, model.gate.gate_DE, model.gate.noise_DE, *model.experts.parameters())
        grads.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    torch.testing.assert_close(got[0], want[0])
    assert_same_gating(got[1], want[1])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_joining_one_group_leaves_the_flat_gating(k, train):
    """With one group every expert's weight, importance and load are the flat gate's, also for k above 1."""
    x_TD, width = tokens(20), {"width": WIDTH}
    gate = GATE(**width, num_experts=4, k=k).double().train(train)
    torch.nn.init.normal_(gate.gate_DE)
    want = gate(x_TD)
    primary = GATE(**width, num_experts=1, k=1).double().train(train)(x_TD)
    assert_same_gating(HierarchicalGating.of_levels(primary, want, k), want)


def assert_same_gating(got, want):
    """All the numbers of two gatings agree."""
    assert got.token_A.tolist() == want.token_A.tolist()
    assert got.expert_A.tolist() == want.expert_A.tolist()
    for name in ("gate_A", "importance_E", "load_E"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    for name in ("num_tokens", "num_requested", "num_dropped", "num_experts"):
        assert getattr(got, name) == getattr(want, name)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "groups", "experts", "k"), CASES)
def test_every_token_gets_k_experts_in_each_of_k_groups(num_tokens, groups, experts, k, train):
    """The list ascends by expert and then token, none twice; k * k experts a token, whose weights sum to 1."""
    gating = replayed(make(groups, experts, k, train=train), tokens(num_tokens))[1]
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert len(pairs) == gating.num_requested == num_tokens * k * k
    assert (gating.num_tokens, gating.num_dropped, gating.num_experts) == (num_tokens, 0, groups * experts)
    for token in range(num_tokens):
        per_group = Counter(expert // experts for expert, t in pairs if t == token)
        assert list(per_group.values()) == [k] * k
        assert gating.gate_A[gating.token_A == token].sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("secondary", [GATE, StrictlyBalanced], ids=["noisy", "balanced"])
def test_a_groups_gate_sees_only_what_it_is_sent(secondary):
    """It gets the rows of its group's tokens, ascending, and no other token has a part in its load or weights."""
    layer, x_TD = make(4, 3, 2, gate=secondary), tokens(12).requires_grad_()
    seen = []
    layer.gate.register_forward_hook(lambda module, given, gating: seen.extend([*given, gating]))
    _, gating, *_ = replayed(layer, x_TD)
    rows_RD, group_R, second = seen
    for i in range(4):
        sent = gating.token_A[gating.expert_A // 3 == i]
        received = [t for t in range(12) if any(torch.equal(x_TD[t], row) for row in rows_RD[group_R == i])]
        assert torch.equal(rows_RD[group_R == i], x_TD[received])
        assert len(received) == gating.parts["num_received_G"][i]
        assert set(sent.tolist()) <= set(received)
        mine = second.gate_A[second.expert_A // 3 == i].square().sum() + second.load_E.view(4, 3)[i].square().sum()
        (grad_TD,) = torch.autograd.grad(mine, x_TD, retain_graph=True)
        assert not grad_TD[[t for t in range(12) if t not in received]].any()
        assert grad_TD[received].any()


@pytest.mark.parametrize("gate", [GATE, StrictlyBalanced], ids=["noisy", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["unpadded", "padded"])
def test_gating_takes_as_many_operators_for_31_groups_as_for_4(dtype, gate):
    """Forward and backward of both levels dispatch the same operators whatever the number of groups."""
    counts = []
    for groups in (4, 31):  # from 32 choices on the noisy choice has another way to find the largest
        layer, x_TD = make(groups, 4, 2, dtype=dtype, gate=gate), tokens(100, dtype).requires_grad_()
        with Made() as made:
            primary = layer.primary_gate(x_TD)
            gating = HierarchicalGating.of_levels(
                primary, layer.gate(dispatch(x_TD, primary.token_A), primary.expert_A), 2
            )
            parts = (gating.gate_A, gating.importance_E, gating.load_E)
            sum(part.square().sum() for part in parts).backward()
        assert layer.gate.gate_DE.grad.any()
        counts.append(made.calls)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) < 400


def test_autocast_leaves_the_gating_in_float32():
    """Under bfloat16 autocast both levels' gating is bit for bit that of float32."""
    layer, x_TD = make(4, 4, 2, dtype=torch.float32), tokens(20, torch.float32)
    _, plain, *_ = replayed(layer, x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast, *_ = replayed(layer, x_TD)
    assert torch.equal(cast.expert_A, plain.expert_A)
    for name in ("gate_A", "importance_E", "load_E"):
        assert getattr(cast, name).dtype == torch.float32
        assert torch.equal(getattr(cast, name), getattr(plain, name))


def test_no_tokens_give_no_output_and_zero_gradients():
    """A micro-batch may hold nothing for the layer: statistics 0, gradients 0, in either type."""
    for dtype in (torch.float32, torch.float64):
        layer = make(3, 4, 2, dtype=dtype)
        y_TD, gating = layer(tokens(0, dtype).requires_grad_(), sentences(0))
        assert y_TD.shape == (0, WIDTH)
        assert not gating.load_E.any()
        assert not gating.importance_E.any()
        (y_TD.sum() + gating.importance_E.sum() + gating.load_E.sum()).backward()
        assert all((p.grad == 0).all() for p in layer.parameters())


def test_a_row_that_the_primary_gate_drops_loses_k_assignments():
    """Drops of both levels are counted in assignments, and the rest of the list is joined as ever."""
    primary = Gating(
        token_A=torch.tensor([0, 2, 1]),
        expert_A=torch.tensor([0, 0, 1]),
        gate_A=torch.tensor([0.5, 0.25, 0.125]),
        num_tokens=3,
        importance_E=torch.tensor([0.75, 0.125]),
        load_E=torch.tensor([3.0, 1.0]),
        num_requested=6,
        num_dropped=3,
        sums={"log_z": torch.tensor(1.0), "above": torch.tensor(5.0)},
    )
    secondary = Gating(
        token_A=torch.tensor([0, 1, 1, 2]),
        expert_A=torch.tensor([0, 0, 1, 3]),
        gate_A=torch.tensor([1.0, 0.5, 0.5, 1.0]),
        num_tokens=3,
        importance_E=torch.tensor([1.5, 0.5, 0.0, 1.0]),
        load_E=torch.tensor([1.0, 2.0, 0.0, 4.0]),
        num_requested=6,
        num_dropped=2,
        sums={"log_z": torch.tensor(10.0), "below": torch.tensor(7.0)},
    )
    gating = HierarchicalGating.of_levels(primary, secondary, 2)
    assert (gating.num_requested, gating.num_dropped, len(gating.expert_A)) == (12, 8, 4)
    assert gating.token_A.tolist() == [0, 2, 2, 1]
    assert gating.gate_A.tolist() == [0.5, 0.125, 0.125, 0.125]
    assert gating.importance_E.tolist() == [0.625, 0.125, 0.0, 0.125]
    assert gating.load_E.tolist() == [1.5, 3.0, 0.0, 4.0]  # 3 / 2 * (1, 2) and 1 / 1 * (0, 4)
    sums = {name: value.tolist() for name, value in gating.sums.items()}
    assert {name: sums[name] for name in ("log_z", "above", "below")} == {"log_z": 11.0, "above": 5.0, "below": 7.0}
    assert "load_E" not in gating.statistics()  # which is not additive


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("first", "second"), list(product(GATES, repeat=2)))
def test_any_gate_may_stand_at_either_level(first, second, train):
    """The output is the sum of the list's weighted experts, and its numbers agree, whatever the gates."""
    first, second = (partial_of(name) for name in (first, second))
    ks = [getattr(gate.func, "only_k", None) or 2 for gate in (second, first)]
    layer, x_TD = make(4, 3, *ks, train=train, primary_gate=first, gate=second), tokens(30).requires_grad_()
    y_TD, gating = layer(x_TD, sentences(30))
    assert len(gating.expert_A) == gating.num_requested - gating.num_dropped
    answers_TD = torch.zeros_like(x_TD)
    for token, expert, weight in zip(gating.token_A, gating.expert_A, gating.gate_A, strict=True):
        hidden_H = (x_TD[token] @ layer.experts.w1_EDH[expert]).clamp(min=0)
        answers_TD = answers_TD.index_add(0, token[None], (weight * (hidden_H @ layer.experts.w2_EHD[expert]))[None])
    torch.testing.assert_close(y_TD, answers_TD.sigmoid())
    if StrictlyBalanced in (first, second) and train:
        Batchwise(weight=1.0)(gating).backward()
        thresholds = [p for name, p in layer.named_parameters() if "threshold" in name]
        assert all(p.grad.isfinite().all() for p in thresholds)
    if not train:
        counted_E = torch.bincount(gating.expert_A, minlength=12).double()
        torch.testing.assert_close(gating.load_E, counted_E)


def hard_count(gating):
    return torch.bincount(gating.expert_A, minlength=gating.num_experts).double()


def assert_averages_zero(gap_NX):
    """The mean of the draws is within four standard errors of 0."""
    error_X = gap_NX.std(dim=0) / math.sqrt(len(gap_NX))
    assert (gap_NX.mean(dim=0).abs() < 4 * error_X).all()
    assert (error_X < 0.5).all()


def gating_of(layer, x_TD, primary):
    """The joined gating of one draw, without the experts' work."""
    return HierarchicalGating.of_levels(primary, layer.gate(dispatch(x_TD, primary.token_A), primary.expert_A), layer.k)


@torch.no_grad()
def test_load_estimates_the_hard_count_of_what_the_primary_gate_sent():
    """For one primary choice, mean load * |X^(i)| / Load_primary_i is each expert's mean number of tokens."""
    layer, x_TD = make(4, 4, 2), tokens(12)
    torch.manual_seed(0)
    primary = layer.primary_gate(x_TD)
    ratio_E = (hard_count(primary) / primary.load_E).repeat_interleave(4)
    assert (ratio_E - 1).abs().max() > 0.1  # else the factor of eq. 14 would not show
    gatings = [gating_of(layer, x_TD, primary) for _ in range(300)]
    assert_averages_zero(torch.stack([gating.load_E * ratio_E - hard_count(gating) for gating in gatings]))


@torch.no_grad()
def test_load_of_a_group_estimates_the_hard_count_of_all_draws():
    """With both levels drawn again, a group's load minus its tokens' assignments averages 0, as no group is empty."""
    layer, x_TD = make(3, 4, 2), tokens(40)
    torch.manual_seed(0)
    gatings = [gating_of(layer, x_TD, layer.primary_gate(x_TD)) for _ in range(300)]
    assert all(gating.parts["num_received_G"].all() for gating in gatings)
    assert_averages_zero(
        torch.stack([(gating.load_E - hard_count(gating)).view(3, 4).sum(dim=1) for gating in gatings])
    )


@torch.no_grad()
def test_a_group_without_tokens_has_no_load():
    """Eq. 14 is biased by construction: one token between two equal groups gives each 1/3, not the chance 1/2.

    The group's chance P is uniform on (0, 1) over the noise, and counts only if the token goes there: E[P^2] = 1/3.
    """
    layer, x_TD = make(2, 2, 1), tokens(1)
    layer.primary_gate.gate_DE.zero_()
    layer.primary_gate.noise_DE.zero_()
    torch.manual_seed(0)
    gatings = [gating_of(layer, x_TD, layer.primary_gate(x_TD)) for _ in range(600)]
    load_NG = torch.stack([gating.load_E.view(2, 2).sum(dim=1) for gating in gatings])
    error_G = load_NG.std(dim=0) / math.sqrt(len(gatings))
    assert ((load_NG.mean(dim=0) - 1 / 3).abs() < 4 * error_G).all()
    assert (error_G < 0.03).all()


def test_operations_are_the_primary_gate_k_gates_and_k_times_k_experts():
    """Table 7's MoE-256-h: 16 x 16 experts of 1024, 2 and 2 chosen, 4.19 M in the experts and 0.05 M in the gates."""
    with torch.device("meta"):
        layer = HierarchicalMoE(
            width=512, hidden=1024, num_experts=256, num_groups=16, k=2, primary_gate=GATE, gate=GATE
        )
    assert layer.operations_per_timestep() == 4 * 2 * 512 * 1024 + 3 * 2 * 512 * 16
    assert sum(p.numel() for p in layer.parameters()) == 256 * 2 * 512 * 1024 + 17 * 2 * 512 * 16


SIZES = {"width": 4, "hidden": 4, "num_experts": 6, "num_groups": 2, "k": 2, "primary_gate": GATE, "gate": GATE}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"width": 0}, "model.width=0"),
        ({"hidden": 0}, "model.expert_hidden=0"),
        ({"num_experts": 0}, "model.num_experts=0"),
        ({"num_groups": 0}, "model.num_groups=0"),
        ({"num_groups": -2}, "model.num_groups=-2"),
        ({"num_experts": 7}, "model.num_experts=7: must be a multiple of model.num_groups=2"),
        ({"num_groups": 12}, "model.num_experts=6: must be a multiple of model.num_groups=12"),
        ({"k": 0}, "model.k=0"),
        ({"k": 3}, "model.k=3"),
        ({"num_groups": 3, "k": 3}, "2 experts of a group"),
    ],
)
def test_wrong_sizes_are_mistakes(wrong, named):
    """Sizes below one, groups of unequal size, or more than there is at either level, are refused in one line."""
    with pytest.raises(ValueError, match=named) as caught:
        HierarchicalMoE(**SIZES | wrong)
    assert "\n" not in str(caught.value)


SMALL = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=9", "model.num_groups=3", "model.k=2"]


def left_by(name):
    """The last checkpoint's tensors and the metrics without times."""
    folder = Path("runs") / name
    last = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "words_per_second")
    return (
        {path.name: path.read_bytes() for path in last.glob("*.safetensors")},
        [{key: value for key, value in line.items() if key not in times} for line in lines],
    )


def test_training_resumes_bit_for_bit(workspace, moe_lm):
    """Two micro-batches a step with exact balance losses: stopped and continued ends as one undisturbed run."""
    once = with_overrides(list(TRAINING), "training.num_words=900", *SMALL)
    assert moe_lm("train", *once).code == 0
    for words in (500, 900):
        outcome = moe_lm("train", *with_overrides(once, f"training.num_words={words}"), "name=parts")
        assert outcome.code == 0, outcome.err
    tensors, metrics = left_by("tiny")
    assert (tensors, metrics) == left_by("parts")
    assert any("balance_load" in line and line["cv_load"] > 0 for line in metrics)
    outcome = moe_lm("train", *with_overrides(once, "model.num_groups=2"), "name=wrong")
    assert outcome.code == 2
    assert_one_line(outcome, "model.num_experts=9: must be a multiple of model.num_groups=2")


@pytest.mark.parametrize(
    ("first", "second", "tokens_of_loss"), [(StrictlyBalanced, GATE, 30), (GATE, StrictlyBalanced, 60)]
)
def test_the_thresholds_loss_is_a_mean_over_their_own_tokens(first, second, tokens_of_loss):
    """30 tokens at the primary level, at the secondary the 60 rows of 2 groups each; the other level has no part."""
    layer = make(4, 3, 2, primary_gate=first, gate=second)
    gating = layer(tokens(30), sentences(30))[1]
    level = "primary" if first is StrictlyBalanced else "secondary"
    want = gating.parts[f"{level}_threshold_gap"] / tokens_of_loss
    torch.testing.assert_close(Batchwise(weight=1.0)(gating), want)
