"""Noisy choices with a gradient, for the kernels that make them on a GPU.

Shape suffixes: T tokens, E experts, F = 2 E.
"""

import torch
from torch import Tensor

from moe_lm.ops.noisy_top_k import _ChoiceInAKernel

SIZES = [(5, 8, 2), (33, 5, 4), (7, 256, 4), (4, 4, 4), (3, 300, 7), (0, 8, 2), (9, 1, 1), (6, 2, 1), (2, 2000, 2)]
"""Tokens, experts (not a power of two, none left out, one alone), k."""

KINDS = ["gates", "load", "noisy", "load of tokens", "sum of load", "all"]
"""Which results have a gradient: the largest logits, chances by one for all tokens, one for each or one in all, ..."""


def chosen(function, num_tokens: int, num_experts: int, k: int, kind: str, on: str = "cpu") -> list[Tensor]:
    """Return results and the logits' gradient: by the kernels in float32, by torch's operators in float64."""
    generator = torch.Generator().manual_seed(num_experts)
    dtype = torch.float32 if function is _ChoiceInAKernel else torch.float64

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(on, dtype)

    logit_TF, draw_TE = drawn(num_tokens, 2 * num_experts).requires_grad_(), drawn(num_tokens, num_experts)
    top_TN, expert_TN, noisy_TE, *rest = function.apply(logit_TF, draw_TE, 0.01, k)
    chances = [chance for chance in rest if chance is not None]
    losses = {"gates": (top_TN[:, :k].softmax(dim=1) * drawn(num_tokens, k)).sum()}
    losses["noisy"] = (noisy_TE * drawn(num_tokens, num_experts)).sum()
    for chance_TE in chances:
        losses["load"] = (chance_TE.sum(dim=0) * drawn(num_experts)).sum()
        losses["sum of load"] = chance_TE.sum()
        losses["load of tokens"] = (chance_TE * drawn(num_tokens, num_experts)).sum()
    wanted = losses.values() if kind == "all" else [losses.get(kind, losses["gates"])]
    sum(wanted).backward()
    return [top_TN.detach(), expert_TN, noisy_TE.detach(), *(x.detach() for x in chances), logit_TF.grad]
