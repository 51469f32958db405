"""From a resolved configuration to the trainer of a run in this process."""

import math
from collections.abc import Callable
from functools import partial

import torch

from moe_lm.analysis.cost import flops_per_word
from moe_lm.checkpoint.saver import Saver
from moe_lm.cli import machine as make
from moe_lm.cli.result import Counts, counts_of, measure_split
from moe_lm.cli.validate_gates import check_losses, gates_of, non_causal_notes, require_statistics
from moe_lm.data.batching import Batches, Prefetcher, check_words
from moe_lm.data.prepared import Prepared
from moe_lm.errors import UserError
from moe_lm.loss.objective import BalanceLoss, Objective
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.moe import set_recompute
from moe_lm.optim import OptimizerRecipe
from moe_lm.optim.schedule import Schedule
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.parallel.grad_reduce import GradReducer
from moe_lm.parallel.parallelize import parallelize
from moe_lm.run import Run
from moe_lm.train.metrics import MetricsLog
from moe_lm.train.step import TrainStep
from moe_lm.train.trainer import Settings, Trainer

_SOME_WORDS = 1000
"""Vocabulary size of the model that `check` builds, before the true size is known."""


def check(config: dict) -> None:
    """Raise `UserError` for wrong sizes and choices before any text is prepared."""
    for group, key in (("valid", "max_sentences"), ("checkpoint", "keep_last")):
        if config[group][key] < 1:
            raise UserError(f"{group}.{key}={config[group][key]}: must be at least 1")
    if not 0 <= config["init_noise"] < math.inf:
        raise UserError(f"init_noise={config['init_noise']}: must be at least 0 and finite")
    if config["init_optimizer"] and config["init_from"] is None:
        raise UserError("init_optimizer=true: name the run that has the optimizer state, as in init_from=runs/moe_4")
    with torch.device("meta"):
        model = make.build_model(config, _SOME_WORDS)
    check_losses(model, _balance(config))
    for group in ("optimizer", "schedule"):
        make.build(config[group])
    _settings(config)
    make.autocast_type(config["machine"]["precision"], torch.device("cpu"))
    words, micro_words = config["batch"]["words"], config["batch"]["micro_words"]
    check_words(words, words if micro_words is None else micro_words)


def may_grow(config: dict) -> bool:
    """Return whether a run may be continued to more words: not if its updates depend on how many there are in all."""
    with torch.device("meta"):
        model = make.build_model(config, _SOME_WORDS)
    parts = [make.build(config["schedule"]), *(gate for _, gate in gates_of(model))]
    return not any(part.depends_on_length for part in parts)


def trainer_of(
    config: dict,
    data: Prepared,
    run: Run,
    on: torch.device,
    log: Callable[[str], None],
    parallel: ParallelContext = SINGLE_PROCESS,
) -> tuple[Trainer, Counts]:
    """Return the trainer of a checked configuration, with a newly initialised model, and the model's counts."""
    vocabulary, checkpoints = data.vocabulary, config["checkpoint"]
    with torch.device("meta"):
        model = make.build_model(config, vocabulary.size)
    counts, flops_per_token = counts_of(model), flops_per_word(model)
    recipe, batches = make.build(config["optimizer"]), _batches(config, data)
    settings = _settings(config)
    parallel = _materialised(model, config, on, parallel)
    model.to(on)
    parallel.first(lambda: run.keep_vocabulary(vocabulary.save))
    schedule, num_steps = make.build(config["schedule"]), batches.num_steps(settings.num_words)
    log(_sizes(counts, run, vocabulary.size))
    for line in [*_plan(config, schedule, num_steps), *non_causal_notes(model), *_idle(batches, parallel)]:
        log(line)
    saver = Saver(
        run.checkpoints,
        keep_last=checkpoints["keep_last"],
        asynchronous=checkpoints["asynchronous"],
        log=log,
        parallel=parallel,
    )
    limit = config["valid"]["max_sentences"]
    trainer = Trainer(
        train_step=_train_step(model, config, recipe, on, parallel),
        peak_rate=recipe.learning_rate,
        schedule=schedule,
        num_steps=num_steps,
        prefetcher=Prefetcher(batches, parallel.round_robin, pin_memory=on.type == "cuda"),
        validate=partial(measure_split, model, config, data, "valid", limit, parallel=parallel),
        metrics=MetricsLog(run, config, writes=parallel.is_first),
        saver=saver,
        fingerprint=data.fingerprint,
        settings=settings,
        flops_per_token=flops_per_token,
        log=log,
    )
    return trainer, counts


