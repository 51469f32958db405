"""Plots of a report as PNG and SVG: perplexity against cost, training curves, expert balance.

A run has one colour on the whole page; markers and dashes show its kind, and a legend names it.
"""

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_lm.report import RunRecord
from moe_lm.report.axes import positive, set_log_axis
from moe_lm.report.runs import seed_groups
from moe_lm.report.scaling import dense_perplexities, families

INK, GRID, PAPER = "#1f2328", "#d8dee4", "#ffffff"  # the page replaces these by its theme's colours
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
STYLE = {
    **dict.fromkeys(INKED, INK),
    "svg.hashsalt": "moe-lm",  # without it the identifiers of an SVG change from run to run
    "font.size": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
PANEL_WIDTH, PANEL_HEIGHT = 4.0, 3.1  # inches; small, so that letters stay readable on a phone
LEGEND_LETTERS = 62  # letters in a row of the legend below one panel
HANDLE_LETTERS = 7  # width of a legend handle with its gaps, in letters
NAME_LETTERS = 46  # longer names are broken into lines
RESOLUTION = 160  # dots per inch of a PNG
# Okabe and Ito's colours without yellow and black, which are hard to see on a light or a dark page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#7f7f7f")
MARKERS = {"dense": "s", "flat": "o", "hierarchical": "D"}
# Fills and dashes tell apart runs with the same colour: one for each round through the colours.
FILLS = ("full", "left", "bottom")
DASHES = {
    True: ("-", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1))),
    False: ((0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1.5))),
}
HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1, "markersize": 11, "linestyle": "none"}
LOG_RATIO = 20  # the y axis of a curve is logarithmic where the ratio of its values is larger
RISE = 1.2  # a line joins models where each costs at least this many times as much as the one before

OPERATIONS, PARAMETERS = "operations_per_timestep", "parameters_without_embedding_and_softmax"

Legend = dict[str, Line2D]
Point = tuple[float, float]


@dataclass(frozen=True)
class Model:
    """A model in a scatter plot: a point for each seed, and their mean."""

    name: str
    index: int
    """Place of the first run in the list of runs, which chooses the colour."""
    kind: str
    parameters: float
    seeds: tuple[Point, ...]
    mean: Point
    paper: Point | None
    """The paper's result for this model, None where it has none or cannot be compared."""


@dataclass(frozen=True)
class ScatterPanel:
    """Test perplexity against one entry of result.json, divided by `unit`."""

    key: str
    label: str
    unit: float
    paper_key: str | None = None  # the paper's figure for the key, in the panel's unit

    def draw(self, axes: Axes, runs: Sequence[RunRecord]) -> Legend:
        """Draw the models and return their legend, empty where no run has the figures."""
        models = self.models(runs)
        if not models:
            return {}
        axes.set(xlabel=self.label, ylabel="test perplexity")
        papers = [model.paper for model in models if model.paper]
        xs, ys = zip(*papers, *(seed for model in models for seed in model.seeds), strict=True)
        set_log_axis(axes.xaxis, xs, pad=0.1, least=1.15)
        set_log_axis(axes.yaxis, ys, pad=0.1, least=1.04)
        for line in joined(models):
            axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, alpha=0.4, zorder=1)
        legend = {model.name: draw_model(axes, model) for model in models}
        return legend | ({"result of the paper": Line2D([], [], color=INK, marker="o", **HOLLOW)} if papers else {})

    def models(self, runs: Sequence[RunRecord]) -> list[Model]:
        """Return the models whose figures have a place on logarithmic axes."""
        models = []
        for name, members in seed_groups(runs):
            members = [run for run in members if positive(run.result[self.key]) and positive(run.perplexity("test"))]
            if members:
                first = members[0]
                seeds = tuple((run.result[self.key] / self.unit, run.perplexity("test")) for run in members)
                mean = (fmean(x for x, _ in seeds), fmean(y for _, y in seeds))
                name = first.name if len(members) == 1 else name
                look = (runs.index(first), first.kind)
                models.append(Model(name, *look, first.result[PARAMETERS], seeds, mean, self.paper_point(first)))
        return models

    def paper_point(self, run: RunRecord) -> Point | None:
        """Return the paper's result for a run at the paper's sizes, None where there is none."""
        if not (run.paper and run.paper.comparable and run.paper.result.perplexity and self.paper_key):
            return None
        return float(getattr(run.paper.result, self.paper_key)), run.paper.result.perplexity


