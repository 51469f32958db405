"""The mixture-of-experts layer against the dense layer of equal operations, and against other implementations.

    python scripts/benchmark_layer.py --experts 4 32 256 --threads 1 --peers FOLDER

One run times the layers in turn: forward and backward pass with all weight gradients and balance losses. Each round
gives a ratio to the dense layer. Prints the medians of these ratios; --json writes them to a file.

    dense         one feed-forward layer with k times the hidden units of an expert
    moe           noisy top-k gating with random gate matrices
    balanced      every expert gets equally many tokens
    products      the experts alone, balanced
    grouped       a sort and torch's grouped_mm, without any loss
    moe_plain     moe with the reference of every operation: on a CPU, a plain autograd loop over the experts
    moe_bfloat16  moe with the experts' parameters and gradients in bfloat16, as in scattermoe (on a CPU only if named)
    moe_kernels   moe with Triton kernels for all products of the experts, however many (a GPU; only if named)

--peers takes a folder of other implementations (scripts/peers.py says which, and where to get them): davidmrau,
lucidrains, scattermoe (parameters in bfloat16) and scattermoe_float32 (in float32, as in moe). --memory measures each
layer's peak memory in a process of its own.
"""

import argparse
import contextlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from benchmarking import (
    Work,
    apply_settings,
    interleaved,
    parse,
    parser,
    peak_bytes,
    positive,
    product_ceiling,
    ratios,
    run,
    write_record,
)
from peers import NAMES, Forward, Sizes, peers
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.cli.machine import device
from moe_lm.data.batch import PaddedLayout
from moe_lm.errors import UserError
from moe_lm.gate import Gate, Gating, TokenGroups
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.objective import BalanceLoss, Importance, Load
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.moe import Experts, MoE
from moe_lm.ops import grouped_gemm
from moe_lm.ops.operation import reference_only
from moe_lm.ops.token_dispatch import combine, dispatch
from moe_lm.resources import free_memory

_DENSE, _PLAIN, _KERNELS, _BFLOAT16 = "dense", "moe_plain", "moe_kernels", "moe_bfloat16"
_BYTES = 4 * 2
"""Bytes of a float32 parameter and its gradient."""


def main() -> None:
    """Time the layers for each number of experts."""
    options = _options()
    on = device(options.device)
    if on.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # for float32 products of all layers, as in training
    ceiling, found = product_ceiling(on, options.square), {}
    print(f"products of square matrices of {options.square}: {ceiling / 1e9:,.0f} GFLOP/s")
    for num_experts in options.experts:
        sizes = _sizes(options, num_experts)
        if not _fits(sizes, on, 1 + options.room):
            print(f"{num_experts} experts: not measured, their parameters and gradients need more memory than there is")
            continue
        found[num_experts] = rows = _measured(options, sizes, on)
        for name, row in rows.items():
            if options.memory:
                row["peak_mib"] = _peak(options, num_experts, name)
            _print(num_experts, name, row)
        # Written after each number of experts, because the next number may need more memory than there is.
        write_record(options, on, {"layers": found, "product_flops_per_second": ceiling})
    if options.layers != [_DENSE] and all(rows.keys() <= {_DENSE} for rows in found.values()):
        raise UserError("nothing but the dense layer was measured: the lines above say why")


def _options() -> argparse.Namespace:
    made = parser(__doc__, "threads", "square", rounds=9)
    made.add_argument("--experts", type=positive, nargs="+", default=[4, 32, 256])
    made.add_argument("--width", type=positive, default=512)
    made.add_argument("--hidden", type=positive, default=1024, help="hidden units of one expert")
    made.add_argument("--k", type=positive, default=4)
    made.add_argument("--tokens", type=positive, default=8192)
    made.add_argument("--device", default="auto")
    names = [*_LAYERS, *NAMES]
    made.add_argument("--layers", nargs="*", choices=names, metavar="LAYER", help="besides the dense one; default: all")
    made.add_argument("--peers", type=Path, help="a folder of other implementations")
    made.add_argument("--memory", action="store_true", help="also measure peak memory")
    made.add_argument(
        "--room",
        type=int,
        choices=range(100),
        default=3,
        metavar="N",
        help="number of layers that must fit into memory beside the one measured",
    )
    options = parse(made)
    if options.peers is not None and not options.peers.is_dir():
        raise UserError(f"--peers {options.peers}: no such folder")
    return options


