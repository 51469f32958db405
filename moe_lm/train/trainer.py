"""The training loop: batches in, updates, metrics and checkpoints out; the same in one process or many."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from moe_lm.analysis.perplexity import EvalResult
from moe_lm.checkpoint.saver import Saver
from moe_lm.data.batching import Prefetcher
from moe_lm.errors import UserError
from moe_lm.train.metrics import Interval, MetricsLog, step_figures
from moe_lm.train.step import StepResult, TrainStep

_TIMED_STEPS = 10
"""Steps of this process from which the remaining time is estimated."""


@dataclass(frozen=True)
class Settings:
    """Settings of the loop itself."""

    num_words: int
    """Number of predicted words; training ends with the step that reaches it."""
    log_every: int
    """Steps between two lines of metrics.jsonl."""
    valid_every: int | None
    """Steps between two validations, besides the one at the end; None: a tenth of all steps, at most 500."""
    every_seconds: float
    """Seconds between two checkpoints."""
    max_skipped_steps: int
    """Skipped steps in a row after which training ends."""

    def __post_init__(self):
        for key in ("num_words", "log_every", "valid_every", "max_skipped_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"training.{key}={getattr(self, key)}: must be at least 1")
        if not self.every_seconds >= 0:
            raise UserError(f"checkpoint.every_seconds={self.every_seconds}: must be at least 0")


@dataclass
class Progress:
    """How far training is; together with model and optimizer, this is all that a resumed run needs."""

    step: int = 0
    words: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps without an update, because loss or gradient was not finite or the loss exploded."""
    skipped_in_a_row: int = 0
    interval: dict[str, float] = field(default_factory=dict)
    """Sums since the last log line."""
    best: dict[str, float] | None = None
    """Step and perplexity of the best validation so far."""
    before_end: dict[str, dict[str, float] | None] | None = None
    """`best` before the validation at the end of the training; None if no validation was made only for the end."""


