"""Experts alone, trained by a factored second moment through products of 16 bits.

Shape suffixes: T tokens, A assignments, D width, E experts.
"""

import torch
from mixture_by_hand import make

from moe_lm.model.experts import grouped_products
from moe_lm.ops.experts_grouped import experts_grouped
from moe_lm.optim.factored_adam import FactoredAdam

COUNTS = [3, 0, 40, 7]
SETTINGS = {"lr": 0.05, "beta2": 0.9, "epsilon": 1e-3}


class Training:
    """Steps of experts alone, each on rows of its own, the loss a weighted sum of the answers."""

    def __init__(self, by="mixture", dtype=torch.float16, on="cpu"):
        experts, self.x_TD, gating = make(COUNTS, torch.float32, width=16, hidden=24)
        experts = experts.to(on)
        self.weights = experts.w1_EDH, experts.w2_EHD
        self.token_A, self.gate_A = (x.detach().to(on) for x in (gating.token_A, gating.gate_A))
        self.ends_E = torch.tensor(COUNTS).cumsum(0).to(on)
        self.optimizer = FactoredAdam(self.weights, **SETTINGS)
        self.generator, self.by, self.dtype = torch.Generator().manual_seed(1), by, dtype

    def backward(self, *, recompute=False):
        """Add a micro-batch's gradients."""
        x_TD = torch.randn(self.x_TD.shape, generator=self.generator).to(self.ends_E.device)
        how = *self.weights, self.dtype
        if self.by == "mixture":
            y_TD = experts_grouped(x_TD, self.token_A, self.gate_A, self.ends_E, *how, recompute=recompute)
        else:  # as where experts are on several processes
            y_TD = grouped_products(x_TD.index_select(0, self.token_A), self.ends_E, *how, recompute=recompute)
        y_TD.backward(torch.randn(y_TD.shape, generator=self.generator).to(y_TD))

    def step(self, **options):
        """Make a whole update."""
        self.backward(**options)
        self.optimizer.norms(self.weights)
        self.optimizer.step()
        self.optimizer.zero_grad()
