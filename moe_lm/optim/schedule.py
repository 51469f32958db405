"""Learning-rate schedules, which map an update to a factor of the peak rate."""


class Schedule:
    """Linear warm-up to the peak, a curve of a subclass after it, and a linear decay to zero at the end of training.

    The warm-up takes `warmup_steps` updates, or `max_warmup_fraction` of all updates if these are fewer. The final
    decay takes `decay_fraction` of all updates and multiplies the curve (the "cooldown" of Zhai et al. 2022,
    arXiv 2106.04560, section 3.5); with 0 there is none.
    """

    def __init__(self, *, warmup_steps: int, max_warmup_fraction: float | None = None, decay_fraction: float = 0.0):
        if warmup_steps < 1:
            raise ValueError(f"schedule.warmup_steps={warmup_steps}: must be at least 1")
        if max_warmup_fraction is not None and not 0 < max_warmup_fraction <= 1:
            raise ValueError(
                f"schedule.max_warmup_fraction={max_warmup_fraction}: must be above 0 and at most 1, or null"
            )
        if not 0 <= decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction={decay_fraction}: must be at least 0 and at most 1")
        self.warmup_steps, self.max_warmup_fraction = warmup_steps, max_warmup_fraction
        self.decay_fraction = decay_fraction

    @property
    def depends_on_length(self) -> bool:
        """Whether the factor of an update depends on the number of all updates."""
        return self.decay_fraction > 0 or self.max_warmup_fraction is not None

    def warmup(self, num_steps: int) -> int:
        """Return the number of warm-up updates in a training of `num_steps` updates."""
        if self.max_warmup_fraction is None:
            return self.warmup_steps
        return min(self.warmup_steps, max(1, round(self.max_warmup_fraction * num_steps)))

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor for the update number `step` + 1 of `num_steps`: 1 at the end of warm-up, never 0."""
        update, warmup = step + 1, self.warmup(num_steps)
        factor = min(update / warmup, self.after_warmup(update, warmup))
        if self.decay_fraction == 0:
            return factor
        remaining = max(1, num_steps - step)  # num_steps is an estimate: a training may take more
        return factor * min(1.0, remaining / (self.decay_fraction * num_steps))

    def after_warmup(self, update: int, warmup: int) -> float:
        """Return the factor of the peak rate at this update (from 1), which at `update` = `warmup` is 1."""
        raise NotImplementedError


class Constant(Schedule):
    """The peak rate from the end of warm-up to the final decay."""

    def after_warmup(self, update: int, warmup: int) -> float:  # noqa: ARG002
        """Return 1."""
        return 1.0


class InverseSquareRoot(Schedule):
    """After the warm-up proportional to update^-0.5 (Appendix C.1: warm-up of 1000 updates, no final decay)."""

    def after_warmup(self, update: int, warmup: int) -> float:
        """Return (warmup / update)^0.5."""
        return (warmup / update) ** 0.5
