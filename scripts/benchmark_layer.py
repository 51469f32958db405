"""The mixture-of-experts layer against the dense layer of equal operations, and against others' layers.

    python scripts/benchmark_layer.py --experts 4 32 256 --threads 1 --peers FOLDER

Forward and backward with all weight gradients and balance losses are timed in turn in one run; prints medians of the
ratios to the dense layer, round by round, and with --json writes them. `moe` routes by gate matrices drawn at random
(its noise on), `balanced` gives every expert equally many tokens, `products` is the experts alone, as balanced,
`grouped` is a sort and torch's grouped product without any loss, `moe_plain` is `moe` without our own kernels and
compiled loops. On a GPU `moe_kernels`, if asked for, makes the experts' products by our kernels however few there are,
`moe_factored` has the matrices in bfloat16 too and makes the squares of gradients, as experts with a factored second
moment do (their update is not measured), `moe_bfloat16` keeps the experts' parameters and gradients in bfloat16, as
scattermoe does, and `scattermoe_float32` keeps them in float32, as `moe` does.
--peers takes copies of others' layers (scripts/peers.py says which and whence). --memory measures each layer's peak in
a process of its own.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import (
    Work,
    compared,
    folder,
    in_turn,
    new_file,
    not_negative,
    peak_bytes,
    positive,
    product_ceiling,
    run,
    write_record,
)
from peers import NAMES, Passed, Sizes, peers
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lm.cli.machine import device, keep_memory
from moe_lm.data.sentences import Sentences
from moe_lm.errors import UserError
from moe_lm.gate import Gating
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.routing import token_choice
from moe_lm.loss.balance.importance import Importance
from moe_lm.loss.balance.load import Load
from moe_lm.model.experts import Experts
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.moe import MoE
from moe_lm.ops import backend as available
from moe_lm.ops import grouped_gemm
from moe_lm.ops.dispatch import combine, dispatch
from moe_lm.ops.gradient_memory import forget_gradient
from moe_lm.ops.rounded import keep_rounded
from moe_lm.ops.squares import want_squares

DENSE, PLAIN, KERNELS, FACTORED = "dense", "moe_plain", "moe_kernels", "moe_factored"
_OURS = ("moe", "balanced", "products", "grouped", PLAIN, KERNELS, FACTORED, "moe_bfloat16")
_BYTES = 4 * 2
"""Of a parameter and its gradient."""


def main() -> None:
    """Time the layers for each number of experts."""
    options = _options()
    on = device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = True  # everyone's float32 products, as in a training
    if options.peak:
        _print_peak(options, on)
        return
    ceiling = product_ceiling(on, torch.bfloat16 if on.type == "cuda" else torch.float32, options.square)
    print(f"products of square matrices of {options.square}: {ceiling / 1e9:,.0f} GFLOP/s")
    asked = {key: getattr(options, key) for key in ("width", "hidden", "k", "tokens", "rounds")}
    found = {}
    for num_experts in options.experts:
        sizes = _sizes(options, num_experts)
        if not _fits(sizes, on, 1 + options.room):
            print(f"{num_experts} experts: not measured, their parameters and gradients need more memory than there is")
            continue
        works = {name: _work(name, *layer, sizes, on) for name, layer in _layers(options, sizes, on).items()}
        seconds = in_turn(works, options.rounds, on)
        rows = compared(seconds, DENSE)
        for name in rows.keys() & set(NAMES) if "moe" in rows else ():
            rows[name]["moe_to_it"] = compared(seconds, name)["moe"]["ratio"]
        del works  # the next, and the processes that measure peaks, may need more memory than is left beside them
        flops = 3 * 2 * 2 * sizes.tokens * sizes.width * sizes.k * sizes.hidden
        for name, row in rows.items():
            row["flops_per_second"] = flops / row["seconds"]
            if options.memory:
                row["peak_mib"] = _peak_of(name, num_experts)
            _print(num_experts, name, row)
        found[num_experts] = rows
        # After each, as the next may be too much for the machine.
        write_record(options.json, on, {"layers": found, "options": asked, "product_flops_per_second": ceiling})
    if options.layers != [DENSE] and all(rows.keys() <= {DENSE} for rows in found.values()):
        raise UserError("nothing but the dense layer was measured: the lines above say why")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=positive, nargs="+", default=[4, 32, 256])
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--hidden", type=positive, default=1024, help="of one expert")
    parser.add_argument("--k", type=positive, default=4)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--device", default="auto")
    names = [DENSE, *_OURS, *NAMES]
    parser.add_argument("--layers", nargs="*", choices=names, metavar="LAYER", help="these alone, beside the dense one")
    parser.add_argument("--peers", type=folder, help="a folder of others' layers")
    parser.add_argument("--memory", action="store_true", help="measure peaks too")
    parser.add_argument("--room", type=not_negative, default=3, help="layers that must fit into memory beside one")
    parser.add_argument("--square", type=positive, default=2048, help="size of the products that give the ceiling")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


def _sizes(options: argparse.Namespace, num_experts: int) -> Sizes:
    return Sizes(options.width, options.hidden, num_experts, min(options.k, num_experts), options.tokens)


def _fits(sizes: Sizes, on: torch.device, layers: int) -> bool:
    needed = layers * _BYTES * sizes.num_experts * 2 * sizes.width * sizes.hidden
    if on.type == "cuda":
        return needed <= torch.cuda.mem_get_info(on)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return needed <= 1024 * int(lines["MemAvailable"].split()[0])


def _layers(options: argparse.Namespace, sizes: Sizes, on: torch.device) -> dict[str, tuple[nn.Module, Passed]]:
    torch.manual_seed(0)
    gate_DE = torch.randn(sizes.width, sizes.num_experts, device=on) * sizes.width**-0.5
    makers: dict[str, Callable[[], tuple[nn.Module, Passed]]] = {
        DENSE: lambda: _dense(sizes, on),
        "moe": lambda: _moe(sizes, on, gate_DE),
        "balanced": lambda: _balanced(sizes, on, gate_DE),
        "products": lambda: _products(sizes, on),
        "grouped": lambda: _grouped(sizes, on, gate_DE),
        PLAIN: lambda: _moe(sizes, on, gate_DE),
    }
    if on.type == "cuda" or FACTORED in (options.layers or ()):  # elsewhere it is `moe`
        makers[FACTORED] = lambda: _as_for_factored(*_moe(sizes, on, gate_DE))
    if on.type == "cuda":
        makers[KERNELS] = lambda: _moe(sizes, on, gate_DE)
        makers["moe_bfloat16"] = lambda: _moe(sizes, on, gate_DE, torch.bfloat16)
    wanted = options.layers or [
        *(name for name in makers if name != KERNELS),
        *(() if options.peers is None else NAMES),
    ]
    found = {name: make() for name, make in makers.items() if name == DENSE or name in wanted}
    if options.peers is not None:
        found |= peers(options.peers, sizes, gate_DE, wanted)
    for name in sorted(set(wanted) - found.keys()):
        print(f"{name}: left out, not in the folder of --peers, or no layer for this device", flush=True)
    return found


def _work(name: str, module: nn.Module, passed: Passed, sizes: Sizes, on: torch.device) -> Work:
    """Forward and backward, from a gradient of the output, with fresh gradients as after an update."""
    x_TD = torch.randn(sizes.tokens, sizes.width, device=on, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)
    most_in_torch = 0 if name == KERNELS else grouped_gemm.most_in_torch

    def work() -> None:
        available.plain, grouped_gemm.most_in_torch = name == PLAIN, most_in_torch
        for parameter in module.parameters():
            forget_gradient(parameter)
        x_TD.grad = None
        with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
            y_TD, losses = passed(x_TD)
        torch.autograd.backward([y_TD, *losses], [grad_TD.to(y_TD.dtype), *(None for _ in losses)])

    return work


def _dense(sizes: Sizes, on: torch.device) -> tuple[nn.Module, Passed]:
    layer = FeedForward(width=sizes.width, hidden=sizes.k * sizes.hidden, num_hidden=1).to(on)
    return layer, lambda x_TD: (layer(x_TD, Sentences(len(x_TD), 1, None))[0], [])


def _moe(
    sizes: Sizes, on: torch.device, gate_DE: Tensor, of_experts: torch.dtype = torch.float32
) -> tuple[nn.Module, Passed]:
    layer = _layer(sizes, lambda **kwargs: NoisyTopK(**kwargs, noise_epsilon=0.01)).to(on)
    layer.experts.to(of_experts)
    layer.gate.gate_DE.data.copy_(gate_DE)
    losses = Importance(weight=0.1), Load(weight=0.1)
    layer.gate.required_stats = frozenset(loss.stat for loss in losses)

    def passed(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        y_TD, gating = layer(x_TD, Sentences(len(x_TD), 1, None))
        return y_TD, [loss.weight * loss(gating) for loss in losses if sizes.num_experts > sizes.k]

    return layer, passed


def _as_for_factored(layer: MoE, passed: Passed) -> tuple[MoE, Passed]:
    """Return the layer as an update by factors has it: matrices kept in 16 bits too, gradients' squares made."""
    for weight in layer.experts.parameters():
        keep_rounded(weight)
        want_squares(weight)
    return layer, passed


