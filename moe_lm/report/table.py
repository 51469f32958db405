"""The table of a report: rows of figures, as Markdown for readers and as CSV for programs."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from moe_lm.report import Column, Row, RunRecord
from moe_lm.report.seeds import seed_groups


def plain(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if math.isfinite(value) else f"{value}"


def small(value: float) -> str:
    """A ratio with two decimals, or two digits where those would show nothing."""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def perplexity(value: float) -> str:
    """One decimal from 10 on, two below."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def millions(value: float) -> str:
    """A count in millions: one decimal, as the paper prints it, or two digits below one million."""
    value /= 1e6
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def power(value: float) -> str:
    """A large count as 1.23e+15."""
    return f"{value:.2e}" if value else "0"


FORMATS: dict[Column, Callable[[float], str]] = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("valid_perplexity", "valid perplexity"): perplexity,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("parameters_without_embedding_and_softmax", "parameters w/o embedding, softmax (M)"): millions,
    Column("parameters_total", "parameters total (M)"): millions,
    Column("words", "training words (M)"): millions,
    Column("flops", "training FLOPs"): power,
    Column("words_per_second", "words/s"): plain,
    Column("seconds", "seconds"): plain,
    Column("cv_importance", "CV (importance)"): small,
    Column("cv_load", "CV (load)"): small,
    Column("max_over_mean_load", "max/mean load"): small,
}
COLUMNS = tuple(FORMATS)
# The deviation of a figure that no seed changes is no measurement, so it stays empty.
FIXED = ("operations_per_timestep", "parameters_without_embedding_and_softmax", "parameters_total")
BALANCE = ("cv_importance", "cv_load", "max_over_mean_load")


def table_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """A row for each finished run and, where several differ only by seed, their mean and deviation."""
    runs = [run for run in runs if run.result is not None]
    seeds = {id(members[-1]): (name, members) for name, members in seed_groups(runs) if len(members) > 1}
    rows = []
    for run in runs:
        rows.append(Row("run", run.name, run_figures(run)))
        if id(run) in seeds:
            rows += seed_rows(*seeds[id(run)])
    return rows


def run_figures(run: RunRecord) -> dict[str, float | None]:
    """The figures of one finished run; those of the balance come from its last training line with any."""
    last = next((line for line in reversed(run.metrics) if "cv_load" in line), {})
    figures = {column.key: run.result.get(column.key) for column in COLUMNS}
    figures |= {key: last.get(key) for key in BALANCE}
    return figures | {f"{split}_perplexity": run.perplexity(split) for split in ("test", "valid")}


def seed_rows(name: str, runs: Sequence[RunRecord]) -> list[Row]:
    """The mean of each figure over seeds, and its sample standard deviation (n - 1)."""
    samples = [run_figures(run) for run in runs]
    mean, deviation = {}, {}
    for column in COLUMNS:
        values = [sample[column.key] for sample in samples]
        known = all(value is not None and math.isfinite(value) for value in values)
        mean[column.key] = statistics.fmean(values) if known else None
        deviation[column.key] = statistics.stdev(values) if known and column.key not in FIXED else None
    return [Row("mean", name, mean, len(runs)), Row("deviation", name, deviation, len(runs))]


def remark(row: Row) -> str:
    """What stands behind the name of a row over several seeds; empty for a run."""
    kinds = {"run": "", "mean": " mean", "deviation": " standard deviation"}
    return kinds[row.kind] + (f" ({row.num_seeds} seeds)" if row.num_seeds > 1 else "")


def cells(row: Row) -> list[str]:
    """A row's figures as readers see them, without its name."""
    values = [(row.figures[column.key], style) for column, style in FORMATS.items()]
    return ["" if value is None else style(value) for value, style in values]


def to_markdown(rows: Sequence[Row], unfinished: Sequence[tuple[str, str]]) -> str:
    """The table as Markdown, its columns padded for the console, with the unfinished runs below it."""
    head = ["model", *(column.heading for column in COLUMNS)]
    body = [[code(row.name) + remark(row), *cells(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [aligned(line, widths) for line in (head, rule, *body)]
    text = "\n".join(lines) + "\n" if rows else "No run has finished yet.\n"
    if unfinished:
        text += "\nUnfinished:\n\n" + "".join(f"- {code(name)}: {state}\n" for name, state in unfinished)
    return text


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


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV with unrounded figures in plain units."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "seeds", *(column.key for column in COLUMNS)])
    for row in rows:
        figures = (row.figures[column.key] for column in COLUMNS)
        writer.writerow([row.name, row.kind, row.num_seeds, *("" if value is None else value for value in figures)])
    return text.getvalue()


def unfinished_runs(runs: Iterable[RunRecord]) -> list[tuple[str, str]]:
    """The name of each unfinished run, and how far it has come."""
    return [(run.name, progress(run)) for run in runs if run.result is None]


def progress(run: RunRecord) -> str:
    """How many words an unfinished run has trained on, and its last validation perplexity."""
    lines = [*run.metrics, *run.evaluations]
    if not lines:
        return "nothing logged yet"
    text = f"{millions(max(line['words'] for line in lines))} M words so far"
    valid = [line["perplexity"] for line in run.evaluations if line["split"] == "valid"]
    return text + (f", validation perplexity {perplexity(valid[-1])}" if valid else "")
