"""What is counted of one gated layer while a text is read.

Shape suffixes: T tokens, A assignments, E experts, G groups, N entries that occur.
"""

from dataclasses import dataclass

import numpy as np

from moe_lm.analysis.experts.counts import SparseCounts
from moe_lm.analysis.experts.strongest import Strongest
from moe_lm.errors import UserError
from moe_lm.gate import Gating


@dataclass(frozen=True)
class Tokens:
    """The input tokens of a micro-batch."""

    word_T: np.ndarray
    """Their ids."""
    offset_T: np.ndarray
    """Where in the split's tokens the word lies that each predicts: ascending by sentence, then by position."""
    prefix_T: np.ndarray
    """uint64: equal for tokens before which, themselves included, the same was read in their sentences."""


class Tally:
    """Running counts of one layer; nothing of it is as large as tokens times experts."""

    def __init__(self, *, num_experts: int, num_groups: int | None, vocabulary_size: int, contexts: int):
        self.num_experts, self.num_groups, self.vocabulary_size = num_experts, num_groups, vocabulary_size
        self.tokens = self.served = self.shared = self.most_experts = 0
        """Tokens: all, those that an expert serves, those that several serve; and the most experts of one."""
        self.entropy = 0.0
        """Sum over the tokens that are served, in bits."""
        self.load_E = np.zeros(num_experts, np.int64)
        self.importance_E = np.zeros(num_experts)
        self.entropy_E = np.zeros(num_experts)
        """Sum over the tokens that each serves."""
        self.tokens_G = np.zeros(num_groups or 0, np.int64)
        """Tokens that an expert of the group serves."""
        self.words, self.pairs = SparseCounts(), SparseCounts()
        """By expert * vocabulary_size + word; by expert * num_experts + a later expert."""
        self.strongest = Strongest(num_experts, contexts)

    def add(self, gating: Gating, tokens: Tokens) -> None:
        """Count a micro-batch; raises `UserError` where gate values are no numbers."""
        token_A, expert_A = gating.token_A.cpu().numpy(), gating.expert_A.cpu().numpy()
        gate_A = gating.gate_A.detach().double().cpu().numpy()
        if not np.isfinite(gate_A).all():
            raise UserError("a gate gives values that are no numbers: the training diverged; choose another checkpoint")
        experts_T = np.bincount(token_A, minlength=gating.num_tokens)
        entropy_T = entropies(token_A, gate_A, gating.num_tokens)
        self.tokens += gating.num_tokens
        self.served += int((experts_T > 0).sum())
        self.shared += int((experts_T > 1).sum())
        self.most_experts = max(self.most_experts, int(experts_T.max(initial=0)))
        self.entropy += float(entropy_T.sum())
        self.load_E += np.bincount(expert_A, minlength=self.num_experts)
        self.importance_E += np.bincount(expert_A, gate_A, minlength=self.num_experts)
        self.entropy_E += np.bincount(expert_A, entropy_T[token_A], minlength=self.num_experts)
        self.words.add(expert_A * self.vocabulary_size + tokens.word_T[token_A])
        self.strongest.add(expert_A, gate_A, tokens.offset_T[token_A], tokens.prefix_T[token_A])
        order = np.argsort(token_A, kind="stable")  # by token, and of a token by expert, as the gating is sorted
        self._add_pairs(token_A[order], expert_A[order])
        if self.num_groups:
            self._add_groups(token_A, expert_A)

    def _add_pairs(self, token_A: np.ndarray, expert_A: np.ndarray) -> None:
        """Count both of every two experts of a token: neighbours first, then those two places apart, and so on."""
        first, distance = np.arange(len(token_A)), 0
        while True:
            distance += 1
            first = first[first + distance < len(token_A)]
            first = first[token_A[first] == token_A[first + distance]]
            if not len(first):
                return
            self.pairs.add(expert_A[first] * self.num_experts + expert_A[first + distance])

    def _add_groups(self, token_A: np.ndarray, expert_A: np.ndarray) -> None:
        group_A = expert_A // (self.num_experts // self.num_groups)
        distinct = np.unique(token_A * self.num_groups + group_A)
        self.tokens_G += np.bincount(distinct % self.num_groups, minlength=self.num_groups)


def entropies(token_A: np.ndarray, gate_A: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return the entropy in bits of each token's gate values, normalised to sum 1; 0 for a token without any."""
    # -sum p log p with p = g / s is log s - (sum g log g) / s; a value of 0 adds nothing.
    positive_A = np.where(gate_A > 0, gate_A, 1.0)
    sum_T = np.bincount(token_A, gate_A, minlength=num_tokens)
    product_T = np.bincount(token_A, gate_A * np.log2(positive_A), minlength=num_tokens)
    safe_T = np.where(sum_T > 0, sum_T, 1.0)
    return np.where(sum_T > 0, np.maximum(np.log2(safe_T) - product_T / safe_T, 0.0), 0.0)
