"""What single choices cost on a CPU, each against its alternative, interleaved in one run: ratios of medians.

    python scripts/benchmark_choices.py --threads 1

factored: an update of FactoredAdam over one of torch's fused Adam, expert matrices (64, 512, 1024).
recompute: forward and backward of 32 experts of 512 x 1024 over 8,192 tokens, 4 each; recomputed over kept.
projected: forward and backward of an LSTM 2048 -> 512 over a plain one, per operation.
grouped: 16 groups of 256 experts at width 512; torch's grouped product over the padded one.
blocks: exact nats of 1,024 tokens over 793,471 words; in blocks of 1,024 tokens over blocks of 21.
"""

import argparse

import torch
from measuring import Work, compared, in_turn, positive, run
from torch import nn

from moe_lm.cli.machine import keep_memory
from moe_lm.data.sentences import Sentences
from moe_lm.gate.routing import token_choice
from moe_lm.model.experts import Experts
from moe_lm.model.lstm import Lstm, ProjectedLstm
from moe_lm.ops import cross_entropy
from moe_lm.ops import grouped_linear as grouped_product
from moe_lm.optim.factored_adam import FactoredAdam


def main() -> None:
    """Print a line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    for choice in (factored, recompute, projected, grouped, blocks):
        torch.manual_seed(0)
        this, other, scale = choice()
        print(f"{choice.__name__:<10} {scale * ratio(this, other, options.rounds):.2f}", flush=True)


def ratio(this: Work, other: Work, rounds: int) -> float:
    """Return the median of the time ratios of interleaved rounds, the first left out."""
    return compared(in_turn({"this": this, "other": other}, rounds, torch.device("cpu")), "other")["this"]["ratio"]


def factored():
    weights = [nn.Parameter(torch.randn(64, 512, 1024)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    ours = FactoredAdam([weights[0]], lr=1e-3, beta2=0.999, epsilon=1e-8)
    return ours.step, torch.optim.Adam([weights[1]], fused=True).step, 1.0


def recompute():
    experts = Experts(width=512, hidden=1024, num_experts=32)
    x_TD = torch.randn(8192, 512, requires_grad=True)
    expert_TK = torch.stack([torch.randperm(32)[:4] for _ in range(8192)])
    gating = token_choice(expert_TK, torch.full((8192, 4), 0.25), 32)

    def run(again: bool) -> None:
        experts.recompute = again
        experts(x_TD, gating).square().sum().backward()

    return lambda: run(True), lambda: run(False), 1.0


def projected():
    long, plain = ProjectedLstm(width=512, units=2048), Lstm(width=512)
    sentences = Sentences(num_steps=20, num_sentences=64, position_T=None)
    x_TD = torch.randn(20 * 64, 512)
    scale = plain.operations_per_timestep() / long.operations_per_timestep()
    return *(lambda layer=layer: layer(x_TD, sentences)[0].sum().backward() for layer in (long, plain)), scale


def grouped():
    weight_GDE = torch.randn(16, 512, 256, requires_grad=True)
    group_T = torch.randint(16, (16384,)).sort().values
    x_TD = torch.randn(16384, 512, requires_grad=True)

    def padded() -> None:
        count = int(group_T.bincount().max())
        start_G = torch.searchsorted(group_T, torch.arange(16))
        place_T = torch.arange(len(x_TD)) + (torch.arange(16) * count - start_G)[group_T]
        y = x_TD.new_zeros(16 * count, 512).index_copy(0, place_T, x_TD).view(16, count, 512) @ weight_GDE
        y.flatten(0, 1).index_select(0, place_T).sum().backward()

    return lambda: grouped_product.grouped_product(x_TD, weight_GDE, group_T).sum().backward(), padded, 1.0


def blocks():
    hidden_TD, weight_VD, bias_V = torch.randn(1024, 512), torch.randn(793_471, 512) * 0.04, torch.zeros(793_471)
    target_T = torch.randint(793_471, (1024,))
    arguments = hidden_TD, weight_VD, bias_V, target_T

    def few() -> None:
        for first in range(0, 126, 21):
            part = slice(first, first + 21)
            cross_entropy._block_nats(hidden_TD[part], weight_VD, bias_V, target_T[part], len(weight_VD))

    return lambda: cross_entropy.exact_nats(*arguments, max_logits=1 << 24), few, 126 / 1024


if __name__ == "__main__":
    run(main)
