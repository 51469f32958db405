"""The main table of a report: a row of figures for each finished run."""

from collections.abc import Iterable, Sequence

from moe_lm.report import Column, Row, RunRecord, Table
from moe_lm.report.figures import LAST_LINES, deviations, mean_figures, run_figures
from moe_lm.report.formats import millions, percent, perplexity, plain, power, small
from moe_lm.report.seeds import seed_groups

FORMATS = {
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
    Column("max_over_mean_tokens", "max/mean tokens"): small,
    Column("dropped", "dropped"): percent,
    Column("unserved", "tokens without expert"): percent,
}
SOMETIMES = ("max_over_mean_tokens", "dropped", "unserved")
"""Columns that only stand where a run has such tokens, or has logged them."""
# The deviation of a figure that no seed changes is no measurement, so it stays empty.
FIXED = ("operations_per_timestep", "parameters_without_embedding_and_softmax", "parameters_total")
TEXT = (
    "M: million. Operations: multiply-adds of one word's forward pass, softmax excluded. "
    f"The balance of the experts (CV: standard deviation over mean) is the mean of the last {LAST_LINES} logged lines. "
    "The load of noisy top-k gating is the expected one (equation 10), which leaves out the chance of the draw; of "
    "other gates it is the number of tokens that an expert took, which max/mean tokens counts for all of them."
)


def main_table(runs: Iterable[RunRecord]) -> Table:
    """A row for each finished run and, where several differ only by seed, their mean and deviation."""
    runs = [run for run in runs if run.result is not None]
    seeds = {id(members[-1]): (name, members) for name, members in seed_groups(runs) if len(members) > 1}
    rows = []
    for run in runs:
        rows.append(Row("run", run.name, run_figures(run)))
        if id(run) in seeds:
            rows += seed_rows(*seeds[id(run)])
    some = {key for key in SOMETIMES for row in rows if row.figures.get(key)}
    formats = {column: style for column, style in FORMATS.items() if column.key in some or column.key not in SOMETIMES}
    return Table("table", "Results", TEXT, formats, rows)


def seed_rows(name: str, runs: Sequence[RunRecord]) -> list[Row]:
    """The mean of each figure over seeds, and its sample standard deviation (n - 1)."""
    spread = {key: None if key in FIXED else value for key, value in deviations(runs).items()}
    return [Row("mean", name, mean_figures(runs), len(runs)), Row("deviation", name, spread, len(runs))]


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
