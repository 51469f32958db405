"""Noisy top-k choices and their gradients, for every version of the operation.

Shape suffixes: T tokens, E experts, F = 2 E.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = [(5, 8, 2), (33, 5, 4), (7, 256, 4), (4, 4, 4), (3, 300, 7), (0, 8, 2), (9, 1, 1), (6, 2, 1), (2, 2000, 2)]
"""Tokens, experts (not a power of two, none left out, a single one), k."""

KINDS = ["gates", "load", "noisy", "load of tokens", "sum of load", "all"]
"""Results that have a gradient; that of the load differs by expert, by token and expert, or not at all."""


def chosen(
    version: Callable, num_tokens: int, num_experts: int, k: int, kind: str, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Return a version's results and the gradient of its logits."""
    generator = torch.Generator().manual_seed(num_experts)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    logit_TF, draw_TE = drawn(num_tokens, 2 * num_experts).requires_grad_(), drawn(num_tokens, num_experts)
    top_TN, expert_TN, noisy_TE, chance_TE = version(logit_TF, draw_TE, 0.01, k)
    losses = {"gates": (top_TN[:, :k].softmax(dim=1) * drawn(num_tokens, k)).sum()}
    losses["noisy"] = (noisy_TE * drawn(num_tokens, num_experts)).sum()
    assert (chance_TE is None) == (k == num_experts)
    if chance_TE is not None:
        losses["load"] = (chance_TE.sum(dim=0) * drawn(num_experts)).sum()
        losses["sum of load"] = chance_TE.sum()
        losses["load of tokens"] = (chance_TE * drawn(num_tokens, num_experts)).sum()
    sum(losses.values() if kind == "all" else [losses.get(kind, losses["gates"])]).backward()
    results = [top_TN, expert_TN, noisy_TE, *([] if chance_TE is None else [chance_TE])]
    return [*(x.detach() for x in results), logit_TF.grad]
