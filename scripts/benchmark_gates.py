"""What gates cost: gate, dispatch and combine against the whole mixture-of-experts layer, forward and backward.

    python scripts/benchmark_gates.py --threads 1

For each gate the whole layer, with its balance losses, and the same without its experts (each answers with its input)
are timed in turn in one run; prints the median share of the layer's time, its parts forward, and with --json writes
them. Weights are as after some training: every expert is reached, no gate is near a tie.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measuring import new_file, positive, run, write_record
from omegaconf import OmegaConf

from moe_lm.cli.config import choices, folder
from moe_lm.cli.machine import build, keep_memory
from moe_lm.data.sentences import Sentences
from moe_lm.model.moe import MoE
from moe_lm.ops.dispatch import combine, dispatch

LOSSES = {
    "noisy_top_k": ["importance", "load"],
    "top_k": ["switch"],
    "switch": ["switch"],
    "gshard": ["gshard"],
    "strictly_balanced": ["batchwise"],
}


def main() -> None:
    """Time every gate, or those named."""
    options = _options()
    torch.set_num_threads(options.threads)
    keep_memory()
    rows = {}
    for name in options.gates or choices("gate"):
        rows[name] = row = _measured(name, options)
        print(
            f"{name:<20} k={row['k']}  layer {row['layer_seconds']:6.3f} s   gate, dispatch and combine "
            f"{100 * row['share']:5.1f} %   (forward: gate {row['gate_seconds']:.3f}, dispatch "
            f"{row['dispatch_seconds']:.3f}, combine {row['combine_seconds']:.3f} s)",
            flush=True,
        )
    sizes = {key: value for key, value in vars(options).items() if key not in ("json", "gates")}
    write_record(options.json, torch.device("cpu"), {"rows": rows, "options": sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", nargs="*", help="all of configs/gate if none is named")
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--hidden", type=positive, default=1024, help="of one expert")
    parser.add_argument("--experts", type=positive, default=256)
    parser.add_argument("--k", type=positive, default=4, help="where a gate is not defined for another")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


def _measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    gate = _part("gate", name)
    k = getattr(gate.func, "only_k", None) or options.k
    layer = MoE(width=options.width, hidden=options.hidden, num_experts=options.experts, k=k, gate=gate).train()
    torch.nn.init.normal_(layer.gate.gate_DE, std=options.width**-0.5)
    losses = [_part("balance", loss) for loss in LOSSES.get(name, [])]
    layer.gate.required_stats = frozenset(loss.stat for loss in losses)
    x_TD = torch.randn(options.tokens, options.width, requires_grad=True)
    grad_TD, nobody = torch.randn_like(x_TD), Sentences(options.tokens, 1, None)

    def without_experts():
        gating = layer.gate(x_TD)
        return combine(dispatch(x_TD, gating), gating), gating

    def whole():
        return layer(x_TD, nobody)

    def passed(work: Callable) -> float:
        layer.zero_grad()
        started = time.perf_counter()
        y_TD, gating = work()
        balance = [loss.weight * loss(gating) for loss in losses]
        torch.autograd.backward([y_TD, *balance], [grad_TD, *(None for _ in balance)])
        return time.perf_counter() - started

    times = [(passed(without_experts), passed(whole)) for _ in range(options.rounds + 1)][1:]
    return {
        "k": k,
        "share": statistics.median(part / all_ for part, all_ in times),
        "layer_seconds": statistics.median(all_ for _, all_ in times),
        "without_experts_seconds": statistics.median(part for part, _ in times),
        **_forward(layer, x_TD, options.rounds),
    }


def _part(group: str, name: str) -> object:
    content = OmegaConf.to_container(OmegaConf.load(folder() / group / f"{name}.yaml"))
    return build(content if group == "gate" else content[name])


@torch.no_grad()
def _forward(layer: MoE, x_TD: torch.Tensor, rounds: int) -> dict[str, float]:
    gating = layer.gate(x_TD)
    y_AD = dispatch(x_TD, gating)
    parts = {
        "gate": lambda: layer.gate(x_TD),
        "dispatch": lambda: dispatch(x_TD, gating),
        "combine": lambda: combine(y_AD, gating),
    }
    found = {}
    for name, work in parts.items():
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        found[f"{name}_seconds"] = statistics.median(times)
    return found


if __name__ == "__main__":
    run(main)
