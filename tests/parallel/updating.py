"""A few updates of a small model, on however many processes, with everything that they made gathered whole."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    arguments = with_overrides(TRAINING, *SIZES, *case.overrides)
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
    """Return, for each case, losses, gradients and statistics of every step, and the last parameters and moments.

    Tensors are the rows that this process holds; `whole` puts them together.
    """
    cases, steps = argument
    return {case.name: _updated(trainer_for(case, config, parallel), steps) for case, config in cases}


def _updated(trainer, steps: int) -> dict:
    model, shards, optimizer = trainer.model, trainer.parallel.shards, trainer.optimizer
    found = {"losses": [], "gradients": [], "loads": []}
    clip = optimizer.clip

    def watched(limit, had):
        found["gradients"].append(_held({name: _gradient(p) for name, p in model.named_parameters()}, shards))
        clip(limit, had)

    optimizer.clip = watched
    for step in range(steps):
        done = trainer.train_step(trainer.prefetcher.batches.step(step), step, 1e-3)
        assert done.updated
        terms = {"nats": done.nats, "grad_norm": done.grad_norm, **done.balance, **done.routing}
        found["losses"].append({name: float(x) for name, x in terms.items()})
        found["loads"].append({layer: _array(gating.load_E) for layer, gating in done.gatings.items()})
    moments = {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    found["parameters"] = _held(model.state_dict(), shards)
    found["moments"] = _held(moments, {key: shards.get(key.partition("/")[2]) for key in moments})
    return found


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient as a whole tensor, whatever form it has."""
    whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
    if (touched := row_grad(parameter)) is not None:
        whole.index_add_(0, touched.row_U, touched.value_UD)
    return whole


Held = dict[str, tuple[range | None, np.ndarray]]
"""Tensors by name, and the numbers of the rows that a process holds of each; None of one that all hold whole."""


def _held(tensors: dict, shards: dict) -> Held:
    rows = {name: shards[name].rows if shards.get(name) and x.dim() else None for name, x in tensors.items()}
    return {name: (rows[name], _array(x)) for name, x in tensors.items()}


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A copy, as an array: pickling one takes a tenth of a tensor's time."""
    return tensor.detach().clone().numpy()


def whole(held: list[Held]) -> dict[str, np.ndarray]:
    """Tensors put together of all processes' rows, by the numbers of the rows; copies must be equal bits."""
    return {name: _joined(name, [part[name] for part in held if name in part]) for name in set().union(*held)}


def _joined(name: str, parts: list[tuple[range | None, np.ndarray]]) -> np.ndarray:
    _, first = parts[0]
    if parts[0][0] is None:
        assert all(np.array_equal(first, other) for _, other in parts), f"{name} differs between processes"
        return first
    joined = np.zeros((max(rows.stop for rows, _ in parts), *first.shape[1:]), first.dtype)
    known = np.zeros(len(joined), bool)
    for rows, array in parts:
        assert len(rows) == len(array), f"{name} has {len(array)} rows, not {len(rows)}"
        assert array.dtype == first.dtype, f"{name} has several types"
        place = slice(rows.start, rows.stop)
        both = known[place]
        assert np.array_equal(joined[place][both], array[both]), f"copies of {name} differ"
        joined[place], known[place] = array, True
    assert known.all(), f"nobody holds some rows of {name}"
    return joined
