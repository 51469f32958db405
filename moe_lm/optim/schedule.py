"""Learning-rate schedules, which map a step to a factor of the peak rate."""


class InverseSquareRoot:
    """Linear warm-up, then proportional to step^-0.5 (Appendix C.1: warm-up of 1000 steps)."""

    def __init__(self, *, warmup_steps: int):
        if warmup_steps < 1:
            raise ValueError(f"schedule.warmup_steps={warmup_steps}: must be at least 1")
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """Return the factor for the update number `step` + 1; 1 at the end of warm-up."""
        update = step + 1
        return min(update / self.warmup_steps, (self.warmup_steps / update) ** 0.5)
