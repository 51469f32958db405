"""Pictures of an inspection: the load of the experts, and which experts serve the same tokens.

Shape suffixes: E experts, P points.
"""

import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from moe_lm.analysis.experts import InspectedLayer
from moe_lm.analysis.experts.summary import FEW_EXPERTS

INK, GRID, PAPER, BLUE = "#1f2328", "#d8dee4", "#ffffff", "#0072b2"
THEME = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)", BLUE: "var(--blue)"}
"""CSS variables that replace these colours in pictures on the page, which has a light and a dark theme."""
GREEN, ORANGE = (0, 0.62, 0.45), "#e69f00"
STYLE = {
    "svg.hashsalt": "moe-lm",  # so that the same picture has the same identifiers
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
SIZE = (4.4, 3.1)
"""Width and height in inches; small, so that letters stay readable on a phone."""
MAX_POINTS = 512
"""Maximum number of points of a line; it limits the size of the file for many experts."""
LIFT_EDGES = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)
"""Boundaries between the shades of the heat map."""


def draw_pictures(layer: InspectedLayer) -> dict[str, dict[str, bytes]]:
    """Return the bytes of the pictures `load` and, for few experts, `pairs`, by format (png, svg)."""
    pictures = {"load": _encode(_draw_load, layer)}
    if layer.pairs.distinct and layer.num_experts <= FEW_EXPERTS:
        pictures["pairs"] = _encode(_draw_pairs, layer)
    return pictures


def inline_svg(svg: str, name: str, title: str) -> str:
    """Return an SVG document as an element of an HTML page, in the colours of the page's theme.

    `name` becomes the prefix of its identifiers; `name` and `title` must be safe in HTML.
    """
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{title}">', svg, count=1)
    svg = re.sub(r'\b(id="|(?:xlink:)?href="#)', rf"\g<1>{name}-", svg).replace("url(#", f"url(#{name}-")
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return svg


def _encode(draw: Callable[[Figure, Axes, InspectedLayer], None], layer: InspectedLayer) -> dict[str, bytes]:
    """Draw in a fixed style, whatever the user's matplotlib settings, and keep dates and versions out of the files."""
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, figure.subplots(), layer)
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _draw_load(figure: Figure, axes: Axes, layer: InspectedLayer) -> None:
    """Draw load and importance of the experts, sorted by load, in multiples of the mean."""
    experts = sorted(layer.experts, key=lambda expert: (-expert.load, expert.expert))
    place_P = np.unique(np.linspace(0, len(experts) - 1, min(MAX_POINTS, len(experts))).round().astype(int))
    load_P = np.array([experts[i].load_share for i in place_P]) * len(experts)
    importance_P = np.array([experts[i].importance_share for i in place_P]) * len(experts)
    if len(experts) <= FEW_EXPERTS:
        axes.bar(place_P, load_P, color=BLUE, width=0.7, label="load")
        axes.set_xticks(place_P, [str(expert.expert) for expert in experts])
        size, rotation = 9 if len(experts) <= 32 else 6, 90 if len(experts) > 20 else 0
        axes.tick_params(axis="x", length=0, labelsize=size, labelrotation=rotation)
        axes.set(xlabel="expert, by load", xlim=(-0.7, len(experts) - 0.3))
        marks = {"marker": "D", "markersize": 4.5}
    else:
        place_P = place_P + 1
        axes.plot(place_P, load_P, color=BLUE, linewidth=1.6, zorder=3, label="load")
        axes.set(xlabel="rank by load", xlim=(0, len(experts) + 1))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        marks = {"marker": ".", "markersize": 3.5}
    axes.plot(place_P, importance_P, color=ORANGE, label="importance", linestyle="none", **marks)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(ylabel="share, relative to an even share")
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=2)


def _draw_pairs(figure: Figure, axes: Axes, layer: InspectedLayer) -> None:
    """Draw a heat map of the lift of every pair, in shades of opacity that suit a light and a dark background."""
    num_experts = layer.num_experts
    lift_EE = np.zeros((num_experts, num_experts))
    for pair in layer.pairs.most_frequent:
        first, second = pair.experts
        lift_EE[first, second] = lift_EE[second, first] = pair.lift
    np.fill_diagonal(lift_EE, np.nan)  # left empty
    colours = ListedColormap([(*GREEN, opacity) for opacity in np.linspace(0, 1, len(LIFT_EDGES))], name="lift")
    norm = BoundaryNorm(LIFT_EDGES, colours.N, extend="max")
    image = axes.imshow(lift_EE, cmap=colours, norm=norm, interpolation="none")
    ticks = range(0, num_experts, -(-num_experts // 10))
    axes.set(xticks=ticks, yticks=ticks, xlabel="expert", ylabel="expert")
    axes.grid(visible=False)
    if layer.num_groups:
        size = num_experts // layer.num_groups
        for edge in range(size, num_experts, size):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)
            axes.axvline(edge - 0.5, color=GRID, linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, label="lift", ticks=LIFT_EDGES, format="{x:g}")
    bar.ax.grid(visible=False)
    bar.outline.set_edgecolor(INK)