def _layer(sizes: Sizes, gate: Callable[..., nn.Module]) -> MoE:
    return MoE(width=sizes.width, hidden=sizes.hidden, num_experts=sizes.num_experts, k=sizes.k, gate=gate).train()


class _Balanced(nn.Module):
    """Token t goes to experts t k, t k + 1, ... (modulo their number), weighted by a softmax over their logits."""

    def __init__(self, *, width: int, num_experts: int, k: int):
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.gate_DE = nn.Parameter(torch.empty(width, num_experts))

    def forward(self, x_TD: Tensor, group_T: Tensor | None = None) -> Gating:  # noqa: ARG002
        expert_TK = balanced_choice(len(x_TD), self.k, self.num_experts, x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TK = (x_TD.float() @ self.gate_DE).gather(1, expert_TK)
        return token_choice(expert_TK, logit_TK.softmax(dim=1), self.num_experts)


def balanced_choice(num_tokens: int, k: int, num_experts: int, on: torch.device) -> Tensor:
    """Return experts of tokens (T, K) that serve equally many, and never one token twice."""
    return torch.arange(num_tokens * k, device=on).view(num_tokens, k) % num_experts


def _balanced(sizes: Sizes, on: torch.device, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    layer = _layer(sizes, _Balanced).to(on)
    layer.gate.gate_DE.data.copy_(gate_DE)
    return layer, lambda x_TD: (layer(x_TD, Sentences(len(x_TD), 1, None))[0], [])


def _products(sizes: Sizes, on: torch.device) -> tuple[nn.Module, Passed]:
    """The experts alone, of a gating that is given."""
    experts = Experts(width=sizes.width, hidden=sizes.hidden, num_experts=sizes.num_experts).to(on)
    expert_TK = balanced_choice(sizes.tokens, sizes.k, sizes.num_experts, on)
    gating = token_choice(expert_TK, torch.full(expert_TK.shape, 1 / sizes.k, device=on), sizes.num_experts)
    return experts, lambda x_TD: (experts(x_TD, gating), [])


def _grouped(sizes: Sizes, on: torch.device, gate_DE: Tensor) -> tuple[nn.Module, Passed]:
    """What a few lines around torch's grouped product give: top k, sort, two products, weighted sum; no loss."""
    experts = Experts(width=sizes.width, hidden=sizes.hidden, num_experts=sizes.num_experts).to(on)
    gate = nn.Parameter(gate_DE.clone())
    module = nn.ModuleList([experts, nn.ParameterList([gate])])
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32

    def passed(x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        logit_TK, expert_TK = (x_TD.float() @ gate).topk(sizes.k, dim=1)
        gating = token_choice(expert_TK, logit_TK.softmax(dim=1), sizes.num_experts)
        counts_E = torch.zeros(sizes.num_experts, dtype=torch.int32, device=on)
        counts_E.index_add_(0, gating.expert_A, torch.ones_like(gating.expert_A, dtype=torch.int32))
        ends_E = counts_E.cumsum(dim=0).int()
        h_AH = F.grouped_mm(dispatch(x_TD, gating).to(dtype), experts.w1_EDH.to(dtype), offs=ends_E).relu()
        return combine(F.grouped_mm(h_AH, experts.w2_EHD.to(dtype), offs=ends_E), gating).sigmoid(), []

    return module, passed


def _print_peak(options: argparse.Namespace, on: torch.device) -> None:
    """In a process of its own: two passes of one layer, and what they held at most."""
    sizes = _sizes(options, options.experts[0])
    options.layers, before = [options.peak], peak_bytes(on)
    layers = _layers(options, sizes, on)
    if options.peak != DENSE:
        layers.pop(DENSE)
    work = _work(options.peak, *layers[options.peak], sizes, on)
    work()
    work()
    print(json.dumps((peak_bytes(on) - before) / 2**20))


def _peak_of(name: str, num_experts: int) -> float:
    arguments = [argument for argument in sys.argv[1:] if argument != "--memory"]
    command = [sys.executable, __file__, *arguments, "--experts", str(num_experts), "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise UserError(f"--memory: no peak of {name} with {num_experts} experts: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _print(num_experts: int, name: str, row: dict[str, float]) -> None:
    peak = f"  peak {row['peak_mib']:8,.0f} MiB" if "peak_mib" in row else ""
    rate = f"{row['flops_per_second'] / 1e9:8,.0f} GFLOP/s"
    print(
        f"{num_experts:>6} experts  {name:<18} {row['seconds']:8.4f} s  {row['ratio']:6.3f} of dense "
        f"[{row['least_ratio']:.3f} to {row['largest_ratio']:.3f}]  {rate}{peak}"
        + (f"  moe takes {row['moe_to_it']:.3f} of it" if "moe_to_it" in row else ""),
        flush=True,
    )


if __name__ == "__main__":
    run(main)
