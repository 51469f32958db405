"""The mixture-of-experts layer against the sum over all experts, token by token (eq. 1).

Shape suffixes: T tokens, D width, H hidden, E experts.
"""

import math
from functools import partial

import pytest
import torch

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.moe import Experts, MoE
from moe_lm.optim import parameter_groups, token_shares

WIDTH, HIDDEN = 5, 7
GATE = partial(NoisyTopK, noise_epsilon=0.01)


def sentences(num_tokens):
    return PaddedLayout(num_tokens, 1, None)


def make(num_experts, k, train, dtype=torch.float64):
    torch.manual_seed(0)
    layer = MoE(width=WIDTH, hidden=HIDDEN, num_experts=num_experts, k=k, gate=GATE).train(train)
    with torch.no_grad():
        layer.gate.gate_DE.normal_()
        layer.gate.noise_DE.normal_()
    return layer.to(dtype)


def by_hand(layer, x_TD, noise_TE):
    """sigmoid(sum_i G(x)_i E_i(x)) with dense gates: experts that are not chosen count 0."""
    clean_TE = x_TD @ layer.gate.gate_DE
    noisy_TE = clean_TE + noise_TE * ((1 + (x_TD @ layer.gate.noise_DE).exp()).log() + 0.01)
    rows, gates = [], []
    for x_D, logit_E in zip(x_TD, noisy_TE, strict=True):
        kept = sorted(range(len(logit_E)), key=lambda i: -logit_E[i])[: layer.gate.k]
        exps = [logit_E[i].exp() if i in kept else logit_E[i] * 0 for i in range(len(logit_E))]
        total = x_D * 0
        for i, e in enumerate(exps):
            hidden_H = torch.clamp(x_D @ layer.experts.w1_EDH[i], min=0)
            total = total + e / sum(exps) * (hidden_H @ layer.experts.w2_EHD[i])
        rows.append(1 / (1 + (-total).exp()))
        gates.append(torch.stack([e / sum(exps) for e in exps]))
    return torch.stack(rows), torch.stack(gates)


