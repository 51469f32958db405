"""The pictures of an inspection, in the look of report's: how load spreads, and which experts go together."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from moe_lm.analysis.experts import InspectedLayer
from moe_lm.analysis.experts.summary import FEW
from moe_lm.report.plots import GRID, INK, encode, fixed_style
from moe_lm.report.ticks import tick_label

BLUE, GREEN, ORANGE = "#0072b2", (0, 0.62, 0.45), "#e69f00"  # of report's colours; green stays as it is on the page
SIZE = (4.4, 3.1)  # inches; small, so that letters stay readable on a phone
POINTS = 512
"""The most points of a line: the picture of very many experts stays small."""
LIFTS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)
"""Where one shade of the heat map ends and the next begins."""


def draw_pictures(layer: InspectedLayer) -> dict[str, dict[str, bytes]]:
    """Return the pictures of a layer, `load` and, where there are few experts, `pairs`: their bytes by format."""
    with fixed_style():
        pictures = {"load": encode(load_figure(layer))}
        if layer.pairs.distinct and layer.num_experts <= FEW:
            pictures["pairs"] = encode(pairs_figure(layer))
    return pictures


def load_figure(layer: InspectedLayer) -> Figure:
    """Load and importance of the experts, by load, in multiples of the mean."""
    figure, axes = _empty()
    experts = sorted(layer.experts, key=lambda expert: (-expert.load, expert.expert))
    place_P = np.unique(np.linspace(0, len(experts) - 1, min(POINTS, len(experts))).round().astype(int))
    times_P2 = np.array([(experts[i].load_share, experts[i].importance_share) for i in place_P]) * len(experts)
    if len(experts) <= FEW:
        axes.bar(place_P, times_P2[:, 0], color=BLUE, width=0.7, label="load")
        axes.set_xticks(place_P, [str(expert.expert) for expert in experts])
        axes.tick_params(axis="x", length=0, labelsize=9 if len(experts) <= 32 else 6)
        axes.tick_params(axis="x", labelrotation=90 if len(experts) > 20 else 0)
        axes.set(xlabel="expert, by load", xlim=(-0.7, len(experts) - 0.3))
        marks = {"linestyle": "none", "marker": "D", "markersize": 4.5}
    else:
        axes.plot(place_P + 1, times_P2[:, 0], color=BLUE, linewidth=1.6, zorder=3, label="load")
        axes.set(xlabel="rank by load", xlim=(0, len(experts) + 1))
        axes.xaxis.set_major_formatter(tick_label)
        marks = {"linestyle": "none", "marker": ".", "markersize": 3.5}
        place_P = place_P + 1
    axes.plot(place_P, times_P2[:, 1], color=ORANGE, label="importance", **marks)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(ylabel="share, of an even share")
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def pairs_figure(layer: InspectedLayer) -> Figure:
    """A heat map of the lift of every pair; one colour in shades of opacity, which suits any background."""
    figure, axes = _empty()
    num_experts = layer.num_experts
    lift_EE = np.zeros((num_experts, num_experts))
    for pair in layer.pairs.most_frequent:
        first, second = pair.experts
        lift_EE[first, second] = lift_EE[second, first] = pair.lift
    np.fill_diagonal(lift_EE, np.nan)  # which is drawn in no colour
    shades = np.linspace(0, 1, len(LIFTS))
    colours = ListedColormap([(*GREEN, opacity) for opacity in shades], name="lift")
    norm = BoundaryNorm(LIFTS, colours.N, extend="max")
    image = axes.imshow(lift_EE, cmap=colours, norm=norm, interpolation="none")
    step = -(-num_experts // 10)
    axes.set(xticks=range(0, num_experts, step), yticks=range(0, num_experts, step), xlabel="expert", ylabel="expert")
    axes.grid(visible=False)
    if layer.num_groups:
        for edge in range(num_experts // layer.num_groups, num_experts, num_experts // layer.num_groups):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)
            axes.axvline(edge - 0.5, color=GRID, linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, label="lift", ticks=LIFTS)
    bar.ax.set_yticklabels([tick_label(lift) for lift in LIFTS])
    bar.ax.grid(visible=False)
    bar.outline.set_edgecolor(INK)
    return figure


def _empty() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
