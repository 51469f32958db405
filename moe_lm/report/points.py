"""Panels of test perplexity against a cost: a named point for each model, lines through models of one kind.

Axes are matplotlib's, handed in by `plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from moe_lm.report import RunRecord
from moe_lm.report.names import wrapped
from moe_lm.report.placement import Box, nearest, place_labels
from moe_lm.report.seeds import seed_groups
from moe_lm.report.ticks import set_log_axis, usable

# Blue, vermilion and green stay apart for every kind of colour blindness; the marker says it once more.
KINDS = {
    "dense": {"label": "dense", "color": "#d55e00", "marker": "s"},
    "flat": {"label": "mixture of experts", "color": "#0072b2", "marker": "o"},
    "hierarchical": {"label": "hierarchical mixture", "color": "#009e73", "marker": "D"},
}
PAPER = {"label": "the paper, printed", "color": "#7f7f7f"}
RISE = 1.2  # models are joined where each has, or costs, at least so many times as much as the one before
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
NAME_SIZE = 8
NAME_LETTERS = 30  # a longer name is broken into lines


@dataclass(frozen=True)
class Model:
    """One point: the mean over the seeds of a model, and the single runs behind it."""

    name: str
    kind: str
    parameters: float
    at: tuple[float, float]
    runs: tuple[tuple[float, float], ...]
    printed: tuple[float, float] | None
    """Where the paper's model of these sizes stands, None where it has none or cannot be compared."""


@dataclass(frozen=True)
class PointPanel:
    """Test perplexity against one entry of result.json, shown in units of 10^`exponent`."""

    key: str
    heading: str
    exponent: int | None = None  # None: chosen from the values
    printed: str | None = None  # the paper's figure that belongs to the key, in units of the panel

    def draw(self, axes, runs: Sequence[RunRecord]) -> dict:
        """Draw the points; return the legend's entries, none where no run has the figures."""
        models, exponent = self.models(runs)
        if not models:
            return {}
        unit = "M" if exponent == 6 else "×10" + str(exponent).translate(SUPERSCRIPT)
        axes.set_xlabel(f"{self.heading} ({unit})")
        axes.set_ylabel("test perplexity")
        shown = [point for model in models for point in (*model.runs, *filter(None, [model.printed]))]
        set_log_axis(axes.xaxis, [x for x, _ in shown], pad=0.14, least=1.15)
        set_log_axis(axes.yaxis, [y for _, y in shown], pad=0.14, least=1.04)
        for kind, line in lines(models).items():
            axes.plot(*zip(*line, strict=True), color=KINDS[kind]["color"], linewidth=1.2, alpha=0.6)
        legend = dict(draw_model(axes, model) for model in sorted(models, key=lambda m: list(KINDS).index(m.kind)))
        return legend | dict(draw_printed(axes, model) for model in models if model.printed)

    def label(self, axes, runs: Sequence[RunRecord]) -> None:
        """Write each model's name where nothing else is; call it when the layout is final."""
        models, _ = self.models(runs)
        texts = [write_name(axes, model) for model in models]
        scale = axes.figure.dpi / 72
        renderer = axes.figure.canvas.get_renderer()
        extents = [text.get_window_extent(renderer) for text in texts]
        sizes = [(extent.width / scale, extent.height / scale) for extent in extents]
        x0, y0, x1, y1 = (edge / scale for edge in axes.bbox.extents)
        boxes = place_labels(
            [on_paper(axes, model.at) for model in models],
            sizes,
            Box(x0 + 2, y0 + 2, x1 - 2, y1 - 2),
            [on_paper(axes, point) for model in models for point in (model.at, *model.runs)]
            + [on_paper(axes, model.printed) for model in models if model.printed],
            [pair for line in lines(models).values() for pair in pairwise(on_paper(axes, point) for point in line)],
        )
        for text, model, box in zip(texts, models, boxes, strict=True):
            put_name(axes, text, on_paper(axes, model.at), box)

    def models(self, runs: Sequence[RunRecord]) -> tuple[list[Model], int]:
        """The points to draw, and the exponent of the unit of their x."""
        groups = [(name, list(filter(self.has_figures, members))) for name, members in seed_groups(runs)]
        values = [run.result[self.key] for _, members in groups for run in members]
        exponent = self.exponent
        if exponent is None:
            exponent = 3 * math.floor(math.log10(max(values)) / 3) if values else 0
        return [self.model(name, members, 10.0**exponent) for name, members in groups if members], exponent

    def model(self, name: str, runs: Sequence[RunRecord], unit: float) -> Model:
        """One model's point from its runs, one for each seed."""
        points = tuple((run.result[self.key] / unit, run.perplexity("test")) for run in runs)
        mean = (fmean(x for x, _ in points), fmean(y for _, y in points))
        parameters = runs[0].result["parameters_without_embedding_and_softmax"]
        name = runs[0].name if len(runs) == 1 else name
        return Model(name, runs[0].kind, parameters, mean, points, self.printed_point(runs[0]))

    def printed_point(self, run: RunRecord) -> tuple[float, float] | None:
        """The paper's point beside a run of its sizes, None where it prints none or nothing can be compared."""
        row = run.paper.printed if run.paper and run.paper.comparable else None
        if row is None or self.printed is None or row.perplexity is None:
            return None
        return float(getattr(row, self.printed)), row.perplexity

    def has_figures(self, run: RunRecord) -> bool:
        """Whether a run can stand on logarithmic axes."""
        return usable(run.result[self.key]) and usable(run.perplexity("test"))


