"""Other implementations of mixture-of-experts layers, from copies in a folder outside this project.

This file only calls them. The folder may hold these, obtained as follows:

    git clone https://github.com/davidmrau/mixture-of-experts FOLDER/davidmrau
    pip install --no-deps --target FOLDER/lucidrains mixture-of-experts==0.2.3
    git clone https://github.com/shawntan/scattermoe FOLDER/scattermoe      (needs a GPU)
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from moe_lm.errors import in_a_line, is_out_of_memory

NAMES = ("davidmrau", "lucidrains", "scattermoe", "scattermoe_float32")

_GROUP = 1024
"""Tokens per group in lucidrains' layer; its one-hot products grow with the square of this number."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer, the same for all implementations."""

    width: int
    hidden: int
    num_experts: int
    k: int
    tokens: int


Forward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""A layer's forward pass: tokens (T, D) to its output and the losses to add."""


def peers(folder: Path, sizes: Sizes, gate_DE: Tensor, wanted: Collection[str]) -> dict[str, tuple[nn.Module, Forward]]:
    """Return the wanted layers found in the folder, by name; a layer with a linear gate gets the matrix `gate_DE`."""
    makers = {"davidmrau": _davidmrau, "lucidrains": _lucidrains}
    if gate_DE.is_cuda:
        makers["scattermoe"] = partial(_scattermoe, dtype=torch.bfloat16)
        makers["scattermoe_float32"] = partial(_scattermoe, dtype=torch.float32)
    found = {}
    for name, make in makers.items():
        copy = folder / name.partition("_")[0]
        if name in wanted and copy.is_dir():
            sys.path.insert(0, str(copy))
            try:
                made = make(sizes, gate_DE)
                with torch.no_grad():
                    made[1](torch.zeros(sizes.tokens, sizes.width, device=gate_DE.device))
            except Exception as error:  # another project or version than expected
                if is_out_of_memory(error):
                    raise
                print(f"{name}: cannot be used from {copy}: {type(error).__name__}: {in_a_line(error)}", flush=True)
            else:
                found[name] = made
    return found


def _davidmrau(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    """Noisy top-k gating over a list of linear layers; its experts end in a softmax over the width."""
    module = import_module("moe").MoE(
        sizes.width, sizes.width, sizes.num_experts, sizes.hidden, noisy_gating=True, k=sizes.k
    )
    module.to(gate_DE.device).train()
    module.w_gate.data.copy_(gate_DE)

    def forward(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_TD, loss = module(x_TD)
        return y_TD, [loss]

    return module, forward


def _lucidrains(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    """GShard's top 2 with capacity; with experts k/2 times as wide, operations are equal until it drops tokens."""
    hidden = sizes.hidden * sizes.k // 2
    module = import_module("mixture_of_experts").MoE(dim=sizes.width, num_experts=sizes.num_experts, hidden_dim=hidden)
    module.to(gate_DE.device).train()

    def forward(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        group = min(_GROUP, sizes.tokens)
        y_GTD, loss = module(x_TD.view(-1, group, sizes.width))
        return y_GTD.reshape(x_TD.shape), [loss]

    return module, forward


def _scattermoe(sizes: Sizes, gate_DE: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Forward]:
    """Triton products in bfloat16 that gather and scatter; it has no gate, so it gets a softmax over k logits.

    Parameters and gradients are in `dtype`: bfloat16 as its authors use it, float32 as an optimizer needs them.
    """
    with gate_DE.device:  # drawing billions of numbers on a CPU would take half a minute
        experts = import_module("scattermoe.mlp").MLP(
            input_size=sizes.width,
            hidden_size=sizes.hidden,
            num_experts=sizes.num_experts,
            top_k=sizes.k,
            activation=nn.ReLU(),
        )
        module = nn.ModuleDict({"experts": experts, "gate": nn.Linear(sizes.width, sizes.num_experts, bias=False)})
    experts.to(dtype)
    module["gate"].weight.data.copy_(gate_DE.t())

    def forward(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TK, expert_TK = F.linear(x_TD.float(), module["gate"].weight).topk(sizes.k, dim=1)
            arguments = x_TD.bfloat16(), logit_TK.softmax(dim=1).bfloat16(), expert_TK
            if dtype == torch.bfloat16:
                return experts(*arguments), []
            cast = {name: weight.bfloat16() for name, weight in experts.named_parameters()}
            return functional_call(experts, cast, arguments), []

    return module, forward
