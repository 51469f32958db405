"""moe-lm train: train one model and measure it; repeating the command resumes the run."""

import re
import signal
import sys
from pathlib import Path

import torch

from moe_lm.batches import Batches
from moe_lm.commands import build as make
from moe_lm.commands.configuration import composed, default_name, preset_of, resolved
from moe_lm.commands.data import prepared_data
from moe_lm.commands.gates import check_losses, choices_over_batch, want
from moe_lm.commands.result import measure_split, result_of, summary
from moe_lm.experts import recompute_hidden
from moe_lm.metrics import MetricsLog
from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel
from moe_lm.objective import Objective
from moe_lm.operations import (
    operations_per_timestep,
    parameters_total,
    parameters_without_embedding_and_softmax,
)
from moe_lm.prepared import Prepared
from moe_lm.progress import Settings
from moe_lm.run import Run
from moe_lm.trainer import Trainer

HELP = "train one model; repeat the command to resume it"
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Train to the end and write result.json; 130 if a signal asked to stop first."""
    config = resolved(composed("train", arguments))
    preset = preset_of(arguments)
    config["name"] = config["name"] or default_name(preset, arguments)
    if not re.fullmatch(r"[^/\x00-\x1f]+", config["name"]) or config["name"] in (".", ".."):
        raise Mistake(f"name={config['name']!r}: needs a plain folder name, without / and control characters")
    run = Run(Path(config["runs"]) / config["name"])
    on = make.device(config["machine"]["device"])
    make.set_threads(config["machine"]["threads"])
    make.be_deterministic(on)
    make.keep_memory()
    make.check_targets(config)
    run.claim(config)
    result = run.result()
    if result is not None and result["words"] >= config["training"]["num_words"]:
        print(f"{run.folder} is finished: {summary(result)}")
        return 0
    data = prepared_data(config, say=_say)
    trainer = trainer_of(config, data, run, on)
    if trainer.resume():
        _say(f"{run.folder}: resumed at step {trainer.progress.step}, {trainer.progress.words:,} words")
    run.result_file.unlink(missing_ok=True)
    _stop_on_signals(trainer)
    finished = trainer.train()
    trainer.log.close()
    # The final measurement can be broken off: the checkpoint is written.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not finished:
        _say(f"{run.folder}: stopped and saved at step {trainer.progress.step}; repeat the command to go on")
        return INTERRUPTED
    result = result_of(config, preset, data, trainer)
    run.write_result(result)
    print(f"{run.folder}: {summary(result)}")
    return 0


def trainer_of(config: dict, data: Prepared, run: Run, on: torch.device) -> Trainer:
    """Return the trainer of a resolved configuration, its model newly initialised from `seed`."""
    vocabulary, batch = data.vocabulary, config["batch"]
    if config["valid"]["max_sentences"] < 1:
        raise Mistake(f"valid.max_sentences={config['valid']['max_sentences']}: must be at least 1")
    torch.manual_seed(config["seed"])
    model = make.build_model(config, vocabulary.size).to(on)
    recompute_hidden(model, config["machine"]["recompute"])
    balance = {name: make.build(part) for name, part in config["balance"].items() if name != "exact"}
    check_losses(model, balance)
    want(model, balance)
    recipe = make.build(config["optimizer"])
    batches = Batches(
        data.splits["train"],
        start=vocabulary.start,
        seed=config["seed"],
        words=batch["words"],
        micro_words=batch["micro_words"],
    )
    settings = Settings(
        **config["training"],
        seed=config["seed"],
        exact_balance=config["balance"]["exact"],
        every_seconds=config["checkpoint"]["every_seconds"],
        keep_last=config["checkpoint"]["keep_last"],
        autocast=make.autocast_type(config["machine"]["precision"], on),
    )
    run.keep_vocabulary(vocabulary.save)
    _describe(model, run)
    for line in choices_over_batch(model):
        _say(line)
    return Trainer(
        model=model,
        objective=Objective(balance),
        optimizer=recipe.build(model),
        peak_rate=recipe.learning_rate,
        clip_norm=recipe.clip_norm,
        schedule=make.build(config["schedule"]),
        batches=batches,
        validate=lambda: measure_split(model, config, data, "valid", config["valid"]["max_sentences"]),
        run=run,
        log=MetricsLog(run, wandb=config["logging"]["wandb"], config=config),
        fingerprint=data.fingerprint,
        settings=settings,
    )


def _describe(model: LanguageModel, run: Run) -> None:
    size = model.embedding_VD.shape[0]
    _say(
        f"{run.folder}: {operations_per_timestep(model) / 1e6:.2f} M ops/timestep, "
        f"{parameters_without_embedding_and_softmax(model) / 1e6:.2f} M parameters "
        f"({parameters_total(model) / 1e6:.1f} M with embedding and softmax of {size:,} words)"
    )


def _stop_on_signals(trainer: Trainer) -> None:
    """The first signal lets the step end and saves; a second one of the same kind kills as usual."""

    def stop(number, frame):  # noqa: ARG001
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