POINT_PANELS = {
    "perplexity_operations": PointPanel("operations_per_timestep", "operations per timestep", 6, "operations"),
    "perplexity_parameters": PointPanel(
        "parameters_without_embedding_and_softmax", "parameters without embedding and softmax", 6, "parameters"
    ),
    "perplexity_flops": PointPanel("flops", "training FLOPs"),
}


def lines(models: Sequence[Model]) -> dict[str, list[tuple[float, float]]]:
    """The points to join by kind: in order of parameters where these rise, else of cost; no line where neither does."""
    found = {}
    for kind in KINDS:
        mine = [model for model in models if model.kind == kind]
        for order in ([(model.parameters, model.at) for model in mine], [(model.at[0], model.at) for model in mine]):
            order.sort()
            if len(order) > 1 and all(b >= a * RISE for (a, _), (b, _) in pairwise(order)):
                found.setdefault(kind, [at for _, at in order])
    return found


def draw_printed(axes, model: Model) -> tuple:
    """Draw the paper's point, hollow, grey and larger than ours, which may cover it; return its legend entry."""
    style = {"markerfacecolor": "none", "markeredgecolor": PAPER["color"], "markeredgewidth": 1, "markersize": 10}
    (marker,) = axes.plot(*model.printed, marker=KINDS[model.kind]["marker"], linestyle="none", zorder=2, **style)
    return PAPER["label"], marker


def draw_model(axes, model: Model) -> tuple:
    """Draw one model's mean, and its single runs as dashes; return its kind and the marker drawn."""
    kind = KINDS[model.kind]
    if len(model.runs) > 1:
        x, y = zip(*model.runs, strict=True)
        axes.plot(x, y, color=kind["color"], linestyle="none", marker="_", markersize=14, markeredgewidth=1)
    (marker,) = axes.plot(
        *model.at,
        color=kind["color"],
        marker=kind["marker"],
        markersize=7.5,
        markeredgecolor=axes.get_facecolor(),
        markeredgewidth=0.8,
        linestyle="none",
        zorder=3,
    )
    return kind["label"], marker


def write_name(axes, model: Model):
    """A model's name as text not yet in its place, broken at commas as overridden names are long."""
    return axes.annotate(
        wrapped(model.name, NAME_LETTERS),
        model.at,
        xytext=(0, 0),
        textcoords="offset points",
        fontsize=NAME_SIZE,
        va="bottom",
        annotation_clip=False,
        parse_math=False,
        zorder=4,
        bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.6},  # fades lines behind
    )


def put_name(axes, text, point: tuple[float, float], box: Box | None) -> None:
    """Move a name to its box, tied to its point by a thin line if far; without a box it goes."""
    if box is None:
        text.remove()
        return
    text.set_position((box.left - point[0], box.bottom - point[1]))
    end = nearest(box, point)
    if math.dist(end, point) > 16:
        x, y = (axes.transData.inverted().transform([c * axes.figure.dpi / 72 for c in p]) for p in (point, end))
        axes.plot([x[0], y[0]], [x[1], y[1]], color=text.get_color(), linewidth=0.5, alpha=0.5, zorder=1)


def on_paper(axes, point: tuple[float, float]) -> tuple[float, float]:
    """A data point's place on the figure, in typographic points."""
    x, y = axes.transData.transform(point) * 72 / axes.figure.dpi
    return float(x), float(y)
