"""A hierarchical mixture with random gates, and Appendix B written out as loops: eq. 3-5, 8-9 and 12-14.

Shape suffixes: T tokens, D width, G groups, E experts (of a group or of all), R rows sent to groups.
"""

import math
from functools import partial

import torch

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.model.hierarchical_moe import HierarchicalMoE

WIDTH, HIDDEN, EPSILON = 4, 6, 0.01
GATE = partial(NoisyTopK, noise_epsilon=EPSILON)


def sentences(num_tokens):
    return PaddedLayout(num_tokens, 1, None)


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


def replayed(layer, x_TD, seed=3):
    """The layer's answer and the noise that its two levels drew, one after the other."""
    torch.manual_seed(seed)
    y_TD, gating = layer(x_TD, sentences(len(x_TD)))
    torch.manual_seed(seed)
    noise_TG = torch.randn(len(x_TD), layer.num_groups, dtype=x_TD.dtype)
    return y_TD, gating, noise_TG, torch.randn(len(x_TD) * layer.k, layer.gate.num_experts, dtype=x_TD.dtype)


def choice_by_hand(x_D, gate_DE, noise_DE, noise_E, k, train):
    """One token's gates by expert (eq. 3-5), and the chances of eq. 8-9: of the experts or, without noise, 0 and 1."""
    every = range(gate_DE.shape[1])
    clean = [sum(x_D[d] * gate_DE[d, i] for d in range(len(x_D))) for i in every]
    deviation = [(1 + sum(x_D[d] * noise_DE[d, i] for d in range(len(x_D))).exp()).log() + EPSILON for i in every]
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