@dataclass(frozen=True)
class CurvePanel:
    """A metric of the training lines, or of the validation lines if `split` is given, against training words."""

    key: str
    label: str
    split: str | None = None
    from_zero: bool = False

    def draw(self, axes: Axes, runs: Sequence[RunRecord]) -> Legend:
        """Draw a line for each run and return their legend, empty where no run has the metric."""
        curves = [(index, run, curve) for index, run in enumerate(runs) if (curve := self.curve(run))]
        if not curves:
            return {}
        axes.set(xlabel="training words (M)", ylabel=self.label)
        legend = {}
        for index, run, curve in curves:
            dashes = DASHES[run.is_moe]
            dash = dashes[index // len(COLOURS) % len(dashes)]
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "linewidth": 0.9}
            if self.split or len(curve) == 1:
                style |= {"marker": "o", "markersize": 3.5, "linewidth": 1.4}
            (line,) = axes.plot(*zip(*curve, strict=True), **style)
            legend[run.name if run.result else f"{run.name} (unfinished)"] = line
        words, values = zip(*(point for _, _, curve in curves for point in curve), strict=True)
        set_log_axis(axes.xaxis, words, pad=0.04, least=1.02)
        if all(map(positive, values)) and (self.split or max(values) / min(values) > LOG_RATIO):
            set_log_axis(axes.yaxis, values, pad=0.04, least=1.02)
        elif self.from_zero:
            axes.set_ylim(bottom=0)
        return legend

    def curve(self, run: RunRecord) -> list[Point]:
        """Return the run's finite values over millions of words."""
        lines = [line for line in run.evaluations if line["split"] == self.split] if self.split else run.metrics
        points = [(line["words"] / 1e6, line.get(self.key)) for line in lines]
        return [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class ExpertsPanel:
    """Test perplexity against the number of experts, with fitted laws, and dense models as horizontal lines."""

    def draw(self, axes: Axes, runs: Sequence[RunRecord]) -> Legend:
        """Draw families of mixtures and return their legend, empty where none has three numbers of experts."""
        found = families(runs)
        if not found:
            return {}
        axes.set(xlabel="experts", ylabel="test perplexity")
        legend = {}
        for family, colour in zip(found, cycle(COLOURS)):
            (legend[family.label],) = axes.plot(*zip(*family.points, strict=True), color=colour, marker="o", ls="none")
            if law := family.law():
                xs = [family.points[0][0] * 2 ** (step / 8) for step in range(8 * family.doublings + 1)]
                (legend[f"perplexity = {law}"],) = axes.plot(xs, [law(x) for x in xs], color=colour, linewidth=1)
        levels = dense_perplexities(runs)
        for (name, level), dash in zip(levels.items(), cycle(DASHES[False])):
            legend[name] = axes.axhline(level, color=INK, alpha=0.5, linewidth=1, linestyle=dash)
        xs, ys = zip(*(point for family in found for point in family.points), strict=True)
        set_log_axis(axes.xaxis, xs, pad=0.05, least=1.15)
        set_log_axis(axes.yaxis, [*ys, *levels.values()], pad=0.1, least=1.02)
        return legend


Panel = ScatterPanel | CurvePanel | ExpertsPanel
GROUPS: Mapping[str, Mapping[str, Panel]] = {
    "perplexity": {
        "perplexity_operations": ScatterPanel(OPERATIONS, "operations per timestep (M)", 1e6, "operations"),
        "perplexity_parameters": ScatterPanel(PARAMETERS, "parameters w/o embedding, softmax (M)", 1e6, "parameters"),
        "perplexity_flops": ScatterPanel("flops", "training FLOPs", 1.0),
    },
    "experts": {"perplexity_experts": ExpertsPanel()},
    "curves": {
        "training": CurvePanel("nats_per_word", "training loss (nats per word)"),
        "validation": CurvePanel("perplexity", "validation perplexity", split="valid"),
    },
    "balance": {
        "cv_importance": CurvePanel("cv_importance", "CV of importance", from_zero=True),
        "cv_load": CurvePanel("cv_load", "CV of load", from_zero=True),
        "max_over_mean_load": CurvePanel("max_over_mean_load", "largest load / mean load", from_zero=True),
        "max_over_mean_tokens": CurvePanel("max_over_mean_tokens", "most tokens / mean tokens", from_zero=True),
    },
}
NAMES = tuple(name for group, panels in GROUPS.items() for name in (group, *panels))


def draw_plots(runs: Sequence[RunRecord]) -> dict[str, dict[str, bytes]]:
    """Draw every plot that the runs have figures for and return its bytes by name and format (png, svg)."""
    with fixed_style():
        return {name: encode(figure) for name, figure in draw_figures(runs)}


@contextmanager
def fixed_style() -> Iterator[None]:
    """Replace the user's matplotlib settings by this module's style, and restore them afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw_figures(runs: Sequence[RunRecord]) -> Iterator[tuple[str, Figure]]:
    """Yield each group of panels as one figure, and each panel as a figure of its own."""
    for group, panels in GROUPS.items():
        drawn = {name: figure for name, panel in panels.items() if (figure := draw_figure([panel], runs))}
        if drawn:
            yield group, draw_figure([panels[name] for name in drawn], runs)
            yield from drawn.items()


def draw_figure(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> Figure | None:
    """Draw panels side by side above one legend; None where they have nothing to show."""
    figure = Figure(figsize=(PANEL_WIDTH * len(panels), PANEL_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    legend: Legend = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        legend |= panel.draw(axes, runs)
    if not legend:
        return None
    add_legend(figure, legend, len(panels))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure


def add_legend(figure: Figure, entries: Legend, num_panels: int) -> None:
    """Add a legend below the axes and make the figure taller by its height."""
    names = [wrapped(name, NAME_LETTERS) for name in entries]
    longest = max((len(line) for name in names for line in name.splitlines()), default=0)
    columns = min(len(names), max(1, num_panels * LEGEND_LETTERS // (HANDLE_LETTERS + longest)))
    legend = figure.legend(entries.values(), ["x"] * len(names), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards: matplotlib would read $ as mathematics and hide names that begin with _.
        text.set_parse_math(False)
        text.set_text(name)
    figure.set_figheight(PANEL_HEIGHT + legend.get_window_extent().height / figure.dpi)


def wrapped(name: str, width: int) -> str:
    """Break a name into lines of at most `width` letters, after commas where it has any."""
    return textwrap.fill(name.replace(",", ", "), width).replace(", ", ",")


def encode(figure: Figure) -> dict[str, bytes]:
    """Return a figure as PNG and SVG without dates and versions, so that the same runs give the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=RESOLUTION, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def draw_model(axes: Axes, model: Model) -> Line2D:
    """Draw a model's mean, its seeds as dashes and the paper's result as a hollow marker; return the mean's marker."""
    style = {"color": COLOURS[model.index % len(COLOURS)], "marker": MARKERS[model.kind]}
    if len(model.seeds) > 1:
        seeds = {"marker": "_", "markersize": 14, "markeredgewidth": 1, "linestyle": "none"}
        axes.plot(*zip(*model.seeds, strict=True), **style | seeds)
    if model.paper:
        axes.plot(*model.paper, zorder=2, **style, **HOLLOW)
    fill = FILLS[model.index // len(COLOURS) % len(FILLS)]
    style |= {"fillstyle": fill, "markerfacecoloralt": PAPER, "markersize": 6.5, "linestyle": "none"}
    return axes.plot(*model.mean, zorder=3, alpha=0.8, **style)[0]


def joined(models: Sequence[Model]) -> Iterator[list[Point]]:
    """Yield a line per kind of model, in order of parameters if these rise by `RISE`, else of cost if that does."""
    for kind in MARKERS:
        mine = [model for model in models if model.kind == kind]
        for costs in ([model.parameters for model in mine], [model.mean[0] for model in mine]):
            order = sorted(zip(costs, (model.mean for model in mine), strict=True))
            if len(order) > 1 and all(b >= a * RISE for (a, _), (b, _) in pairwise(order)):
                yield [point for _, point in order]
                break
