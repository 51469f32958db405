"""moe-lm train: train one model and measure it; repeating the command resumes the run."""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_lm.checkpoint.start import start_from
from moe_lm.cli import log
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, default_name, preset_of, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.cli.result import result_of, summary
from moe_lm.cli.training import check, may_grow, trainer_of
from moe_lm.data.prepared import Prepared
from moe_lm.errors import PeerLost, UserError, in_a_line, is_out_of_memory
from moe_lm.parallel import launch
from moe_lm.parallel.context import (
    SINGLE_PROCESS,
    ParallelContext,
    destroy_parallel,
    expected_size,
    init_parallel,
    is_peer_loss,
)
from moe_lm.parallel.signals import INTERRUPTED, REQUEUE, SignalHandler, end_with_parent, leave_in_peace
from moe_lm.run import Run
from moe_lm.train.trainer import Trainer


def main(arguments: list[str]) -> int:
    """Train to the end and write result.json; return 130 if Ctrl-C stopped it before, 75 if another signal did."""
    config, preset = _configuration(arguments)
    check(config)
    started = expected_size()
    if started and config["num_processes"] not in (1, started):
        raise UserError(f"num_processes={config['num_processes']}: {started} were started; omit it")
    if not started and config["num_processes"] != 1:
        on = make.device(config["machine"]["device"])
        gpus = torch.cuda.device_count() if on.type == "cuda" else None
        launch.check_num_processes(config["num_processes"], gpus)
        return launch.launch(["train", *arguments], config["num_processes"])
    stop = SignalHandler(several=started > 1)
    on = make.device(config["machine"]["device"], several=started > 1)
    make.set_threads(config["machine"]["threads"])
    make.be_deterministic(on)
    make.keep_memory()
    try:
        if started:
            end_with_parent()
        return _train(config, preset, on, stop, init_parallel(on) if started > 1 else SINGLE_PROCESS)
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        raise PeerLost(f"another process of this training has gone ({in_a_line(error)})") from error
    finally:
        destroy_parallel()
        leave_in_peace()  # nothing is left to be saved, and Python would print a traceback for a late signal


def _configuration(arguments: list[str]) -> tuple[dict, str]:
    """Return the resolved configuration, with the run's name, and the preset."""
    config = resolved(composed("train", arguments))
    preset = preset_of(arguments)
    config["name"] = config["name"] or default_name(preset, arguments)
    if not re.fullmatch(r"[^/\x00-\x1f]+", config["name"]) or config["name"] in (".", ".."):
        raise UserError(f"name={config['name']!r}: needs a plain folder name, without / and control characters")
    config["init_from"] = config["init_from"] or None
    make.check_targets(config)
    return config, preset


def _train(config: dict, preset: str, on: torch.device, stop: SignalHandler, parallel: ParallelContext) -> int:
    run, log_line = Run(Path(config["runs"]) / config["name"]), log if parallel.is_first else _discard
    config["num_processes"] = parallel.size
    config, finished = parallel.first(lambda: _claimed(config, run))
    if finished:
        if parallel.is_first:
            print(f"{run.folder} is finished: {finished}")
        return 0
    made: list[Prepared] = []
    parallel.first(lambda: made.append(prepared_data(config, log_line)))
    data = made[0] if made else prepared_data(config, log_line)  # other processes open what the first one prepared
    trainer, counts = trainer_of(config, data, run, on, log_line, parallel)
    if trainer.resume():
        log_line(f"{run.folder}: resumed at step {trainer.progress.step}, {trainer.progress.words:,} words")
    elif config["init_from"] is not None:
        start_from(config, trainer.model, trainer.optimizer, run.vocabulary, trainer.parallel)
        log_line(f"{run.folder}: starts from the weights of {config['init_from']}")
    parallel.first(lambda: run.result_file.unlink(missing_ok=True))
    if code := _run(trainer, stop, config["batch"]["micro_words"]):
        log_line(f"{run.folder}: stopped and saved at step {trainer.progress.step}; repeat the command to go on")
        return code
    with _naming_memory(config["batch"]["micro_words"]), trainer.optimizer.averaged_weights():
        result = result_of(config, preset, data, trainer, counts)
    if parallel.is_first:
        run.write_result(result)
        print(f"{run.folder}: {summary(result)}")
    return 0


def _claimed(config: dict, run: Run) -> tuple[dict, str | None]:
    """Claim the run directory; return the configuration with its micro-batch size, and a summary if it is finished."""
    batch = config["batch"]
    if batch["micro_words"] is None:
        # Chosen once, as it belongs to the run's identity: a resumed run keeps it with any number of processes.
        begun = run.begun()
        same = begun is not None and begun["batch"].get("words") == batch["words"]
        batch["micro_words"] = begun["batch"]["micro_words"] if same else -(-batch["words"] // config["num_processes"])
    training = config["training"]
    if training["valid_every"] is None:  # chosen once too, so that a run that grows is validated at the same intervals
        begun = run.begun()
        tenth = -(-training["num_words"] // (10 * batch["words"]))
        training["valid_every"] = begun["training"]["valid_every"] if begun else min(500, tenth)
    run.claim(config, may_grow=may_grow(config))
    result = run.result()
    done = result is not None and result["words"] >= config["training"]["num_words"]
    return config, summary(result) if done else None


def _run(trainer: Trainer, stop: SignalHandler, micro_words: int) -> int:
    """Train; return 0 at the end, else the exit code of a run that was asked to stop, even during its last save."""
    try:
        with stop.collecting(), _naming_memory(micro_words):
            trainer.train(lambda: stop.requested)
            # A signal during the final measurement needs no handling: the last checkpoint is written.
            stopped, interrupted = trainer.parallel.any(stop.requested, signal.SIGINT in stop.received)
    finally:
        trainer.metrics.close()
    if not stopped:
        return 0
    leave_in_peace()
    trainer.parallel.each(None)  # leave together: after the first exit the launcher gives the others half a minute
    return INTERRUPTED if interrupted else REQUEUE


@contextlib.contextmanager
def _naming_memory(micro_words: int) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` that names the keys which lower memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({in_a_line(error)}): a batch.micro_words below {micro_words} needs less, under another "
            "name=...; so do machine.recompute=true and optimizer.experts=factored"
        ) from error


def _discard(line: str) -> None:
    """Log nothing: the first process logs for all."""