def _sizes(options: argparse.Namespace, num_experts: int) -> Sizes:
    return Sizes(options.width, options.hidden, num_experts, min(options.k, num_experts), options.tokens)


def _fits(sizes: Sizes, on: torch.device, layers: int) -> bool:
    free = torch.cuda.mem_get_info(on)[0] if on.type == "cuda" else free_memory()
    return free is None or layers * _BYTES * sizes.num_experts * 2 * sizes.width * sizes.hidden <= free


def _measured(options: argparse.Namespace, sizes: Sizes, on: torch.device) -> dict[str, dict[str, float]]:
    layers = _layers(options, sizes, on)
    seconds = interleaved({name: _work(name, *layers[name], sizes, on) for name in layers}, options.rounds, on)
    rows, flops = ratios(seconds, _DENSE), 3 * 2 * 2 * sizes.tokens * sizes.width * sizes.k * sizes.hidden
    for name, row in rows.items():
        row["flops_per_second"] = flops / row["seconds"]
        if name in NAMES and "moe" in rows:
            row["moe_to_it"] = ratios(seconds, name)["moe"]["ratio"]
    return rows


def _layers(options: argparse.Namespace, sizes: Sizes, on: torch.device) -> dict[str, tuple[nn.Module, Forward]]:
    """Return the wanted layers, the dense one first; print the names of those that are not available."""
    torch.manual_seed(0)
    gate_DE = torch.randn(sizes.width, sizes.num_experts, device=on) * sizes.width**-0.5
    not_by_default = {_KERNELS, _BFLOAT16} if on.type == "cpu" else {_KERNELS}
    default = [*(name for name in _LAYERS if name not in not_by_default), *(() if options.peers is None else NAMES)]
    wanted = {_DENSE, *(options.layers or default)} - ({_KERNELS} if on.type == "cpu" else set())
    found = {name: make(sizes, gate_DE) for name, make in _LAYERS.items() if name in wanted}
    if options.peers is not None:
        found |= peers(options.peers, sizes, gate_DE, wanted)
    for name in sorted({*wanted, *(options.layers or [])} - found.keys()):
        print(f"{name}: left out: not in the folder of --peers, or not available on this device", flush=True)
    return found


def _work(name: str, module: nn.Module, forward: Forward, sizes: Sizes, on: torch.device) -> Work:
    """Return a function that runs a forward and a backward pass, with gradients reset as after an update."""
    x_TD = torch.randn(sizes.tokens, sizes.width, device=on, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)
    switches = {_PLAIN: reference_only, _KERNELS: partial(patch.object, grouped_gemm, "max_torch_experts", 0)}

    def work() -> None:
        module.zero_grad()
        x_TD.grad = None
        with switches.get(name, contextlib.nullcontext)():
            with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
                y_TD, losses = forward(x_TD)
            torch.autograd.backward([y_TD, *losses], [grad_TD.to(y_TD.dtype), *(None for _ in losses)])

    return work


