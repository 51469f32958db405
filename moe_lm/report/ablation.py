"""The weights of the balance losses and what they do, with the paper's Table 6 beside."""

from collections.abc import Mapping, Sequence

from moe_lm.report import Column, RunRecord, Table
from moe_lm.report.beside import row_of
from moe_lm.report.figures import LAST_LINES, mean_figures
from moe_lm.report.formats import perplexity, small, weight
from moe_lm.report.paper import TABLE_6
from moe_lm.report.routing import gates
from moe_lm.report.seeds import seed_groups

FORMATS = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("w_importance", "w (importance)"): weight,
    Column("w_load", "w (load)"): weight,
    Column("cv_importance", "CV (importance)"): small,
    Column("cv_load", "CV (load)"): small,
    Column("max_over_mean_load", "max/mean load"): small,
    Column("paper_perplexity", "paper: test perplexity"): perplexity,
    Column("paper_cv_importance", "paper: CV (importance)"): small,
    Column("paper_cv_load", "paper: CV (load)"): small,
    Column("paper_max_over_mean_load", "paper: max/mean load"): small,
}
TEXT = (
    f"As the paper's Table 6: CV and load in training batches, averaged over the last {LAST_LINES} logged lines. Its "
    "figures are of MoE-256 (width 512, 300,000 words a batch) after 10 epochs of the 1-Billion-Word Benchmark: for "
    "other models or texts its perplexities are not comparable, and smaller batches alone keep CV higher."
)
PRINTED = {(row.w_importance, row.w_load): row for row in TABLE_6}


def balance_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """One table where mixtures of the same gates were trained under several pairs of weights, else none."""
    groups = [(name, members) for name, members in seed_groups(runs) if members[0].is_moe]
    if len({gates(members[0]) for _, members in groups}) > 1:
        return []
    weighted = [(weights(members[0]), name, members) for name, members in groups]
    if len({pair for pair, _, _ in weighted}) < 2:
        return []
    rows = [row_of(name, members, balance_figures(pair, members)) for pair, name, members in weighted]
    return [Table("balance", "Weights of the balance losses", TEXT, FORMATS, rows)]


def weights(run: RunRecord) -> tuple[float, float]:
    """The weights of the importance and the load loss in a run's configuration, 0 for one that it leaves out."""
    losses = run.settings.get("balance")
    losses = losses if isinstance(losses, Mapping) else {}
    pair = (losses.get(name) for name in ("importance", "load"))
    return tuple(float(loss.get("weight", 0)) if isinstance(loss, Mapping) else 0.0 for loss in pair)


def balance_figures(pair: tuple[float, float], runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """The means of runs under one pair of weights, with the printed row of that pair."""
    figures = dict(mean_figures(runs)) | {"w_importance": pair[0], "w_load": pair[1]}
    row = PRINTED.get(pair)
    if row:
        names = ("perplexity", "cv_importance", "cv_load", "max_over_mean_load")
        figures |= {f"paper_{name}": getattr(row, name) for name in names}
    return figures
