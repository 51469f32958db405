"""The training loop: batches in, updates, metrics and checkpoints out; the same on one process or many."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from tqdm import tqdm

from moe_lm.analysis.cost.operations import flops_per_word
from moe_lm.analysis.perplexity import Measured
from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.saver import Saver, must
from moe_lm.data.batching import Batches
from moe_lm.data.prefetch import Prefetcher
from moe_lm.errors import UserError
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.run import Run
from moe_lm.train.metrics import Interval, MetricsLog
from moe_lm.train.progress import Progress, Settings
from moe_lm.train.step import TrainStep
from moe_lm.train.uncounted import Uncounted


class Trainer:
    """Trains one model to `settings.num_words`; the same run continues where its last checkpoint stands."""

    def __init__(
        self,
        *,
        update: TrainStep,
        peak_rate: float,
        schedule: Callable[[int], float],
        batches: Batches,
        validate: Callable[[], Measured],
        run: Run,
        log: MetricsLog,
        saver: Saver,
        fingerprint: str,
        settings: Settings,
        say: Callable[[str], None],
        parallel: ParallelContext = SINGLE_PROCESS,
    ):
        self.update, self.model, self.optimizer = update, update.model, update.optimizer
        self.peak_rate, self.schedule = peak_rate, schedule
        self.batches, self.validate, self.run, self.log, self.saver = batches, validate, run, log, saver
        self.fingerprint, self.settings, self.parallel, self._say = fingerprint, settings, parallel, say
        self.ahead = Prefetcher(batches, parallel.round_robin, pinned=self.model.embedding_VD.is_cuda)
        self.progress = Progress()
        self._interval = Interval()
        self._uncounted: Uncounted | None = None
        self._flops_per_token = flops_per_word(self.model)
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Take up the newest intact checkpoint, if there is one, and drop the metrics that came after it."""
        path = checkpoint.newest(self.run.checkpoints, self.parallel, self._say)
        if path is not None:
            state = checkpoint.load_state(path)
            if state["data"] != self.fingerprint:
                raise UserError(f"the data have changed since {self.run.folder} was begun: choose another name=...")
            checkpoint.load_model(path, self.model, verified=True)
            checkpoint.load_optimizer(path, self.model, self.optimizer, verified=True)
            self.progress = Progress(**state["progress"])
            self._interval = Interval(self.progress.interval)
        # A finished run that goes on to more words takes its last, partial interval up again.
        goes_on = bool(self.progress.interval) and self.progress.words < self.settings.num_words
        self.parallel.first(lambda: self.run.cut_metrics(self.progress.step, and_training_at_step=goes_on))
        return path is not None

    def train(self, asked_to_stop: Callable[[], bool] = bool) -> bool:
        """Train to the end and return True, or until a process is asked to stop and return False; saves either way."""
        self.model.train()
        self._saved_at = time.monotonic()
        stop = self.parallel.any(asked_to_stop())[0]
        try:
            with self._bar() as bar:
                while self.progress.words < self.settings.num_words and not stop:
                    self._step(bar)
                    due = time.monotonic() - self._saved_at >= self.settings.every_seconds
                    # The first process's clock counts: all of them must save together.
                    stop, due = self.parallel.any(asked_to_stop(), due and self.parallel.is_first)
                    if due:
                        self._save()
            self._save(wait=True)
        finally:
            error = self.saver.finish()
        must(error)
        return self.progress.words >= self.settings.num_words

    def flops(self) -> int:
        """Return the training FLOPs spent so far."""
        return self.progress.tokens * self._flops_per_token

    def _step(self, bar: tqdm) -> None:
        progress, started = self.progress, time.perf_counter()
        batch = self.ahead.step(progress.step)
        done = self.update(batch, progress.step, self.peak_rate * self.schedule(progress.step))
        progress.step += 1
        progress.words += batch.num_words
        progress.tokens += batch.num_tokens
        self._count()  # the one before, which is made by now: a GPU has this one to do while the host reads
        self._uncounted = Uncounted.of(done, progress.step, batch.num_words)
        if done.decision.is_here or self._says_something():
            self._count()
        self._interval.add(passed_words=batch.num_words)
        self._spend(time.perf_counter() - started)
        bar.update(batch.num_words)
        self._after_step(bar)

    def _spend(self, seconds: float) -> None:
        self.progress.seconds += seconds
        self._interval.add(seconds=seconds)

    def _says_something(self) -> bool:
        """Whether a line, a validation or the end comes after this step, for which all must be counted."""
        progress, settings = self.progress, self.settings
        every = settings.log_every, settings.valid_every
        return progress.words >= settings.num_words or any(progress.step % steps == 0 for steps in every)

    def _count(self) -> None:
        """Count the last update, if it is not yet counted."""
        done, self._uncounted = self._uncounted, None
        if done is not None and not done.count(self.progress, self._interval):
            self._say_skipped(done)

    def _say_skipped(self, done: Uncounted) -> None:
        progress, most = self.progress, self.settings.max_skipped
        self._say(f"WARNING: {done}")
        if progress.skipped_in_a_row >= most:
            self.saver.finish()  # what is being written counts too
            saved = self.parallel.first(lambda: checkpoint.steps(self.run.checkpoints))
            last = f"the last good checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{most} updates in a row had no finite loss and gradient, or a loss that exploded, up to step "
                f"{done.step}; {last}: lower optimizer.learning_rate and train under another name=..."
            )

    def _after_step(self, bar: tqdm) -> None:
        progress, settings = self.progress, self.settings
        if progress.step % settings.log_every == 0:
            self._write_line(bar)
            self._interval = Interval()
        elif progress.words >= settings.num_words:
            # A part of an interval; a longer run goes on with it and drops this line, see `resume`.
            self._write_line(bar)
        if progress.step % settings.valid_every == 0:
            self._validate(bar)

    def _write_line(self, bar: tqdm) -> None:
        sums = self._interval.sums()
        seconds, passed, skipped = (sums.pop(name, 0.0) for name in ("seconds", "passed_words", "skipped"))
        steps, words, nats = (sums.pop(name, 0.0) for name in ("steps", "words", "nats"))
        # Where every update was left out there is no loss to tell.
        means = {name: value / steps for name, value in sums.items()} if steps else {}
        loss = {"nats_per_word": nats / words} if steps else {}
        self.log.write(
            {
                **self._position(),
                "epoch": self.batches.epoch(self.progress.step),
                **loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "words_per_second": passed / max(seconds, 1e-9),
                **means,
                **({"skipped": int(skipped)} if skipped else {}),
            }
        )
        best = f" best valid ppl {self.progress.best['perplexity']:.1f}" if self.progress.best else ""
        # Sampled nats lie far below the true ones: only exact ones make a perplexity.
        exact = self.model.softmax.exact_in_training and steps
        now = f" ppl {math.exp(min(nats / words, 700)):.1f}" if exact else ""
        lost = f" dropped {means['dropped']:.1%}" if means.get("dropped") else ""
        bar.set_postfix_str(f"loss {nats / max(words, 1):.3f}{now}{lost}{best}", refresh=False)

    def _validate(self, bar: tqdm) -> None:
        measured = self.validate()
        if not math.isfinite(measured.perplexity):
            raise UserError(
                f"the validation perplexity is not finite at step {self.progress.step}: lower "
                "optimizer.learning_rate and train under another name=..."
            )
        self.log.write({**self._position(), "split": "valid", **measured.line()})
        bar.set_postfix_str(f"valid ppl {measured.perplexity:.1f}", refresh=False)
        best = self.progress.best
        if best is None or measured.perplexity < best["perplexity"]:
            self.progress.best = {"step": self.progress.step, "perplexity": measured.perplexity}
            self._save()

    def _position(self) -> dict[str, float]:
        progress = self.progress
        return {
            "step": progress.step,
            "words": progress.words,
            "flops": self.flops(),
            "seconds": progress.seconds,
        }

    def _save(self, wait: bool = False) -> None:
        if self._uncounted is not None:  # a GPU may still be at the update
            started = time.perf_counter()
            self._count()
            self._spend(time.perf_counter() - started)
        self.progress.interval = self._interval.sums()
        state = {"data": self.fingerprint, "progress": asdict(self.progress)}
        best = {int(self.progress.best["step"])} if self.progress.best else set()
        self.saver.save(self.progress.step, self.model, self.optimizer, state, best, wait=wait)
        self._saved_at = time.monotonic()

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.settings.num_words,
            initial=self.progress.words,
            desc=self.run.folder.name,
            unit="word",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 2,
            dynamic_ncols=True,
            disable=not self.parallel.is_first,
        )