class Trainer:
    """Trains one model to `settings.num_words`; a run continues from its last checkpoint."""

    def __init__(
        self,
        *,
        train_step: TrainStep,
        peak_rate: float,
        schedule: Callable[[int, int], float],
        num_steps: int,
        prefetcher: Prefetcher,
        validate: Callable[[], EvalResult],
        metrics: MetricsLog,
        saver: Saver,
        fingerprint: str,
        settings: Settings,
        flops_per_token: int,
        log: Callable[[str], None],
    ):
        self.train_step, self.model, self.optimizer = train_step, train_step.model, train_step.optimizer
        self.parallel = train_step.parallel
        self.peak_rate, self.schedule, self.prefetcher, self.validate = peak_rate, schedule, prefetcher, validate
        self.metrics, self.saver, self.fingerprint, self.settings = metrics, saver, fingerprint, settings
        self.progress = Progress()
        self._log, self._interval, self._flops_per_token = log, Interval(), flops_per_token
        self._num_steps = num_steps
        self._valid_every = settings.valid_every or min(500, -(-num_steps // 10))
        self._saved_at = time.monotonic()
        self._timed: list[tuple[int, float]] = []

    def resume(self) -> bool:
        """Load the newest intact checkpoint, if there is one, and drop the metrics that came after it."""
        state = self.saver.load_newest(self.model, self.optimizer, self.fingerprint)
        if state is not None:
            self.progress = Progress(**state["progress"])
            self._interval = Interval(self.progress.interval)
        lines = self._undo_end() if self.progress.words < self.settings.num_words else []
        self.parallel.first(lambda: self.metrics.cut(self.progress.step, also_at_step=lines))
        return state is not None

    def _undo_end(self) -> list[str | None]:
        """Undo what was done only because the run ended here; return the splits of the metrics lines to drop.

        These are the training line of a partial interval, which is continued, and a validation outside the schedule.
        """
        lines: list[str | None] = [None] if self.progress.interval else []
        if self.progress.before_end is not None:
            self.progress.best, self.progress.before_end = self.progress.before_end["best"], None
            lines.append("valid")
        return lines

    def train(self, asked_to_stop: Callable[[], bool] = bool) -> bool:
        """Train to the end and return True, or until a process is asked to stop and return False; saves either way."""
        self.model.train()
        self._saved_at = time.monotonic()
        stop = self.parallel.any(asked_to_stop())[0]
        try:
            with self._progress_bar() as bar:
                while self.progress.words < self.settings.num_words and not stop:
                    self._step(bar)
                    due = time.monotonic() - self._saved_at >= self.settings.every_seconds
                    # The first process's clock decides, because all processes save together.
                    stop, due = self.parallel.any(asked_to_stop(), due and self.parallel.is_first)
                    if due:
                        self._save()
            if not stop and 0 < self.progress.step == self.progress.skipped:
                self._give_up()  # the weights are the initial ones
            self._save(wait=True)
        finally:
            error = self.saver.finish()
        if error is not None:
            raise UserError(f"{error}: earlier checkpoints are untouched; make room and repeat the command")
        return self.progress.words >= self.settings.num_words

    def _log_remaining_time(self, bar: tqdm) -> None:
        """Log how long the rest of the training takes at the speed of the timed steps, if it is more than a minute."""
        words, seconds = map(sum, zip(*self._timed[1:], strict=True))  # the first step takes longer
        speed = words / seconds
        minutes = (self.settings.num_words - self.progress.words) / speed / 60
        if minutes > 1:
            left = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
            bar.clear()
            self._log(f"about {left} left at {speed:,.0f} words/s")

    def flops(self) -> int:
        """Return the training FLOPs spent so far."""
        return self.progress.tokens * self._flops_per_token

    def _step(self, bar: tqdm) -> None:
        progress, started = self.progress, time.perf_counter()
        batch = self.prefetcher.step(progress.step)
        done = min(progress.step, self._num_steps - 1) / self._num_steps  # the number of steps is an estimate
        result = self.train_step(batch, progress.step, self.learning_rate(progress.step), done)
        progress.step += 1
        progress.words += batch.num_words
        progress.tokens += batch.num_tokens
        self._count(result, batch.num_words)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        self._interval.add(passed_words=batch.num_words)
        self._interval.add(seconds=seconds)
        if len(self._timed) < _TIMED_STEPS:
            self._timed.append((batch.num_words, seconds))
            if len(self._timed) == _TIMED_STEPS:
                self._log_remaining_time(bar)
        bar.update(batch.num_words)
        self._after_step(bar)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after `step` steps."""
        return self.peak_rate * self.schedule(step, self._num_steps)

    def _count(self, result: StepResult, num_words: int) -> None:
        """Add a step's figures to the interval; a skipped step only counts as skipped."""
        progress = self.progress
        if result.updated:
            progress.skipped_in_a_row = 0
            figures = {"nats": result.nats, "grad_norm": result.grad_norm, **step_figures(result)}
            self._interval.add(steps=1, words=num_words, **figures)
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._interval.add(skipped=1)
        loss, norm = float(result.nats) / num_words, float(result.grad_norm)
        self._log(f"WARNING: step {progress.step} was left out: loss {loss:.4g}, gradient norm {norm:.4g}")
        if progress.skipped_in_a_row >= self.settings.max_skipped_steps:
            self._give_up()

    def _give_up(self) -> None:
        self.saver.finish()  # a checkpoint that is being written counts too
        saved = self.parallel.first(self.saver.steps)
        last = f"the last good checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint yet"
        raise UserError(
            f"{self.progress.skipped_in_a_row} updates in a row had no finite loss and gradient, or a loss that "
            f"exploded, up to step {self.progress.step}; {last}: lower optimizer.learning_rate and train under another "
            "name=..."
        )

    def _after_step(self, bar: tqdm) -> None:
        progress, settings = self.progress, self.settings
        if progress.step % settings.log_every == 0:
            self._write_line(bar)
            self._interval = Interval()
        elif progress.words >= settings.num_words:
            # The line of a partial interval; a longer run replaces it, see `resume`.
            self._write_line(bar)
        scheduled = progress.step % self._valid_every == 0
        if progress.words >= settings.num_words and not scheduled:
            progress.before_end = {"best": progress.best}
        if scheduled or progress.before_end is not None:
            self._validate(bar)

    def _write_line(self, bar: tqdm) -> None:
        sums = self._interval.sums()
        seconds, passed, skipped = (sums.pop(name, 0.0) for name in ("seconds", "passed_words", "skipped"))
        steps, words, nats = (sums.pop(name, 0.0) for name in ("steps", "words", "nats"))
        # An interval of skipped steps alone has no loss.
        means = {name: value / steps for name, value in sums.items()} if steps else {}
        loss = {"nats_per_word": nats / words} if steps else {}
        self.metrics.write(
            {
                **self._position(),
                "epoch": self.prefetcher.epoch(self.progress.step),
                **loss,
                "learning_rate": self.learning_rate(self.progress.step - 1),
                "words_per_second": passed / max(seconds, 1e-9),
                **means,
                **({"skipped": int(skipped)} if skipped else {}),
            }
        )
        best = f" best valid ppl {self.progress.best['perplexity']:.1f}" if self.progress.best else ""
        # Sampled nats are far below exact nats, and only exact nats give a perplexity.
        exact = self.model.softmax.exact_in_training and steps
        now = f" ppl {math.exp(min(nats / words, 700)):.1f}" if exact else ""
        dropped = f" dropped {means['dropped_fraction']:.1%}" if means.get("dropped_fraction") else ""
        bar.set_postfix_str(f"loss {nats / max(words, 1):.3f}{now}{dropped}{best}", refresh=False)

    def _validate(self, bar: tqdm) -> None:
        with self.optimizer.averaged_weights():
            measured = self.validate()
        if not math.isfinite(measured.perplexity):
            raise UserError(
                f"the validation perplexity is not finite at step {self.progress.step}: lower "
                "optimizer.learning_rate and train under another name=..."
            )
        self.metrics.write({**self._position(), "split": "valid", **measured.metrics()})
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
        self.progress.interval = self._interval.sums()
        state = {"data": self.fingerprint, "progress": asdict(self.progress)}
        kept = (self.progress.best, (self.progress.before_end or {}).get("best"))
        best = {int(found["step"]) for found in kept if found}
        with self.optimizer.averaged_weights():
            self.saver.save(self.progress.step, self.model, self.optimizer, state, best, wait=wait)
        self._saved_at = time.monotonic()

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.settings.num_words,
            initial=self.progress.words,
            desc=self.saver.run_folder.name,
            unit="word",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 2,
            dynamic_ncols=True,
            disable=not self.parallel.is_first,
        )