CASES = [(1, 4, 2), (40, 6, 2), (3, 16, 1), (12, 3, 3), (10, 1, 1)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), CASES)
def test_layer_is_the_sum_over_experts(num_tokens, num_experts, k, train):
    """Outputs and gradients to x, W_g, W_noise, W1 and W2 are those of the brute-force sum in float64."""
    layer = make(num_experts, k, train)
    x_TD = torch.randn(num_tokens, WIDTH, dtype=torch.float64).requires_grad_()
    torch.manual_seed(3)
    got_TD, gating = layer(x_TD, sentences(num_tokens))
    torch.manual_seed(3)
    noise_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64) * train
    want_TD, gates_TE = by_hand(layer, x_TD, noise_TE)
    torch.testing.assert_close(got_TD, want_TD)
    torch.testing.assert_close(gating.importance_E, gates_TE.sum(dim=0))

    factor_TD = torch.randn(num_tokens, WIDTH, dtype=torch.float64)
    factor_E = torch.randn(num_experts, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["gate.gate_DE", "gate.noise_DE", "experts.w1_EDH", "experts.w2_EHD"]
    inputs = [x_TD, *layer.parameters()]
    got = (got_TD * factor_TD).sum() + (gating.importance_E * factor_E).sum()
    want = (want_TD * factor_TD).sum() + (gates_TE.sum(dim=0) * factor_E).sum()
    got = torch.autograd.grad(got, inputs, materialize_grads=True)
    want = torch.autograd.grad(want, inputs, materialize_grads=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    idle = [i for i in range(num_experts) if i not in gating.expert_A.tolist()]
    assert (got[3][idle] == 0).all()
    assert (got[4][idle] == 0).all()
    assert len(idle) >= num_experts - num_tokens * k


def test_no_tokens_give_no_output_and_zero_gradients():
    """A micro-batch may hold nothing for the layer: empty output, statistics 0, gradients 0 (not garbage)."""
    layer = make(4, 2, train=True)
    x_TD = torch.zeros(0, WIDTH, dtype=torch.float64).requires_grad_()
    y_TD, gating = layer(x_TD, sentences(0))
    assert y_TD.shape == (0, WIDTH)
    assert gating.load_E.tolist() == gating.importance_E.tolist() == [0.0] * 4
    (y_TD.sum() + gating.importance_E.sum() + gating.load_E.sum()).backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_one_expert_is_the_feed_forward_layer(train):
    """One expert with k = 1 gives the dense layer of the same weights, outputs and gradients."""
    layer, dense = make(1, 1, train), FeedForward(width=WIDTH, hidden=HIDDEN, num_hidden=1).double()
    with torch.no_grad():
        dense.weights[0].copy_(layer.experts.w1_EDH[0])
        dense.weights[1].copy_(layer.experts.w2_EHD[0])
    x_TD = torch.randn(20, WIDTH, dtype=torch.float64).requires_grad_()
    (y_TD, _), (want_TD, nothing) = layer(x_TD, sentences(20)), dense(x_TD, sentences(20))
    assert nothing is None
    torch.testing.assert_close(y_TD, want_TD)
    factor_TD = torch.randn(20, WIDTH, dtype=torch.float64)
    got = torch.autograd.grad((y_TD * factor_TD).sum(), (x_TD, layer.experts.w1_EDH, layer.experts.w2_EHD))
    want = torch.autograd.grad((want_TD * factor_TD).sum(), (x_TD, *dense.weights))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs)


def test_the_output_passes_a_sigmoid():
    """Experts that answer 0 give 1/2; an answer of ln 3 gives 3/4 (Appendix C.1)."""
    layer = make(4, 4, train=False)
    x_TD = torch.ones(3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.experts.w1_EDH.fill_(1 / WIDTH)
        layer.experts.w2_EHD.zero_()
    assert layer(x_TD, sentences(3))[0].tolist() == [[0.5] * WIDTH] * 3
    with torch.no_grad():
        layer.experts.w2_EHD.fill_(math.log(3) / HIDDEN)
    torch.testing.assert_close(layer(x_TD, sentences(3))[0], torch.full_like(x_TD, 0.75))


@pytest.mark.parametrize("num_hidden", [1, 4])
def test_the_dense_layer_is_relu_layers_and_a_sigmoid(num_hidden):
    """The dense layer computes x W_1 ... with ReLU between, sigmoid at the end and no biases."""
    dense = FeedForward(width=WIDTH, hidden=HIDDEN, num_hidden=num_hidden).double()
    assert [tuple(p.shape) for p in dense.parameters()] == [
        (WIDTH, HIDDEN),
        *[(HIDDEN, HIDDEN)] * (num_hidden - 1),
        (HIDDEN, WIDTH),
    ]
    x_TD = torch.randn(6, WIDTH, dtype=torch.float64)
    row = x_TD[2].tolist()
    for number, weight in enumerate(dense.weights):
        row = [sum(row[a] * weight[a, b].item() for a in range(len(row))) for b in range(weight.shape[1])]
        row = [max(v, 0.0) for v in row] if number < num_hidden else [1 / (1 + math.exp(-v)) for v in row]
    assert dense(x_TD, sentences(6))[0][2].tolist() == pytest.approx(row, rel=1e-12)


def test_float32_agrees_with_float64():
    """In eval mode the float32 layer agrees with the float64 one to rounding."""
    layer = make(6, 2, train=False)
    x_TD = torch.randn(50, WIDTH, dtype=torch.float64)
    want_TD = layer(x_TD, sentences(50))[0]
    got_TD = layer.float()(x_TD.float(), sentences(50))[0]
    assert got_TD.dtype == torch.float32
    torch.testing.assert_close(got_TD.double(), want_TD, rtol=1e-5, atol=1e-6)


def test_operations_are_k_experts_and_the_gate():
    """512 wide with 4 of 256 experts of 1024: 4.19 M in the experts and 0.26 M in the gate."""
    with torch.device("meta"):
        layer = MoE(width=512, hidden=1024, num_experts=256, k=4, gate=GATE)
    assert layer.operations_per_timestep() == 4_194_304 + 262_144


@pytest.mark.parametrize("sizes", [{"width": 0}, {"hidden": 0}, {"num_experts": 0}, {"k": 9}])
def test_wrong_sizes_are_mistakes(sizes):
    """A size below one, or k above the number of experts, is refused in one line."""
    with pytest.raises(ValueError, match=r"must be|k=|experts") as caught:
        MoE(**{"width": 4, "hidden": 4, "num_experts": 4, "k": 2, "gate": GATE} | sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_shared_experts_are_added_with_weight_one_to_what_is_chosen(hierarchical):
    """y = routed + sum of S dense experts; without an output activation the parts add up; they cost 2 D S H."""
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "hidden": HIDDEN, "num_experts": 6, "k": 2, "gate": GATE, "output_activation": "none"}
    sizes |= {"num_groups": 2, "primary_gate": GATE, "primary_k": 1} if hierarchical else {}
    layer_class = HierarchicalMoE if hierarchical else MoE
    layer = layer_class(**sizes, num_shared_experts=3, gate_init_std=1.0).double().eval()
    plain = layer_class(**sizes, gate_init_std=1.0).double().eval()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if "shared" not in name})
    x_TD = torch.randn(20, WIDTH, dtype=torch.float64)
    w1_DH, w2_HD = layer.shared.weights
    assert w1_DH.shape == (WIDTH, 3 * HIDDEN)
    dense_TD = sum(
        (x_TD @ w1_DH[:, part]).clamp(min=0) @ w2_HD[part] for part in (slice(7 * s, 7 * s + 7) for s in range(3))
    )
    torch.testing.assert_close(layer(x_TD, sentences(20))[0], plain(x_TD, sentences(20))[0] + dense_TD)
    assert layer.operations_per_timestep() - plain.operations_per_timestep() == 2 * WIDTH * 3 * HIDDEN
    groups = parameter_groups(layer)
    assert {group for name, group in groups.items() if "shared" in name} == {"feed_forward"}


