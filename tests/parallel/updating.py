"""A few updates of a small model, on however many processes, with everything that they made gathered whole."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.cli.training import trainer_of
from moe_lm.ops.sparse_rows import row_grad
from moe_lm.run import Run

# Four micro-batches a step: four turns of one process, two of two, two with two idle of three, one of four.
SIZES = [
    "batch.words=240",
    "batch.micro_words=60",
    "model.num_experts=6",
    "model.dropout=0.2",
    "training.num_words=1e6",
]
HIERARCHY = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=15", "model.num_groups=5", "model.k=2"]


@dataclass(frozen=True)
class Case:
    """A configuration and the type of its numbers."""

    name: str
    overrides: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    over_all: bool = False
    """Whether all processes divide the experts, even if there are fewer of them."""


def configuration(case: Case) -> dict:
    """The resolved configuration of a case, made once for all processes: that takes longer than an update."""
    arguments = with_overrides(TRAINING, *SIZES, *case.overrides, f"name={case.name}")
    unread = {"softmax.num_sampled"} if "softmax=full" in arguments else set()
    unread |= {"model.num_experts", "model.k"} if "model=moe_1_wide" in arguments else set()
    return resolved(composed("train", [a for a in arguments if a.partition("=")[0] not in unread]))


def trainer_for(case: Case, config: dict, parallel):
    """A trainer with random gate matrices: at zero all logits would tie without the noise."""
    if case.over_all:
        config["parallel"]["expert_size"] = parallel.size
    run = Run(Path("runs") / f"{case.name}-{parallel.size}")
    if parallel.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
    parallel.each(None)
    data = prepared_data(config, log=lambda line: None)
    make.be_deterministic(torch.device("cpu"))
    trainer, _ = trainer_of(config, data, run, torch.device("cpu"), lambda line: None, parallel)
    trainer.model.to(case.dtype)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trainer.model.named_parameters():
        if name.endswith(("gate_DE", "noise_DE")):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * drawn)
    return trainer


def updates(parallel, argument: tuple[list[tuple[Case, dict]], int]) -> dict:
    """Of each case: losses of every step, gradients of every step, statistics, and the parameters after the last."""
    cases, steps = argument
    return {case.name: _updated(trainer_for(case, config, parallel), parallel, steps) for case, config in cases}


def _updated(trainer, parallel, steps: int) -> dict:
    model, shares, optimizer = trainer.model, trainer.parallel.shards, trainer.optimizer
    found = {"losses": [], "gradients": [], "loads": []}
    clip = optimizer.clip

    def watched(limit, had):
        grads = {name: _gradient(p) for name, p in model.named_parameters()}
        found["gradients"].append(_whole(grads, shares, parallel))
        clip(limit, had)

    optimizer.clip = watched
    for step in range(steps):
        done = trainer.train_step(trainer.prefetcher.batches.step(step), step, 1e-3)
        assert done.updated
        terms = {name: float(x) for name, x in done.balance.items()}
        found["losses"].append(
            {"nats": float(done.nats), "grad_norm": float(done.grad_norm), **terms} | _floats(done.routing)
        )
        found["loads"].append({layer: gating.load_E.clone() for layer, gating in done.gatings.items()})
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    found["parameters"] = _whole(state, shares, parallel)
    moments = {
        f"{kind}/{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    by_key = {key: shares[key.partition("/")[2]] for key in moments if key.partition("/")[2] in shares}
    found["moments"] = _whole(moments, by_key, parallel)
    return found


def _floats(values: dict) -> dict:
    return {name: float(x) for name, x in values.items()}


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient as a whole tensor, whatever form it has."""
    whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
    if (touched := row_grad(parameter)) is not None:
        whole.index_add_(0, touched.row_U, touched.value_UD)
    return whole


def _whole(tensors: dict, shares: dict, parallel) -> dict:
    """Divided tensors put together of all processes' rows, by the numbers of the rows; copies must be equal bits."""
    here = {name: (shares[name].rows if name in shares and x.dim() else None, x) for name, x in tensors.items()}
    global_stats = parallel.each(here)
    whole = {}
    for name in itertools.chain.from_iterable(global_stats):
        if name in whole:
            continue
        parts = [part[name] for part in global_stats if name in part]
        rows, first = parts[0]
        if rows is None:
            assert all(torch.equal(first, other) for _, other in parts), f"{name} differs between processes"
            whole[name] = first
            continue
        by_row: dict[int, torch.Tensor] = {}
        for rows, tensor in parts:
            assert len(rows) == len(tensor)
            for number, row in zip(rows, tensor, strict=True):
                assert number not in by_row or torch.equal(by_row[number], row), f"copies of {name} differ"
                by_row[number] = row
        assert sorted(by_row) == list(range(len(by_row)))
        whole[name] = torch.stack([by_row[number] for number in sorted(by_row)])
    return whole
