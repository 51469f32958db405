"""The plots of a report, as png and svg; the only module of it that imports matplotlib."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_lm.report import RunRecord
from moe_lm.report.curves import BALANCE_PANELS, CURVE_PANELS
from moe_lm.report.names import wrapped
from moe_lm.report.points import POINT_PANELS

INK, GRID, PAPER = "#1f2328", "#d8dee4", "#ffffff"  # the page exchanges these for its theme's colours
STYLE = {
    "svg.hashsalt": "moe-lm",  # without it every svg has other identifiers
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.2,
}
PANEL_WIDTH, PANEL_HEIGHT = 4.0, 3.1  # inches; small, so that letters stay readable on a phone
LETTERS = 62  # of a legend that fit beside each other below one panel
MARK_LETTERS = 7  # the width of a legend's mark with its gaps
NAME_LETTERS = 46  # a longer name is broken into lines
RESOLUTION = 160  # dots an inch of a png


class Panel(Protocol):
    """One pair of axes: `draw` returns its legend, `label` writes names once the layout is final."""

    def draw(self, axes: Axes, runs: Sequence[RunRecord]) -> dict: ...

    def label(self, axes: Axes, runs: Sequence[RunRecord]) -> None: ...


GROUPS: Mapping[str, Mapping[str, Panel]] = {
    "perplexity": POINT_PANELS,
    "curves": CURVE_PANELS,
    "balance": BALANCE_PANELS,
}
NAMES = tuple(name for group, panels in GROUPS.items() for name in (group, *panels))


def draw_plots(runs: Sequence[RunRecord]) -> dict[str, dict[str, bytes]]:
    """Every plot that the runs have figures for: its name, then its bytes by format (png, svg)."""
    with fixed_style():
        return {name: encode(figure) for name, figure in draw_figures(runs)}


@contextmanager
def fixed_style() -> Iterator[None]:
    """Our style alone, whatever the reader's own matplotlib settings are; they are put back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw_figures(runs: Sequence[RunRecord]) -> Iterator[tuple[str, Figure]]:
    """Each group of panels as one figure, and each panel as a figure of its own."""
    for group, panels in GROUPS.items():
        drawn = {name: figure for name, panel in panels.items() if (figure := draw_figure([panel], runs))}
        if drawn:
            yield group, draw_figure([panels[name] for name in drawn], runs)
            yield from drawn.items()


def draw_figure(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> Figure | None:
    """Panels side by side above one legend, or None where they have nothing to show."""
    figure = Figure(figsize=(PANEL_WIDTH * len(panels), PANEL_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    legend = {}
    for axes, panel in zip(row, panels, strict=True):
        legend |= panel.draw(axes, runs)
    if not legend:
        return None
    add_legend(figure, legend, len(panels))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names go where the final layout has room, so it must not move again
    for axes, panel in zip(row, panels, strict=True):
        panel.label(axes, runs)
    return figure


def add_legend(figure: Figure, entries: Mapping, num_panels: int) -> None:
    """A legend below the axes; the figure grows by its height."""
    names = [wrapped(name, NAME_LETTERS) for name in entries]
    longest = max(len(line) for name in names for line in name.splitlines())
    columns = min(len(names), max(1, num_panels * LETTERS // (MARK_LETTERS + longest)))
    marks = list(entries.values())
    legend = figure.legend(marks, ["x"] * len(marks), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards: matplotlib would read $ as mathematics and hide names that begin with _.
        text.set_parse_math(False)
        text.set_text(name)
    height = legend.get_window_extent(figure.canvas.get_renderer()).height
    figure.set_figheight(PANEL_HEIGHT + height / figure.dpi)


def encode(figure: Figure) -> dict[str, bytes]:
    """A figure's png and svg, without dates and versions: the same runs give the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=RESOLUTION, metadata={"Software": None})
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    return {"png": png.getvalue(), "svg": svg.getvalue()}
