"""Hash routing: each word has fixed experts of its own, drawn at random (Roller et al. 2021, arXiv 2106.04426).

Shape suffixes: T tokens, E experts of a group, K experts a token.
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups

_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # SplitMix64's multipliers as signed integers
_STEP = -0x61C8864680B583EB


class Hash(Gate):
    """G(x)_i = 1 / k for the k distinct experts that a fixed random function assigns to the input word, else 0.

    Nothing is learned: it is the baseline that a learned gate has to beat. In a hierarchical layer a word has k experts
    in each of its groups. The choice is the same in training and evaluation.
    """

    has_matrix = False
    differentiable_stats = frozenset()

    def __init__(self, *, seed: int, **sizes: float | None):
        super().__init__(**sizes)
        self.seed = seed

    def choose(self, logit_TE: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to the experts of its input word."""
        if groups.input_T is None:
            raise ValueError("the gate hash needs the input words")
        key_T = groups.input_T if groups.group_T is None else groups.input_T + (groups.group_T + 1) * (1 << 40)
        expert_TK = distinct_experts(key_T, self.num_experts, self.k, self.seed)
        gate_TK = torch.full_like(expert_TK, 1 / self.k, dtype=logit_TE.dtype)
        return self.token_choice(expert_TK, gate_TK, logit_TE, groups)


def distinct_experts(key_T: Tensor, num_experts: int, k: int, seed: int) -> Tensor:
    """Return k distinct experts for each key (int64, T, K); every ordered choice is equally likely for a random key."""
    chosen: list[Tensor] = []
    for place in range(k):
        # The number among the experts that are left; counting past those taken, in ascending order, gives the expert.
        expert_T = _mixed(key_T, seed * 1024 + place) % (num_experts - place)
        for taken_T in torch.stack(chosen, dim=1).sort(dim=1).values.unbind(dim=1) if chosen else ():
            expert_T = expert_T + (expert_T >= taken_T).to(expert_T.dtype)
        chosen.append(expert_T)
    return torch.stack(chosen, dim=1)


def _mixed(key_T: Tensor, stream: int) -> Tensor:
    """Return hashed keys, at least 0, by the finaliser of SplitMix64 (Steele et al. 2014); products wrap around."""
    offset = (stream * 0x632BE59BD9B4E019 + (1 << 63)) % (1 << 64) - (1 << 63)  # as signed 64 bits
    x_T = (key_T + 1) * _STEP + offset
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x_T = (x_T ^ _shifted(x_T, shift)) * factor
    return (x_T ^ _shifted(x_T, 31)) & 0x7FFFFFFFFFFFFFFF


def _shifted(x_T: Tensor, bits: int) -> Tensor:
    """Return an unsigned shift to the right of signed numbers."""
    return (x_T >> bits) & ((1 << (64 - bits)) - 1)
