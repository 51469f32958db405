"""Noisy top-k gating (section 2.1, eq. 3-5) with the smooth load estimator (Appendix A, eq. 8-10).

Shape suffixes: T tokens, E experts of a group, F = E or, in training, 2 E, K experts a token, N = min(K + 1, E).
"""

import torch
from torch import Tensor

from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.ops.routing import noisy_top_k

_SCHEDULES = ("constant", "linear")


class NoisyTopK(Gate):
    """G(x) = Softmax(KeepTopK(x W_g + eps * s * (Softplus(x W_noise) + noise_epsilon), k)), noise in training only.

    The scale s is `noise_scale`, 1 in the paper; with the schedule `linear` it falls to zero over the training. Without
    noise (`noise_scale=0`) there is no W_noise, and the load counts assignments, so that it has no gradient.
    """

    has_noise = True
    differentiable_stats = Gate.differentiable_stats | {"load_E", "probability_E"}

    def __init__(self, *, noise_epsilon: float, noise_schedule: str = "constant", **sizes: float | None):
        if not noise_epsilon > 0:
            raise ValueError(f"gate.noise_epsilon={noise_epsilon}: must be positive")
        if noise_schedule not in _SCHEDULES:
            raise ValueError(
                f"model.layers.NAME.gate.noise_schedule={noise_schedule}: choose {' or '.join(_SCHEDULES)}"
            )
        super().__init__(**sizes)
        self.noise_epsilon, self.noise_schedule = noise_epsilon, noise_schedule
        if not self.has_noise:
            self.differentiable_stats = self.differentiable_stats - {"load_E"}

    @property
    def depends_on_length(self) -> bool:
        """Whether training depends on the number of all updates: with noise that falls to zero over them."""
        return self.has_noise and self.noise_schedule == "linear"

    def init_matrix_(self, weight: Tensor) -> None:
        """Set a gate matrix to zero, so that every expert is equally likely at first (Appendix A)."""
        weight.zero_()

    def choose(self, logit_TF: Tensor, groups: TokenGroups) -> Gating:
        """Send each token to the experts of its k largest logits, in training with noise added."""
        if not (self.training and self.has_noise):
            top_TK, expert_TK = logit_TF.topk(self.k, dim=1)
            return self.token_choice(expert_TK, top_TK.softmax(dim=1), logit_TF, groups)
        scale = self.noise_scale * (1 - self.progress if self.noise_schedule == "linear" else 1)
        if scale != 1:  # divided by s, the noisy logits have the same order and the same chances
            logit_TF = torch.cat([logit_TF[:, : self.num_experts] / scale, logit_TF[:, self.num_experts :]], dim=1)
        draw_TE = torch.randn_like(logit_TF[:, : self.num_experts])
        top_TN, expert_TN, noisy_TE, chance_TE = noisy_top_k(logit_TF, draw_TE, self.noise_epsilon, self.k)
        if scale != 1:
            top_TN, noisy_TE = top_TN * scale, noisy_TE * scale
        return self.token_choice(
            expert_TN[:, : self.k],
            top_TN[:, : self.k].softmax(dim=1),
            noisy_TE,
            groups,
            load_E=None if chance_TE is None else groups.sum(chance_TE).reshape(-1),
        )
