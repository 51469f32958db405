"""Round numbers for a logarithmic axis, also where it spans much less than one decade."""

import math
from collections.abc import Sequence

MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))


def log_limits(values: Sequence[float], pad: float, least: float) -> tuple[float, float]:
    """Limits that leave a share `pad` of the span, and at least a factor `least`, on either side."""
    low, high = min(values), max(values)
    factor = max((high / low) ** pad, least)
    return low / factor, high * factor


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Three to `most` round numbers from low to high, as evenly spread on a log axis as possible."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in MANTISSAS:
        ticks = [clean(m * 10.0**decade) for decade in decades for m in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / most)]
    return even_ticks(low, high)


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high at the largest round distance that gives at least three."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    for step in (5 * unit, 2 * unit, unit, unit / 2, unit / 5):
        ticks = [clean(n * step) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= 3:
            break
    return ticks


def clean(value: float) -> float:
    """A number without the last binary digits: 0.30000000000000004 becomes 0.3."""
    return float(f"{value:.10g}")


def tick_label(value: float, _position: int | None = None) -> str:
    """A tick as a plain number, never with an offset: 0.3, 8.4, 4,300."""
    return f"{value:,.10g}"


def usable(value: float | None) -> bool:
    """Whether a value has a place on a logarithmic axis."""
    return value is not None and math.isfinite(value) and value > 0


def set_log_axis(axis, values: Sequence[float], pad: float, least: float) -> None:
    """Give a logarithmic axis of matplotlib limits around the values and a few round ticks, in full."""
    low, high = log_limits(values, pad, least)
    ticks = log_ticks(low, high)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks, [tick_label(tick) for tick in ticks])
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
