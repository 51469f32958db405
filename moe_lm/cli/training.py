"""A resolved configuration to the trainer of a run: everything that training needs, on this process."""

from collections.abc import Callable
from functools import partial

import torch

from moe_lm.checkpoint.saver import Saver
from moe_lm.cli import machine as make
from moe_lm.cli.result import Counts, counts_of, measure_split
from moe_lm.cli.validate_gates import check_losses, non_causal_notes, want
from moe_lm.data.batching import Batches, check_words
from moe_lm.data.prepared import Prepared
from moe_lm.errors import UserError
from moe_lm.loss.balance import BalanceLoss
from moe_lm.loss.objective import Objective
from moe_lm.model.experts import set_recompute
from moe_lm.model.language_model import LanguageModel
from moe_lm.optim import OptimizerRecipe
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext, with_experts, with_vocabulary
from moe_lm.run import Run
from moe_lm.train.metrics import MetricsLog, NoLog
from moe_lm.train.progress import Settings
from moe_lm.train.step import TrainStep
from moe_lm.train.trainer import Trainer

_SOME_WORDS = 1000
"""Of a vocabulary, where the true size is not known yet."""


def check(config: dict) -> None:
    """Refuse what needs no text to be refused, such as sizes that fit no model: before the text is prepared."""
    for group, key in (("valid", "max_sentences"), ("checkpoint", "keep_last")):
        if config[group][key] < 1:
            raise UserError(f"{group}.{key}={config[group][key]}: must be at least 1")
    with torch.device("meta"):
        model = make.build_model(config, _SOME_WORDS)
    check_losses(model, _balance(config))
    for group in ("optimizer", "schedule"):
        make.build(config[group])
    _settings(config)
    words, micro_words = config["batch"]["words"], config["batch"]["micro_words"]
    check_words(words, words if micro_words is None else micro_words)


def trainer_of(
    config: dict,
    data: Prepared,
    run: Run,
    on: torch.device,
    say: Callable[[str], None],
    parallel: ParallelContext = SINGLE_PROCESS,
) -> tuple[Trainer, Counts]:
    """Return the trainer of a configuration that `check` let pass, its model newly initialised, and what it counts."""
    vocabulary, checkpoints, machine = data.vocabulary, config["checkpoint"], config["machine"]
    with torch.device("meta"):
        whole = make.build_model(config, vocabulary.size)
    parallel = with_experts(parallel, _most_experts(whole), machine["expert_processes"], on)
    parallel = with_vocabulary(parallel, machine["divide_vocabulary"])
    recipe, batches, counts = make.build(config["optimizer"]), _batches(config, data), counts_of(whole)
    settings = _settings(config)
    update = _update(config, recipe, vocabulary.size, on, parallel)
    parallel.first(lambda: run.keep_vocabulary(vocabulary.save))
    for line in [_sizes(counts, run, vocabulary.size), *non_causal_notes(update.model), *_idle(batches, parallel)]:
        say(line)
    saver = Saver(
        run.checkpoints,
        keep_last=checkpoints["keep_last"],
        asynchronous=checkpoints["asynchronous"],
        say=say,
        parallel=parallel,
    )
    limit = config["valid"]["max_sentences"]
    trainer = Trainer(
        update=update,
        peak_rate=recipe.learning_rate,
        schedule=make.build(config["schedule"]),
        batches=batches,
        validate=partial(measure_split, update.model, config, data, "valid", limit, parallel=parallel),
        run=run,
        log=MetricsLog(run, wandb=config["logging"]["wandb"], config=config) if parallel.is_first else NoLog(),
        saver=saver,
        fingerprint=data.fingerprint,
        settings=settings,
        say=say,
        parallel=parallel,
    )
    return trainer, counts


def _update(
    config: dict, recipe: OptimizerRecipe, vocabulary_size: int, on: torch.device, parallel: ParallelContext
) -> TrainStep:
    torch.manual_seed(config["seed"])
    model = make.build_model(config, vocabulary_size, parallel).to(on)
    make.leave_threads(config["machine"]["threads"], on)  # which have drawn the weights
    set_recompute(model, config["machine"]["recompute"])
    balance = _balance(config)
    want(model, balance)
    return TrainStep(
        model=model,
        objective=Objective(balance),
        optimizer=recipe.build(model),
        clip_norm=recipe.clip_norm,
        exact_balance=config["balance"]["exact"],
        autocast=make.autocast_type(config["machine"]["precision"], on),
        seed=config["seed"],
        vocabulary_size=vocabulary_size,
        parallel=parallel,
    )


def _settings(config: dict) -> Settings:
    return Settings(**config["training"], every_seconds=config["checkpoint"]["every_seconds"])


def _balance(config: dict) -> dict[str, BalanceLoss]:
    return {name: make.build(part) for name, part in config["balance"].items() if name != "exact"}


def _batches(config: dict, data: Prepared) -> Batches:
    return Batches(
        data.splits["train"],
        start=data.vocabulary.start,
        seed=config["seed"],
        words=config["batch"]["words"],
        micro_words=config["batch"]["micro_words"],
    )


def _most_experts(model: LanguageModel) -> int:
    return max((layer.experts.share.total for layer in model.layers.values() if hasattr(layer, "experts")), default=0)


def _idle(batches: Batches, parallel: ParallelContext) -> list[str]:
    """Say where processes wait for others because a batch has too few micro-batches for all of them."""
    count = batches.micro_batches_per_step
    places = -(-count // parallel.size) * parallel.size
    if places == count:
        return []
    return [
        f"NOTE: {count} micro-batches a step for {parallel.size} processes, idle for {1 - count / places:.0%} of the "
        "time; not so where batch.micro_words is batch.words / num_processes, under another name=..."
    ]


def _sizes(counts: Counts, run: Run, vocabulary_size: int) -> str:
    return (
        f"{run.folder}: {counts.operations_per_timestep / 1e6:.2f} M ops/timestep, "
        f"{counts.parameters_without_embedding_and_softmax / 1e6:.2f} M parameters "
        f"({counts.parameters_total / 1e6:.1f} M with embedding and softmax of {vocabulary_size:,} words)"
    )
