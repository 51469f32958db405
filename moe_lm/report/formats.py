"""How figures are written for readers."""

import math


def plain(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if math.isfinite(value) else f"{value}"


def small(value: float) -> str:
    """A ratio with two decimals, or two digits where those would show nothing."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def perplexity(value: float) -> str:
    """One decimal from 10 on, two below."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def millions(value: float) -> str:
    """A count in millions: one decimal, as the paper prints it, or two digits below one million."""
    value /= 1e6
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def billions(value: float) -> str:
    """A count in thousand millions with one decimal, as the paper prints it."""
    return f"{value / 1e9:,.1f}"


def power(value: float) -> str:
    """A large count as 1.23e+15."""
    return f"{value:.2e}" if value else "0"


def bits(value: float) -> str:
    """Bits a token with four decimals, below rounding in float64 just 0."""
    return f"{value:.4f}" if value > 1e-9 else "0"


def percent(value: float) -> str:
    """A share of one, such as 0.5 or a change of -0.034, in per cent with one decimal."""
    return f"{100 * value:.1f} %"


def change(value: float) -> str:
    """A relative change in per cent with its sign."""
    text = f"{100 * value:+.1f} %".replace("-", "−")
    return "0.0 %" if text[1:] == "0.0 %" else text


def times(value: float) -> str:
    """A factor with two digits, or all of them before the point."""
    return f"{value:,.0f} ×" if value >= 10 else f"{value:.2g} ×"


def weight(value: float) -> str:
    """A weight as one types it."""
    return f"{value:g}"
