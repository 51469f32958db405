"""Training metrics: sums between two log lines, balance figures (Table 6), and where the lines go."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moe_lm.gate import Gating
from moe_lm.run import Run
from moe_lm.train.wandb_logger import start_wandb


class Interval:
    """Sums of figures over the steps since the last log line; no wait for the device until they are read."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self._sums: dict[str, Tensor | float] = dict(sums or {})

    def add(self, **figures: Tensor | float) -> None:
        """Add one step's figures; none that steps before it lacked, as in a checkpoint of an earlier version.

        The mean over all steps would be wrong.
        """
        late = "steps" in figures and self._sums.get("steps", 0) > 0
        for name, value in figures.items():
            if late and name not in self._sums:
                continue
            if isinstance(value, Tensor):
                value = value.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + value

    def sums(self) -> dict[str, float]:
        """Return the sums as plain numbers: what a checkpoint stores and another interval starts from."""
        return {name: float(value) for name, value in self._sums.items()}


def balance_figures(gatings: Iterable[Gating]) -> dict[str, Tensor]:
    """Return CV(importance), CV(load) and max/mean load of the global batch, averaged over the gated layers."""
    rows = [
        torch.stack([_variation(gating.importance_E), _variation(gating.load_E), peak(gating.load_E)])
        for gating in gatings
    ]
    names = ("cv_importance", "cv_load", "max_over_mean_load")
    return dict(zip(names, torch.stack(rows).mean(dim=0), strict=True)) if rows else {}


def _variation(x_E: Tensor) -> Tensor:
    return x_E.std(correction=0) / (x_E.mean() + 1e-10)


def peak(x_E: Tensor) -> Tensor:
    """Return the largest over the mean."""
    return x_E.max() / (x_E.mean() + 1e-10)


class MetricsLog:
    """metrics.jsonl, the truth, and Weights & Biases as a view of it where asked for."""

    def __init__(self, run: Run, *, wandb: bool, config: dict):
        self._run = run
        self._wandb = start_wandb(run.folder, config) if wandb else None

    def write(self, line: dict) -> None:
        """Append one line."""
        self._run.append_metrics(line)
        if self._wandb is not None:
            prefix = f"{line['split']}/" if "split" in line else "train/"
            numbers = {prefix + key: value for key, value in line.items() if isinstance(value, int | float)}
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Let Weights & Biases finish; raises `UserError` where a full disk still keeps lines out of metrics.jsonl."""
        if self._wandb is not None:
            self._wandb.finish()
        self._run.finish_metrics()


class NoLog:
    """The log of a process that writes none."""

    def write(self, line: dict) -> None:
        """Forget the line."""

    def close(self) -> None:
        """Do nothing."""
