"""Logarithmic axes with a few round ticks, written as plain numbers."""

import math
from collections.abc import Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

# Ticks of a logarithmic axis, by the ratio that its values exceed; below all of these, ticks stand at equal steps.
MANTISSAS = {500: (1,), 30: (1, 3), 8: (1, 2, 5), 2.5: (1, 1.5, 2, 3, 5, 7)}


def positive(value: float | None) -> bool:
    """Whether a value has a place on a logarithmic axis."""
    return value is not None and math.isfinite(value) and value > 0


def set_log_axis(axis: Axis, values: Sequence[float], pad: float, least: float) -> None:
    """Make an axis logarithmic with a few round ticks, written as plain numbers.

    On either side of the values there is space: a share `pad` of their span, or a factor `least` if that is more.
    """
    low, ratio = min(values), max(values) / min(values)
    factor = max(ratio**pad, least)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low / factor, low * ratio * factor)})
    mantissas = next((mantissas for least_ratio, mantissas in MANTISSAS.items() if ratio > least_ratio), None)
    even = MaxNLocator(nbins=5, steps=(1, 2, 5, 10), min_n_ticks=3)
    axis.set_major_locator(LogLocator(subs=mantissas) if mantissas else even)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(tick_label)


def tick_label(value: float, _position: int | None = None) -> str:
    """Return a tick as a number without an offset: 0.3, 8.4, 4,300, and from a billion on 1.6e9."""
    return f"{value:,.10g}" if value < 1e9 else f"{value:.3g}".replace("e+", "e")