def test_shared_experts_see_every_token():
    """Their learning rate is not lowered by the share of the tokens that a routed expert receives."""
    layer = MoE(width=WIDTH, hidden=HIDDEN, num_experts=8, k=2, gate=GATE, num_shared_experts=1)
    shares = token_shares(layer)
    assert {share for name, share in shares.items() if "shared" in name} == {1.0}
    assert {share for name, share in shares.items() if "shared" not in name} == {0.25}


def test_the_last_matrix_begins_at_a_scale():
    """W2 of experts, and the last matrix of a dense layer, are the usual ones times the scale; nothing else changes."""
    for make_layer in (
        lambda scale: MoE(width=4, hidden=8, num_experts=3, k=1, gate=GATE, output_init_scale=scale),
        lambda scale: FeedForward(width=4, hidden=8, num_hidden=1, output_init_scale=scale),
    ):
        states = []
        for scale in (1.0, 0.25):
            torch.manual_seed(4)
            states.append(make_layer(scale).state_dict())
        for name, usual in states[0].items():
            factor = 0.25 if name.endswith(("w2_EHD", "weights.1")) else 1.0
            torch.testing.assert_close(states[1][name], usual * factor)


def test_wrong_choices_are_refused_by_name():
    sizes = {"width": 4, "hidden": 8, "num_experts": 3, "k": 1, "gate": GATE}
    for wrong, message in (
        ({"output_activation": "tanh"}, r"model\.output_activation=tanh: choose sigmoid or none"),
        ({"output_init_scale": -1.0}, r"model\.output_init_scale=-1\.0"),
        ({"num_shared_experts": -1}, r"model\.num_shared_experts=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            MoE(**sizes | wrong)


def test_identical_experts_begin_as_copies_of_the_first():
    """A process that holds experts 2 and 3 alone begins with the same matrices."""
    states = []
    for held in (None, range(2, 4)):
        torch.manual_seed(4)
        states.append(Experts(width=4, hidden=8, num_experts=6, held=held, identical=True))
    for name in ("w1_EDH", "w2_EHD"):
        whole, shard = (getattr(experts, name) for experts in states)
        assert torch.equal(whole, whole[:1].expand_as(whole))
        assert torch.equal(shard, whole[:2])
    layer = MoE(width=4, hidden=8, num_experts=6, k=2, gate=GATE, identical_experts=True)
    assert torch.equal(layer.experts.w1_EDH[0], layer.experts.w1_EDH[5])
    assert layer.experts.w1_EDH.std() > 0.3  # sqrt(2 / 4) over 32 numbers
