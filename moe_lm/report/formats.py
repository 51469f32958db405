"""Figures as text, and tables as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence

from moe_lm.report import Table


def plain(value: float) -> str:
    """Format a whole number with thousands separators."""
    return f"{value:,.0f}"


def small(value: float) -> str:
    """Format a ratio with two decimals, or with two significant digits below 0.01."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def perplexity(value: float) -> str:
    """Format a perplexity with one decimal from 10 on, and with two below."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def millions(value: float) -> str:
    """Format a count in millions with one decimal, as in the paper, or with two significant digits below a million."""
    value /= 1e6
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def billions(value: float) -> str:
    """Format a count in billions with one decimal, as in the paper."""
    return f"{value / 1e9:,.1f}"


def power(value: float) -> str:
    """Format a large count as in 1.23e+15."""
    return f"{value:.2e}" if value else "0"


def bits(value: float) -> str:
    """Format bits per token with four decimals, and mere rounding errors of float64 as 0."""
    return f"{value:.4f}" if value > 1e-9 else "0"


def percent(value: float) -> str:
    """Format a fraction as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def change(value: float) -> str:
    """Format a relative change as a percentage with its sign."""
    text = f"{100 * value:+.1f} %".replace("-", "−")
    return "0.0 %" if text[1:] == "0.0 %" else text


def times(value: float) -> str:
    """Format a factor with two significant digits below 10, and as a whole number from 10 on."""
    return f"{value:,.0f} ×" if value >= 10 else f"{value:.2g} ×"


def weight(value: float) -> str:
    """Format a weight in its shortest form."""
    return f"{value:g}"


def to_markdown(tables: Sequence[Table], unfinished: Sequence[tuple[str, str]]) -> str:
    """Return the main table with the unfinished runs below it, then the other tables with heading and text."""
    main, *others = tables
    text = markdown_table(main) if main.rows else "No run has finished yet.\n"
    if unfinished:
        text += "\nUnfinished:\n\n" + "".join(f"- {code(name)}: {state}\n" for name, state in unfinished)
    return text + "".join(f"\n## {table.heading}\n\n{table.text}\n\n{markdown_table(table)}" for table in others)


def markdown_table(table: Table) -> str:
    """Return one table with its columns padded for the console."""
    head = [table.names, *(column.heading for column in table.formats)]
    body = [[code(row.name) + row.remark, *table.cells(row)] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for name, *figures in (head, rule, *body):
        aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        text += f"| {' | '.join([name.ljust(widths[0]), *aligned])} |\n"
    return text


def code(name: str) -> str:
    """Return a name as a Markdown code span that may stand in a table."""
    fence, pad = ("``", " ") if "`" in name else ("`", "")
    return f"{fence}{pad}{' '.join(name.split())}{pad}{fence}".replace("|", "\\|")


def to_csv(table: Table) -> str:
    """Return a table as CSV with unrounded figures in plain units."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([table.names, "kind", "seeds", *(column.key for column in table.formats)])
    for row in table.rows:
        figures = (row.figures.get(column.key) for column in table.formats)
        writer.writerow([row.name, row.kind, row.num_seeds, *("" if value is None else value for value in figures)])
    return text.getvalue()
