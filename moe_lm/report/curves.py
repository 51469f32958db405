"""Panels of figures against training words: a line for each run.

Axes are matplotlib's, handed in by `plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lm.report import RunRecord
from moe_lm.report.ticks import set_log_axis, usable

# Okabe and Ito's colours without yellow and black, which fail on a light or a dark page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#7f7f7f")
# By is_moe, one for each time the colours are used up.
DASHES = {
    True: ("-", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1))),
    False: ((0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1.5))),
}
LOG_FROM = 20  # an axis whose values spread by more than this is logarithmic


@dataclass(frozen=True)
class CurvePanel:
    """One figure of the training lines, or of the validation lines if `split` is given."""

    key: str
    heading: str
    split: str | None = None
    from_zero: bool = False

    def draw(self, axes, runs: Sequence[RunRecord]) -> dict:
        """Draw a line a run; return the legend's entries, none where no run has the figure."""
        curves = {run.name: (run, self.curve(run)) for run in legend_order(runs)}
        curves = {name: (run, curve) for name, (run, curve) in curves.items() if curve}
        if not curves:
            return {}
        axes.set(xlabel="training words (M)", ylabel=self.heading)
        set_log_axis(axes.xaxis, [x for _, curve in curves.values() for x, _ in curve], pad=0.04, least=1.02)
        entries = {}
        for name, (run, curve) in curves.items():
            style = line_style(runs.index(run), run.is_moe)
            marked = self.split or len(curve) == 1
            style |= {"marker": "o", "markersize": 3.5, "linewidth": 1.4} if marked else {"linewidth": 0.9}
            (line,) = axes.plot(*zip(*curve, strict=True), **style)
            entries[name if run.result else f"{name} (unfinished)"] = line
        self.scale_y(axes, [y for _, curve in curves.values() for _, y in curve])
        return entries

    def label(self, axes, runs: Sequence[RunRecord]) -> None:
        """Nothing: the legend names the lines."""

    def curve(self, run: RunRecord) -> list[tuple[float, float]]:
        """The run's points in millions of words; what diverged has no place on an axis."""
        lines = run.metrics
        if self.split:
            lines = [line for line in run.evaluations if line["split"] == self.split]
        points = [(line["words"] / 1e6, line.get(self.key)) for line in lines]
        return [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]

    def scale_y(self, axes, values: Sequence[float]) -> None:
        """Logarithmic for perplexity and for what spreads widely, else linear."""
        if all(map(usable, values)) and (self.split or max(values) / min(values) > LOG_FROM):
            set_log_axis(axes.yaxis, values, pad=0.04, least=1.02)
        elif self.from_zero:
            axes.set_ylim(bottom=0)


CURVE_PANELS = {
    "training": CurvePanel("nats_per_word", "training loss (nats a word)"),
    "validation": CurvePanel("perplexity", "validation perplexity", split="valid"),
}
BALANCE_PANELS = {
    "cv_importance": CurvePanel("cv_importance", "CV of importance", from_zero=True),
    "cv_load": CurvePanel("cv_load", "CV of load", from_zero=True),
    "max_over_mean_load": CurvePanel("max_over_mean_load", "largest load / mean load", from_zero=True),
    "max_over_mean_tokens": CurvePanel("max_over_mean_tokens", "most tokens / mean tokens", from_zero=True),
}


def line_style(index: int, is_moe: bool) -> dict:
    """The look of the run at a place in the table: the same in every panel; dense models are dashed."""
    dashes = DASHES[is_moe]
    cycle = index // len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes[cycle % len(dashes)]}


def legend_order(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs from the worst last validation perplexity to the best, as their lines end from top to bottom."""

    def last(run: RunRecord) -> float:
        values = [line["perplexity"] for line in run.evaluations if line["split"] == "valid"]
        return values[-1] if values and math.isfinite(values[-1]) else math.inf

    return sorted(runs, key=last, reverse=True)
