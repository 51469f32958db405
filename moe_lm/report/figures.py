"""The figures of one run, and of several that differ only by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence

from moe_lm.report import RunRecord

BALANCE = ("cv_importance", "cv_load", "max_over_mean_load", "max_over_mean_tokens", "dropped", "unserved")
LAST_LINES = 5
"""Training lines at the end of a run over which the balance of the experts is averaged, as in Table 6."""

Figures = Mapping[str, float | str | None]


def run_figures(run: RunRecord) -> dict[str, float | None]:
    """The figures of one finished run: of result.json, by split, and of the experts' balance."""
    figures = {key: value for key, value in run.result.items() if isinstance(value, int | float)}
    figures |= {key: last_mean(run, key) for key in BALANCE}
    if run.audit:
        causal, by_training = run.audit["by_evaluation"], run.audit["by_training"]
        figures |= {f"audited_{key}": value for key, value in causal.items()}
        figures["perplexity_shift"] = by_training["perplexity"] / causal["perplexity"]
        figures["leak_bits"] = run.audit["training"]["mean_bits"]
        figures["leak_of_later_words_bits"] = run.audit["later_words"]["mean_bits"]
    return figures | {f"{split}_perplexity": run.perplexity(split) for split in ("test", "valid")}


def last_mean(run: RunRecord, key: str) -> float | None:
    """The mean of a figure over the last training lines that have it, None where none has."""
    values = [line[key] for line in run.metrics if key in line][-LAST_LINES:]
    return statistics.fmean(values) if values else None


def mean_figures(runs: Sequence[RunRecord]) -> Figures:
    """The mean of each figure over runs; None where one lacks it or has no finite one."""
    samples = [run_figures(run) for run in runs]
    return {key: statistics.fmean(values) if known(values) else None for key, values in columns(samples)}


def deviations(runs: Sequence[RunRecord]) -> Figures:
    """The sample standard deviation (n - 1) of each figure over several runs."""
    samples = [run_figures(run) for run in runs]
    return {key: statistics.stdev(values) if known(values) else None for key, values in columns(samples)}


def columns(samples: Sequence[Figures]) -> list[tuple[str, list[float | None]]]:
    """Each figure of the first sample with its values in all of them."""
    return [(key, [sample.get(key) for sample in samples]) for key in samples[0]]


def known(values: Sequence[float | None]) -> bool:
    """Whether every value is a finite number."""
    return all(value is not None and math.isfinite(value) for value in values)
