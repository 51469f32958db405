"""What an update saw, until it is known whether it was made: a GPU may still be at it."""

from dataclasses import dataclass

from torch import Tensor

from moe_lm.train.later import Later
from moe_lm.train.metrics import Interval, balance_figures
from moe_lm.train.progress import Progress
from moe_lm.train.step import StepResult


@dataclass(frozen=True)
class Uncounted:
    """An update's figures, and none of its large tensors."""

    step: int
    num_words: int
    decision: Later
    nats: Tensor
    norm: Tensor
    figures: dict[str, Tensor]
    """Of balance and of assignments."""

    @classmethod
    def of(cls, done: StepResult, step: int, num_words: int) -> "Uncounted":
        """Take them of the step of this number."""
        terms = {f"balance_{name}": value for name, value in done.terms.items()}
        figures = {**balance_figures(done.gatings.values()), **terms, **done.shares}
        return cls(step, num_words, done.decision, done.nats, done.norm, figures)

    def count(self, progress: Progress, interval: Interval) -> bool:
        """Add them to the interval's sums, of an update that was left out only that it was; return whether it was made.

        The host waits for the decision.
        """
        if not self.decision.read():
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            interval.add(skipped=1)
            return False
        progress.skipped_in_a_row = 0
        interval.add(steps=1, words=self.num_words, nats=self.nats, grad_norm=self.norm, **self.figures)
        return True

    def __str__(self) -> str:
        found = f"loss {float(self.nats) / self.num_words:.4g}, gradient norm {float(self.norm):.4g}"
        return f"step {self.step} was left out: {found}"
