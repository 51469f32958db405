"""What a new run starts from with `init_from`: the weights of another run or an export, and its optimizer state."""

from pathlib import Path

import torch
from torch import nn

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.load import check_source, last_checkpoint, load, load_weights, stored_model
from moe_lm.errors import UserError
from moe_lm.model import growth
from moe_lm.optim.composite import CompositeOptimizer, without_average
from moe_lm.parallel.context import ParallelContext


def start_from(
    config: dict, model: nn.Module, optimizer: CompositeOptimizer, vocabulary: Path, parallel: ParallelContext
) -> None:
    """Load the weights of `init_from`, a run's last checkpoint or an export, and its optimizer state if asked for.

    Experts are cloned if the model has more of them, or a mixture in place of a dense layer. `vocabulary` is the folder
    of that name in the new run. Raises `UserError` if the source does not fit.
    """
    folder = Path(config["init_from"])
    theirs = check_source(folder, vocabulary)
    # One process finds it for all, because a run that is still training may save another checkpoint meanwhile.
    path = parallel.first(lambda: last_checkpoint(folder))
    if config["init_optimizer"]:
        _check_optimizer(config, theirs, path)
    if growth.grows(stored_model(folder), model):
        _grow(config, model, optimizer, path, parallel)
        return
    load_weights(folder, path, model, parallel.shards)
    if config["init_optimizer"]:
        optimizer.load(checkpoint.load_optimizer_state(path, model, parallel.shards))


def _check_optimizer(config: dict, theirs: dict, path: Path | None) -> None:
    """Raise `UserError` unless the source is a run whose optimizer has the same rules."""
    where = f"init_optimizer=true: init_from={config['init_from']}"
    if path is None:
        raise UserError(f"{where} is an export, which has no optimizer state")
    for key in ("_target_", "experts", "vocabulary"):
        if (other := theirs["optimizer"].get(key)) != (own := config["optimizer"][key]):
            raise UserError(f"{where} was trained with optimizer.{key}={other}, this training has {own}")


def _grow(
    config: dict, model: nn.Module, optimizer: CompositeOptimizer, path: Path | None, parallel: ParallelContext
) -> None:
    folder = Path(config["init_from"])
    smaller = load(folder, "last" if path is None else str(int(path.name)), torch.device("cpu"))["model"]
    rows = {name: shard.rows for name, shard in parallel.shards.items()}
    generator = torch.Generator().manual_seed(config["seed"])
    try:
        found = growth.grow_(model, smaller, rows, noise=config["init_noise"], generator=generator)
    except ValueError as error:
        raise UserError(f"init_from={folder} does not fit the model: {error}") from error
    if not config["init_optimizer"]:
        return
    if config["optimizer"]["experts"] == "factored" and growth.has_dense_origin(found):
        raise UserError(
            f"init_optimizer=true: init_from={folder} has a dense layer, whose optimizer state is not factored as "
            "optimizer.experts=factored needs it: choose optimizer.experts=adam or init_optimizer=false"
        )
    state, before, grown = checkpoint.load_optimizer_state(path, smaller, {}), dict(smaller.named_parameters()), {}
    for name, parameter in model.named_parameters():
        if name in found:
            kept = without_average(state.get(before[found[name].name], {}))
            grown[parameter] = {kind: found[name].copy(value, rows.get(name)) for kind, value in kept.items()}
    optimizer.load(grown)