def _materialised(model: LanguageModel, config: dict, on: torch.device, parallel: ParallelContext) -> ParallelContext:
    """Shard a model on the meta device, draw its weights on the CPU, and return the context with the shards."""
    machine, sharding = config["machine"], config["parallel"]
    parallel = parallelize(model, parallel, on, expert_size=sharding["expert_size"], vocab=sharding["vocab"])
    torch.manual_seed(config["seed"])
    model.to_empty(device="cpu").reset_parameters()
    make.leave_threads(machine["threads"], on)  # with a GPU, only drawing weights needs many threads
    set_recompute(model, machine["recompute"])
    return parallel


def _train_step(
    model: LanguageModel, config: dict, recipe: OptimizerRecipe, on: torch.device, parallel: ParallelContext
) -> TrainStep:
    balance = _balance(config)
    require_statistics(model, balance)
    optimizer = recipe.build(model)  # before the reducer: the optimizer decides which gradients are sparse
    return TrainStep(
        model=model,
        objective=Objective(balance),
        optimizer=optimizer,
        clip_norm=recipe.clip_norm,
        global_balance=config["balance"]["global_batch"],
        autocast=make.autocast_type(config["machine"]["precision"], on),
        seed=config["seed"],
        reducer=GradReducer(model, parallel),
    )


def _settings(config: dict) -> Settings:
    return Settings(**config["training"], every_seconds=config["checkpoint"]["every_seconds"])


def _balance(config: dict) -> dict[str, BalanceLoss]:
    return {name: make.build(part) for name, part in config["balance"].items() if name != "global_batch"}


def _batches(config: dict, data: Prepared) -> Batches:
    return Batches(
        data.splits["train"],
        start=data.vocabulary.start,
        seed=config["seed"],
        words=config["batch"]["words"],
        micro_words=config["batch"]["micro_words"],
    )


def _plan(config: dict, schedule: Schedule, num_steps: int) -> list[str]:
    """Return the numbers of updates and of warm-up updates, and a warning if the warm-up is the larger one."""
    words, warmup = config["batch"]["words"], schedule.warmup(num_steps)
    lines = [f"{num_steps:,} updates of {words:,} words, of which {min(warmup, num_steps):,} are warm-up"]
    if warmup > num_steps:
        lines.append(
            f"WARNING: the warm-up of {warmup:,} updates outlasts this training of {num_steps:,}: "
            "schedule.max_warmup_fraction=0.1 shortens it, or recipe=small_batch, under another name=..."
        )
    return lines


def _idle(batches: Batches, parallel: ParallelContext) -> list[str]:
    """Return a note if a batch has too few micro-batches to keep all processes busy."""
    count = batches.micro_batches_per_step
    places = -(-count // parallel.size) * parallel.size
    if places == count:
        return []
    return [
        f"NOTE: {count} micro-batches a step leave {parallel.size} processes idle for {1 - count / places:.0%} of the "
        "time; batch.micro_words = batch.words / num_processes avoids this, under another name=..."
    ]


def _sizes(counts: Counts, run: Run, vocabulary_size: int) -> str:
    return (
        f"{run.folder}: {counts.operations_per_timestep / 1e6:.2f} M ops/timestep, "
        f"{counts.parameters_without_embedding_and_softmax / 1e6:.2f} M parameters "
        f"({counts.parameters_total / 1e6:.1f} M with embedding and softmax of {vocabulary_size:,} words)"
    )
