"""What gates cost: the share of gate, dispatch and combine in a whole MoE layer, forward and backward.

    python scripts/benchmark_gates.py --threads 1

For each gate, one run times in turn the whole layer, with its balance losses, and the same layer without experts (an
expert's output is its input). Prints the median share of the layer's time and the parts of the forward pass; --json
writes them to a file. The gates' weights are random, so that every expert is reached, as after some training.
"""

import argparse

import torch
from benchmarking import Work, interleaved, parse, parser, positive, ratios, run, write_record
from omegaconf import OmegaConf
from torch import Tensor

from moe_lm.cli.machine import build
from moe_lm.config_files import choices, folder
from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gating
from moe_lm.model.moe import MoE
from moe_lm.ops.token_dispatch import combine, dispatch

LOSSES = {
    "noisy_top_k": ["importance", "load"],
    "top_k": ["switch"],
    "switch": ["switch"],
    "gshard": ["gshard"],
    "strictly_balanced": ["batchwise"],
}
_CPU = torch.device("cpu")
_WORDS = 1000
"""Distinct input words, for gates that read them."""


def main() -> None:
    """Time every gate, or the gates that --gates names."""
    options, rows = _options(), {}
    for name in options.gates or choices("gate"):
        rows[name] = row = _measured(name, options)
        print(
            f"{name:<20} k={row['k']}  layer {row['layer_seconds']:6.3f} s   gate, dispatch and combine "
            f"{100 * row['share']:5.1f} %   (forward: gate {row['gate_seconds']:.3f}, dispatch "
            f"{row['dispatch_seconds']:.3f}, combine {row['combine_seconds']:.3f} s)",
            flush=True,
        )
    write_record(options, _CPU, {"rows": rows})


def _options() -> argparse.Namespace:
    made = parser(__doc__, threads=1, rounds=7)
    made.add_argument("--gates", nargs="*", help="default: all of configs/gate")
    made.add_argument("--width", type=positive, default=512)
    made.add_argument("--hidden", type=positive, default=1024, help="hidden units of one expert")
    made.add_argument("--experts", type=positive, default=256)
    made.add_argument("--k", type=positive, default=4, help="experts a token, for gates that allow any number")
    made.add_argument("--tokens", type=positive, default=8192)
    return parse(made)


def _measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    gate = _built("gate", name)
    k = gate.func.only_k or options.k
    sizes = {"width": options.width, "hidden": options.hidden, "num_experts": options.experts, "k": k}
    layer = MoE(**sizes, gate=gate, gate_init_std=options.width**-0.5).train()
    losses = [_built("balance", loss) for loss in LOSSES.get(name, [])]
    layer.gate.required_stats = frozenset(loss.stat for loss in losses)
    x_TD = torch.randn(options.tokens, options.width, requires_grad=True)
    input_T = torch.arange(options.tokens) % _WORDS
    grad_TD, layout = torch.randn_like(x_TD), PaddedLayout(options.tokens, 1, None, input_T)

    def without_experts() -> tuple[Tensor, Gating]:
        gating = layer.gate(x_TD, input_T=input_T)
        return _combined(dispatch(x_TD, gating.token_A), gating), gating

    def both_passes(forward: Work) -> None:
        layer.zero_grad()
        y_TD, gating = forward()
        balance = [loss.weight * loss(gating) for loss in losses]
        torch.autograd.backward([y_TD, *balance], [grad_TD, *(None for _ in balance)])

    works = {"layer": lambda: layer(x_TD, layout), "without_experts": without_experts}
    works = {name: lambda work=work: both_passes(work) for name, work in works.items()}
    rows = ratios(interleaved(works, options.rounds, _CPU), "layer")
    seconds = {
        f"{name}_seconds": row["seconds"]
        for name, row in (rows | _forward(layer, x_TD, input_T, options.rounds)).items()
    }
    return {"k": k, "share": rows["without_experts"]["ratio"], **seconds}


def _built(group: str, name: str) -> object:
    content = OmegaConf.to_container(OmegaConf.load(folder() / group / f"{name}.yaml"))
    return build(content if group == "gate" else content[name])


def _combined(y_AD: Tensor, gating: Gating) -> Tensor:
    return combine(y_AD, gating.token_A, gating.gate_A, gating.num_tokens)


@torch.no_grad()
def _forward(layer: MoE, x_TD: Tensor, input_T: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    gating = layer.gate(x_TD, input_T=input_T)
    y_AD = dispatch(x_TD, gating.token_A)
    parts = {
        "gate": lambda: layer.gate(x_TD, input_T=input_T),
        "dispatch": lambda: dispatch(x_TD, gating.token_A),
        "combine": lambda: _combined(y_AD, gating),
    }
    return ratios(interleaved(parts, rounds, _CPU), "gate")


if __name__ == "__main__":
    run(main)
