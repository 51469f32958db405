"""What a training loop decides by, and how far it is."""

from dataclasses import dataclass, field

from moe_lm.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the loop itself decides by."""

    num_words: int
    """Training ends with the step that reaches this many predicted words."""
    log_every: int
    """Steps between two lines of metrics.jsonl."""
    valid_every: int
    """Steps between two validations."""
    every_seconds: float
    """Seconds between two checkpoints."""
    max_skipped: int
    """Training ends where as many updates in a row had to be left out."""

    def __post_init__(self):
        for key in ("num_words", "log_every", "valid_every", "max_skipped"):
            if getattr(self, key) < 1:
                raise UserError(f"training.{key}={getattr(self, key)}: must be at least 1")
        if not self.every_seconds >= 0:
            raise UserError(f"checkpoint.every_seconds={self.every_seconds}: must be at least 0")


@dataclass
class Progress:
    """How far training is: together with model and optimizer, all that a resumed run needs."""

    step: int = 0
    words: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Updates left out, because loss or gradient was not finite or the loss exploded."""
    skipped_in_a_row: int = 0
    interval: dict[str, float] = field(default_factory=dict)
    """Sums since the last log line."""
    best: dict[str, float] | None = None
    """Step and perplexity of the best validation so far."""
