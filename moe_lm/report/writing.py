"""Tables as Markdown for readers and as CSV for programs."""

import csv
import io
from collections.abc import Sequence

from moe_lm.report import Row, Table


def remark(row: Row) -> str:
    """What stands behind the name of a row over several seeds; empty for a run."""
    kinds = {"run": "", "mean": " mean", "deviation": " standard deviation"}
    return kinds[row.kind] + (f" ({row.num_seeds} seeds)" if row.num_seeds > 1 else "")


def cells(table: Table, row: Row) -> list[str]:
    """A row's figures as readers see them, without its name."""
    values = [(row.figures.get(column.key), style) for column, style in table.formats.items()]
    return ["" if value is None else style(value) for value, style in values]


def to_markdown(tables: Sequence[Table], unfinished: Sequence[tuple[str, str]]) -> str:
    """The main table with the unfinished runs below it, then the others, each with its heading and text."""
    main, *others = tables
    text = markdown_table(main) if main.rows else "No run has finished yet.\n"
    if unfinished:
        text += "\nUnfinished:\n\n" + "".join(f"- {code(name)}: {state}\n" for name, state in unfinished)
    return text + "".join(f"\n## {table.heading}\n\n{table.text}\n\n{markdown_table(table)}" for table in others)


def markdown_table(table: Table) -> str:
    """One table, its columns padded for the console."""
    head = [table.names, *(column.heading for column in table.formats)]
    body = [[code(row.name) + remark(row), *cells(table, row)] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(aligned(line, widths) + "\n" for line in (head, rule, *body))


def aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a Markdown table: the name to the left, figures to the right."""
    name, *figures = line
    padded = [name.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:], strict=True))]
    return "| " + " | ".join(padded) + " |"


def code(name: str) -> str:
    """A name as a Markdown code span that may stand in a table."""
    fence = "``" if "`" in name else "`"
    pad = " " if "`" in name else ""
    return f"{fence}{pad}{' '.join(name.split())}{pad}{fence}".replace("|", "\\|")


def to_csv(table: Table) -> str:
    """A table as CSV with unrounded figures in plain units."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([table.names, "kind", "seeds", *(column.key for column in table.formats)])
    for row in table.rows:
        figures = (row.figures.get(column.key) for column in table.formats)
        writer.writerow([row.name, row.kind, row.num_seeds, *("" if value is None else value for value in figures)])
    return text.getvalue()
