"""Training metrics: sums between two log lines, balance figures (Table 6), and the log that receives the lines."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from moe_lm.compat import current_metrics
from moe_lm.gate import Gating
from moe_lm.run import Run
from moe_lm.train.step import StepResult, max_over_mean
from moe_lm.train.wandb_logger import start_wandb


class Interval:
    """Sums of figures over the steps since the last log line; only reading them waits for the device."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self._sums: dict[str, Tensor | float] = current_metrics(dict(sums or {}))

    def add(self, **figures: Tensor | float) -> None:
        """Add one step's figures.

        A figure that earlier steps of the interval lack, as after resuming a checkpoint of an earlier version, is left
        out, because its mean over all steps would be wrong.
        """
        partial = "steps" in figures and self._sums.get("steps", 0) > 0
        for name, value in figures.items():
            if partial and name not in self._sums:
                continue
            if isinstance(value, Tensor):
                value = value.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + value

    def sums(self) -> dict[str, float]:
        """Return the sums as plain numbers, as a checkpoint stores them."""
        return {name: float(value) for name, value in self._sums.items()}


def step_figures(result: StepResult) -> dict[str, Tensor | float]:
    """Return a step's figures of balance and routing."""
    losses = {f"balance_{name}": value for name, value in result.balance.items()}
    return {**balance_figures(result.gatings.values()), **losses, **result.routing}


def balance_figures(gatings: Iterable[Gating]) -> dict[str, Tensor]:
    """Return CV(importance), CV(load) and max/mean load of the global batch, averaged over the gated layers."""
    rows = [
        torch.stack([_variation(gating.importance_E), _variation(gating.load_E), max_over_mean(gating.load_E)])
        for gating in gatings
    ]
    names = ("cv_importance", "cv_load", "max_over_mean_load")
    return dict(zip(names, torch.stack(rows).mean(dim=0), strict=True)) if rows else {}


def _variation(x_E: Tensor) -> Tensor:
    return x_E.std(correction=0) / (x_E.mean() + 1e-10)


class MetricsLog:
    """Writes metrics.jsonl and, if configured, the same lines to Weights & Biases; only the first process writes."""

    def __init__(self, run: Run, config: dict, *, writes: bool):
        self._run, self._writes = run, writes
        self._wandb = start_wandb(run.folder, config) if writes and config["logging"]["wandb"] else None

    def write(self, line: dict) -> None:
        """Append one line."""
        if not self._writes:
            return
        self._run.append_metrics(line)
        if self._wandb is not None:
            prefix = f"{line['split']}/" if "split" in line else "train/"
            numbers = {prefix + key: value for key, value in line.items() if isinstance(value, int | float)}
            self._wandb.log(numbers, step=line["step"])

    def cut(self, step: int, *, also_at_step: Collection[str | None]) -> None:
        """Drop the lines after this step, as `Run.cut_metrics` does."""
        self._run.cut_metrics(step, also_at_step=also_at_step)

    def close(self) -> None:
        """Finish Weights & Biases; raises `UserError` where a full disk still keeps lines out of metrics.jsonl."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._writes:
            self._run.finish_metrics()
