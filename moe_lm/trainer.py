"""The training loop: batches in, updates, metrics and checkpoints out."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from moe_lm import checkpoint
from moe_lm.batches import Batches, MicroBatch, derive_seed
from moe_lm.metrics import Interval, MetricsLog, balance_figures
from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel
from moe_lm.objective import Objective, Statistics, add, statistics
from moe_lm.operations import flops_per_word
from moe_lm.optimizer import Together
from moe_lm.perplexity import Measured
from moe_lm.progress import Progress, Settings
from moe_lm.run import Run


class Trainer:
    """Trains one model to `settings.num_words`; the same run continues where its last checkpoint stands."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        objective: Objective,
        optimizer: Together,
        peak_rate: float,
        clip_norm: float,
        schedule: Callable[[int], float],
        batches: Batches,
        validate: Callable[[], Measured],
        run: Run,
        log: MetricsLog,
        fingerprint: str,
        settings: Settings,
    ):
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.peak_rate, self.clip_norm, self.schedule = peak_rate, clip_norm, schedule
        self.batches, self.validate = batches, validate
        self.run, self.log, self.fingerprint, self.settings = run, log, fingerprint, settings
        self.progress = Progress()
        self.stop_requested = False
        self._interval = Interval()
        self._device = model.embedding_VD.device
        self._flops_per_token = flops_per_word(model)
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Take up the last checkpoint, if there is one, and drop the metrics that came after it."""
        steps = checkpoint.steps(self.run.checkpoints)
        if steps:
            path = checkpoint.path_of(self.run.checkpoints, steps[-1])
            state = checkpoint.load_state(path)
            if state["data"] != self.fingerprint:
                raise Mistake(f"the data have changed since {self.run.folder} was begun: choose another name=...")
            checkpoint.load_model(path, self.model)
            checkpoint.load_optimizer(path, self.model, self.optimizer)
            self.progress = Progress(**state["progress"])
            self._interval = Interval(self.progress.interval)
        # A finished run that goes on to more words takes its last, partial interval up again.
        goes_on = bool(self.progress.interval) and self.progress.words < self.settings.num_words
        self.run.cut_metrics(self.progress.step, and_training_at_step=goes_on)
        return bool(steps)

    def train(self) -> bool:
        """Train to the end and return True, or until `stop_requested` and return False; saves either way."""
        self.model.train()
        self._saved_at = time.monotonic()
        with self._bar() as bar:
            while self.progress.words < self.settings.num_words and not self.stop_requested:
                started = time.perf_counter()
                words = self.step()
                seconds = time.perf_counter() - started
                self.progress.seconds += seconds
                self._interval.add(seconds=seconds)
                bar.update(words)
                self._after_step(bar)
        self._save()
        return self.progress.words >= self.settings.num_words

    def flops(self) -> int:
        """Return the training FLOPs spent so far."""
        return self.progress.tokens * self._flops_per_token

    def step(self) -> int:
        """Make one update on the next batch and return its words."""
        progress, settings = self.progress, self.settings
        micro_batches = self.batches.step(progress.step)
        num_words = sum(batch.num_words for batch in micro_batches)
        everywhere = None
        if len(micro_batches) > 1 and settings.exact_balance and self.objective.balance:
            everywhere = self._collect(micro_batches)
        rate = self.peak_rate * self.schedule(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, seen = torch.zeros((), dtype=torch.float64, device=self._device), None
        asked = dropped = unserved = gated = 0
        terms: dict[str, Tensor | float] = {}
        # Of losses on global values every micro-batch has the same; of its own, each its share.
        shares = [1.0 / len(micro_batches) if everywhere else batch.num_words / num_words for batch in micro_batches]
        for i, batch in enumerate(micro_batches):
            with self._seeded(i):
                nats, gatings = self.model(batch.to(self._device), self._step_seed("negatives"))
            loss, values = self.objective(nats, num_words, gatings, everywhere, batch.num_words / num_words)
            loss.backward()
            terms = {name: terms.get(name, 0.0) + shares[i] * value for name, value in values.items()}
            total += nats.detach()
            seen = add(seen, statistics(gatings))
            asked += sum(gating.num_asked for gating in gatings.values())
            dropped += sum(gating.num_dropped for gating in gatings.values())
            gated += sum(gating.num_tokens for gating in gatings.values())
            unserved += sum(gating.num_unserved() for gating in gatings.values())
        norm = self.optimizer.clip(self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.adapt(seen)
        progress.step += 1
        progress.words += num_words
        progress.tokens += sum(len(batch.target_T) for batch in micro_batches)
        self._interval.add(steps=1, words=num_words, nats=total, grad_norm=norm)
        whole = [gating.with_statistics(seen[layer]) for layer, gating in gatings.items()]
        self._interval.add(**balance_figures(whole), **{f"balance_{name}": value for name, value in terms.items()})
        if gatings:
            self._interval.add(dropped=dropped / max(asked, 1), unserved=unserved / max(gated, 1))
        return num_words

    @torch.no_grad()
    def _collect(self, micro_batches: list[MicroBatch]) -> Statistics:
        """First pass of an accumulated batch: the gates' statistics of all its micro-batches."""
        total = None
        for i, batch in enumerate(micro_batches):
            with self._seeded(i):
                total = add(total, statistics(self.model.hidden(batch.to(self._device))[1]))
        return total

    @contextlib.contextmanager
    def _seeded(self, micro_batch: int):
        """Noise and dropout depend on seed, step and micro-batch alone, so both passes draw the same."""
        torch.manual_seed(self._step_seed(micro_batch))
        with torch.autocast(self._device.type, self.settings.autocast, enabled=self.settings.autocast is not None):
            yield

    def _step_seed(self, purpose: object) -> int:
        return derive_seed(self.settings.seed, self.progress.step, purpose)

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
        if time.monotonic() - self._saved_at >= settings.every_seconds:
            self._save()

    def _write_line(self, bar: tqdm) -> None:
        self._refuse_nonfinite()
        sums = self._interval.sums()
        steps, words, nats, seconds = (sums.pop(name) for name in ("steps", "words", "nats", "seconds"))
        self.log.write(
            {
                **self._position(),
                "epoch": self.batches.epoch(self.progress.step),
                "nats_per_word": nats / words,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "words_per_second": words / max(seconds, 1e-9),
                **{name: value / steps for name, value in sums.items()},
            }
        )
        best = f" best valid ppl {self.progress.best['perplexity']:.1f}" if self.progress.best else ""
        # Sampled nats lie far below the true ones: only exact ones make a perplexity.
        now = f" ppl {math.exp(min(nats / words, 700)):.1f}" if self.model.softmax.exact_in_training else ""
        lost = f" dropped {sums['dropped'] / steps:.1%}" if sums.get("dropped") else ""
        bar.set_postfix_str(f"loss {nats / words:.3f}{now}{lost}{best}", refresh=False)

    def _validate(self, bar: tqdm) -> None:
        measured = self.validate()
        if not math.isfinite(measured.perplexity):
            raise Mistake(
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

    def _save(self) -> None:
        self._refuse_nonfinite()
        self.progress.interval = self._interval.sums()
        state = {"data": self.fingerprint, "progress": asdict(self.progress)}
        checkpoint.save(self.run.checkpoints, self.progress.step, self.model, self.optimizer, state)
        best = {int(self.progress.best["step"])} if self.progress.best else set()
        checkpoint.prune(self.run.checkpoints, self.settings.keep_last, best)
        self._saved_at = time.monotonic()

    def _refuse_nonfinite(self) -> None:
        sums = self._interval.sums()
        if not math.isfinite(sums.get("nats", 0.0) + sums.get("grad_norm", 0.0)):
            raise Mistake(
                f"the loss or its gradient is not finite at step {self.progress.step}: lower "
                "optimizer.learning_rate and train under another name=..."
            )

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.settings.num_words,
            initial=self.progress.words,
            desc=self.run.folder.name,
            unit="word",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 2,
            dynamic_ncols=True,
        )
