"""Hash routing against Python's integers, counts over many words, and its independence of everything but the word."""

import math
from collections import Counter

import pytest
import torch

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate.hash import Hash, distinct_experts
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.moe import MoE

WORD = 2**64


def splitmix(key: int, stream: int) -> int:
    """The finaliser of SplitMix64 in Python's unbounded integers."""
    x = ((key + 1) * 0x9E3779B97F4A7C15 + stream * 0x632BE59BD9B4E019) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return (x ^ (x >> 31)) % 2**63


def test_experts_are_those_of_unbounded_integers():
    """The j-th expert is the hash modulo the experts that are left, counted among these."""
    for key in (0, 1, 19_999, 793_470, 2**40 + 5):
        for num_experts, k, seed in ((5, 3, 0), (256, 4, 7), (4, 4, 1)):
            left, want = list(range(num_experts)), []
            for place in range(k):
                want.append(left.pop(splitmix(key, seed * 1024 + place) % len(left)))
            assert distinct_experts(torch.tensor([key]), num_experts, k, seed).tolist() == [want]


def test_every_ordered_choice_is_equally_likely():
    """40,000 words are uniform over the 5 * 4 = 20 ordered pairs: a chi-square test with 19 degrees of freedom."""
    pairs = Counter(map(tuple, distinct_experts(torch.arange(40_000), 5, 2, seed=3).tolist()))
    assert len(pairs) == 20
    assert sum((count - 2000) ** 2 / 2000 for count in pairs.values()) < 43.8  # exceeded once in a thousand


def test_a_word_has_the_same_experts_anywhere():
    """Whatever the token's vector, the mode and the batch; another seed has other experts; weights are 1 / k."""
    gate = Hash(width=3, num_experts=50, k=4, seed=0)
    word_T = torch.tensor([7, 9, 7, 3])
    one, two = gate.train()(torch.randn(4, 3), input_T=word_T), gate.eval()(torch.randn(1, 3), input_T=word_T[2:3])
    experts = [set(one.expert_A[one.token_A == token].tolist()) for token in range(4)]
    assert experts[0] == experts[2] == set(two.expert_A.tolist())
    assert [len(chosen) for chosen in experts] == [4] * 4
    assert experts[0] != experts[1]
    assert one.gate_A.tolist() == [0.25] * 16
    other = Hash(width=3, num_experts=50, k=4, seed=1)(torch.randn(4, 3), input_T=word_T)
    assert set(other.expert_A[other.token_A == 0].tolist()) != experts[0]
    assert list(gate.parameters()) == []
    assert gate.operations_per_timestep() == 0


def test_both_levels_of_a_hierarchical_layer_are_independent():
    """4 groups of 4 experts: 2,000 words with one expert each use all 16 evenly, not those of the diagonal alone."""

    def gate(**sizes):
        return Hash(seed=0, **sizes)

    layer = HierarchicalMoE(width=2, hidden=2, num_experts=16, num_groups=4, k=1, primary_gate=gate, gate=gate)
    layout = PaddedLayout(1, 2000, None, torch.arange(2000))
    _, gating = layer(torch.randn(2000, 2), layout)
    counts = torch.bincount(gating.expert_A, minlength=16)
    assert (counts - 125).abs().max() < 5 * math.sqrt(125)


def test_a_gate_without_words_says_so():
    """A layer that is used outside the language model has no input words."""
    layer = MoE(width=2, hidden=2, num_experts=4, k=1, gate=lambda **sizes: Hash(seed=0, **sizes))
    with pytest.raises(ValueError, match="input words"):
        layer(torch.randn(3, 2), PaddedLayout(1, 3, None))