def _dense(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    layer = FeedForward(width=sizes.width, hidden=sizes.k * sizes.hidden, num_hidden=1).to(gate_DE.device)
    return layer, lambda x_TD: (layer(x_TD, PaddedLayout(len(x_TD), 1, None))[0], [])


def _moe(sizes: Sizes, gate_DE: Tensor, gate: Callable[..., Gate], *balance: BalanceLoss) -> tuple[nn.Module, Forward]:
    losses = balance if sizes.num_experts > sizes.k else ()
    layer = MoE(width=sizes.width, hidden=sizes.hidden, num_experts=sizes.num_experts, k=sizes.k, gate=gate)
    layer.to(gate_DE.device)
    layer.gate.gate_DE.data.copy_(gate_DE)
    layer.gate.required_stats = frozenset(loss.stat for loss in losses)

    def forward(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_TD, gating = layer(x_TD, PaddedLayout(len(x_TD), 1, None))
        return y_TD, [loss.weight * loss(gating) for loss in losses]

    return layer, forward


def _noisy_top_k(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    return _moe(sizes, gate_DE, partial(NoisyTopK, noise_epsilon=0.01), Importance(weight=0.1), Load(weight=0.1))


def _bfloat16(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    layer, forward = _noisy_top_k(sizes, gate_DE)
    layer.experts.bfloat16()
    return layer, forward


class _Balanced(Gate):
    """Token t goes to experts t k, t k + 1, ... (modulo their number), weighted by a softmax over their logits."""

    def choose(self, logit_TF: Tensor, groups: TokenGroups) -> Gating:
        expert_TK = _balanced_choice(len(logit_TF), self.k, self.num_experts, logit_TF.device)
        return self.token_choice(expert_TK, logit_TF.gather(1, expert_TK).softmax(dim=1), logit_TF, groups)


def _balanced_choice(num_tokens: int, k: int, num_experts: int, on: torch.device) -> Tensor:
    """Return each token's experts (T, K), all different; every expert gets equally many tokens."""
    return torch.arange(num_tokens * k, device=on).view(num_tokens, k) % num_experts


def _products(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    experts = _experts(sizes, gate_DE)
    expert_TK = _balanced_choice(sizes.tokens, sizes.k, sizes.num_experts, gate_DE.device)
    gate_TK = torch.full(expert_TK.shape, 1 / sizes.k, device=gate_DE.device)
    gating = Gating.from_choices(expert_TK, gate_TK, sizes.num_experts)
    return experts, lambda x_TD: (experts(x_TD, gating), [])


def _grouped(sizes: Sizes, gate_DE: Tensor) -> tuple[nn.Module, Forward]:
    """A layer in a few lines around torch's grouped_mm: top k, sort, two products, weighted sum."""
    experts, gate = _experts(sizes, gate_DE), nn.Parameter(gate_DE.clone())
    module = nn.ModuleList([experts, nn.ParameterList([gate])])
    dtype = torch.bfloat16 if gate_DE.is_cuda else torch.float32

    def forward(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        logit_TK, expert_TK = (x_TD.float() @ gate).topk(sizes.k, dim=1)
        gating = Gating.from_choices(expert_TK, logit_TK.softmax(dim=1), sizes.num_experts)
        ends_E = gating.load_E.cumsum(dim=0).int()
        h_AH = F.grouped_mm(dispatch(x_TD, gating.token_A).to(dtype), experts.w1_EDH.to(dtype), offs=ends_E).relu()
        y_AD = F.grouped_mm(h_AH, experts.w2_EHD.to(dtype), offs=ends_E)
        return combine(y_AD, gating.token_A, gating.gate_A, gating.num_tokens).sigmoid(), []

    return module, forward


def _experts(sizes: Sizes, gate_DE: Tensor) -> Experts:
    return Experts(width=sizes.width, hidden=sizes.hidden, num_experts=sizes.num_experts).to(gate_DE.device)


_LAYERS = {
    _DENSE: _dense,
    "moe": _noisy_top_k,
    "balanced": lambda sizes, gate_DE: _moe(sizes, gate_DE, _Balanced),
    "products": _products,
    "grouped": _grouped,
    _PLAIN: _noisy_top_k,
    _KERNELS: _noisy_top_k,
    _BFLOAT16: _bfloat16,
}


def _peak(options: argparse.Namespace, num_experts: int, name: str) -> float:
    """Return the peak memory (MiB) of running one layer twice in a new process."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_own_peak, options, num_experts, name).result()
    except BrokenProcessPool:
        raise UserError(f"--memory: the process with {name} and {num_experts} experts was killed") from None


def _own_peak(options: argparse.Namespace, num_experts: int, name: str) -> float:
    apply_settings(options)
    on, sizes = device(options.device), _sizes(options, num_experts)
    before, options.layers = peak_bytes(on), [name]
    layer = _layers(options, sizes, on)[name]
    work = _work(name, *layer, sizes, on)
    work()
    work()
    return (peak_bytes(on) - before) / 2**20


def _print(num_experts: int, name: str, row: dict[str, float]) -> None:
    peak = f"  peak {row['peak_mib']:8,.0f} MiB" if "peak_mib" in row else ""
    to_peer = f"  moe takes {row['moe_to_it']:.3f} of its time" if "moe_to_it" in row else ""
    print(
        f"{num_experts:>6} experts  {name:<18} {row['seconds']:8.4f} s  {row['ratio']:6.3f} of dense "
        f"[{row['least_ratio']:.3f} to {row['largest_ratio']:.3f}]  {row['flops_per_second'] / 1e9:8,.0f} GFLOP/s"
        f"{peak}{to_peer}",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
