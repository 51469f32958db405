"""Mixture-of-experts layers of others, from copies in a folder that is no part of this project.

Nothing of them is here but how they are called. What the folder may hold, and how it comes there:

    git clone https://github.com/davidmrau/mixture-of-experts FOLDER/davidmrau
    pip install --no-deps --target FOLDER/lucidrains mixture-of-experts==0.2.3
    git clone https://github.com/shawntan/scattermoe FOLDER/scattermoe      (a GPU alone)
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from moe_lm.errors import in_a_line, is_out_of_memory

NAMES = ("davidmrau", "lucidrains", "scattermoe", "scattermoe_float32")

_GROUP = 1024
"""Tokens of a group of lucidrains' layer, whose one-hot products grow with the square of it."""


@dataclass(frozen=True)
class Sizes:
    """Of a layer, ours or another's."""

    width: int
    hidden: int
    num_experts: int
    k: int
    tokens: int


Passed = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""A layer's forward pass: tokens (T, D) to its output and the losses to add."""


def peers(folder: Path, sizes: Sizes, gate_DE: Tensor, wanted: Collection[str]) -> dict[str, tuple[nn.Module, Passed]]:
    """Return the wanted layers found in the folder, by name; where they have a gate like ours it gets this matrix."""
    makers = {"davidmrau": _davidmrau, "lucidrains": _lucidrains}
    if gate_DE.is_cuda:
        makers |= {"scattermoe": _scattermoe, "scattermoe_float32": _scattermoe_float32}
    found = {}
    for name, make in makers.items():
        copy = folder / name.partition("_")[0]
        if name in wanted and copy.is_dir():
            sys.path.insert(0, str(copy))
            try:
                made = make(sizes, gate_DE)
                with torch.no_grad():
                    made[1](torch.zeros(sizes.tokens, sizes.width, device=gate_DE.device))
            except Exception as error:  # no copy of what was asked for, or of a version that is used otherwise
                if is_out_of_memory(error):
                    raise
                print(f"{name}: cannot be used from {copy}: {type(error).__name__}: {in_a_line(error)}", flush=True)
            else:
                found[name] = made
    return found


def _davidmrau(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    """Noisy top-k gating over a list of linear layers; its experts end in a softmax over the width."""
    module = import_module("moe").MoE(
        sizes.width, sizes.width, sizes.num_experts, sizes.hidden, noisy_gating=True, k=sizes.k
    )
    module.to(gate_DE.device).train()
    module.w_gate.data.copy_(gate_DE)

    def passed(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_TD, loss = module(x_TD)
        return y_TD, [loss]

    return module, passed


def _lucidrains(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    """GShard's top 2 with capacity: experts k/2 times as wide make the operations equal, before it drops tokens."""
    hidden = sizes.hidden * sizes.k // 2
    module = import_module("mixture_of_experts").MoE(dim=sizes.width, num_experts=sizes.num_experts, hidden_dim=hidden)
    module.to(gate_DE.device).train()

    def passed(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        group = min(_GROUP, sizes.tokens)
        y_GTD, loss = module(x_TD.view(-1, group, sizes.width))
        return y_GTD.reshape(x_TD.shape), [loss]

    return module, passed


def _scattermoe(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    """Triton products that gather and scatter; it has no gate, so it gets a softmax over the k largest logits."""
    module = _scattermoe_module(sizes, gate_DE)
    module["experts"].to(torch.bfloat16)
    return module, lambda x_TD: (_scattered(module, module["experts"], x_TD, sizes.k), [])


def _scattermoe_float32(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    """The same with parameters and gradients in float32, as an optimizer wants them; products are in bfloat16 again."""
    module = _scattermoe_module(sizes, gate_DE)

    def passed(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        cast = {name: weight.to(torch.bfloat16) for name, weight in module["experts"].named_parameters()}
        return _scattered(module, lambda *of: functional_call(module["experts"], cast, of), x_TD, sizes.k), []

    return module, passed


def _scattermoe_module(sizes: Sizes, gate_DE: Tensor) -> nn.ModuleDict:
    with gate_DE.device:  # billions of numbers drawn on a CPU would take half a minute
        experts = import_module("scattermoe.mlp").MLP(
            input_size=sizes.width,
            hidden_size=sizes.hidden,
            num_experts=sizes.num_experts,
            top_k=sizes.k,
            activation=nn.ReLU(),
        )
        module = nn.ModuleDict({"experts": experts, "gate": nn.Linear(sizes.width, sizes.num_experts, bias=False)})
    module["gate"].weight.data.copy_(gate_DE.t())
    return module


def _scattered(module: nn.ModuleDict, experts: Callable[..., Tensor], x_TD: Tensor, k: int) -> Tensor:
    with torch.autocast(x_TD.device.type, enabled=False):
        logit_TK, expert_TK = F.linear(x_TD.float(), module["gate"].weight).topk(k, dim=1)
        gates = logit_TK.softmax(dim=1).to(torch.bfloat16), expert_TK
        return experts(x_TD.to(torch.bfloat16), *gates)
