"""Tables of a report: the main table, the comparison with the paper, balance loss weights, and gates."""

from collections.abc import Iterable, Mapping, Sequence

from moe_lm.report import Column, Figures, Row, RunRecord, Table
from moe_lm.report.formats import bits, millions, percent, perplexity, plain, power, small
from moe_lm.report.paper_comparison import balance_tables, gate_names, paper_tables, row_of
from moe_lm.report.runs import LAST_LINES, deviations, mean_figures, run_figures, seed_groups
from moe_lm.report.scaling import scaling_tables

BALANCE = {
    Column("cv_importance", "CV (importance)"): small,
    Column("cv_load", "CV (load)"): small,
    Column("max_over_mean_load", "max/mean load"): small,
    Column("max_over_mean_tokens", "max/mean tokens"): small,
    Column("dropped_fraction", "dropped"): percent,
}
BALANCE_TEXT = (
    "For noisy top-k gating the load is the expected number of tokens (equation 10), which excludes the noise of a "
    "single draw; for other gates it is the number of tokens that an expert received. Max/mean tokens counts the "
    "received tokens for every gate. "
)
MAIN = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("valid_perplexity", "valid perplexity"): perplexity,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("parameters_without_embedding_and_softmax", "parameters w/o embedding, softmax (M)"): millions,
    Column("parameters_total", "parameters total (M)"): millions,
    Column("words", "training words (M)"): millions,
    Column("flops", "training FLOPs"): power,
    Column("words_per_second", "words/s"): plain,
    Column("seconds", "seconds"): plain,
    **BALANCE,
    Column("unrouted_fraction", "tokens without expert"): percent,
}
MAIN_TEXT = (
    "M: million. Operations are multiply-adds in one word's forward pass, excluding the softmax. CV is the standard "
    f"deviation over the mean. Expert balance is averaged over the last {LAST_LINES} logged lines. " + BALANCE_TEXT
).strip()
OPTIONAL = ("max_over_mean_tokens", "dropped_fraction", "unrouted_fraction")
"""Columns that are left out where every figure is zero or missing."""
FIXED = ("operations_per_timestep", "parameters_without_embedding_and_softmax", "parameters_total")
"""Figures that do not depend on the seed and so have no deviation."""
GATES = {
    Column("gates", "gate"): str,
    Column("losses", "balance losses"): str,
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("audited", "evaluation rule"): str,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("parameters_without_embedding_and_softmax", "parameters (M)"): millions,
    **BALANCE,
    Column("words_per_second", "words/s"): plain,
    Column("audited_experts_per_token", "experts per token in evaluation"): small,
    Column("audited_unrouted_fraction", "tokens without expert in evaluation"): percent,
    Column("leak_bits", "training leak (bits/token)"): bits,
    Column("leak_of_later_words_bits", "leak from later words (bits/token)"): bits,
    Column("perplexity_shift", "perplexity, training rule / evaluation rule"): percent,
}
GATES_TEXT = (
    "Test perplexity uses each gate's evaluation rule, which looks at no other token; moe-lm audit checks this by "
    "replacing later words and other sentences. Balance and the dropped fraction of the requested expert choices are "
    f"measured on training batches and averaged over the last {LAST_LINES} logged lines. {BALANCE_TEXT}"
    "The leak is the change of the predictions, in bits, when those words are replaced while the gate uses its "
    "training rule. It is a lower bound, because the lengths and the number of sentences stay the same. The last "
    "column compares the perplexity of the audited words under both rules: below 100 % the model does better when it "
    "sees the whole batch, which it cannot do on new text."
)


def report_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the main table, and each further table for which the runs have figures."""
    return [
        main_table(runs),
        *scaling_tables(runs),
        *paper_tables(runs),
        *balance_tables(runs),
        *gate_tables(runs),
    ]


def main_table(runs: Iterable[RunRecord]) -> Table:
    """Return a row for each finished run and, for runs that differ only by seed, rows of their mean and deviation."""
    runs = [run for run in runs if run.result is not None]
    seeds = {id(members[-1]): (name, members) for name, members in seed_groups(runs) if len(members) > 1}
    rows = []
    for run in runs:
        rows.append(Row("run", run.name, run_figures(run)))
        if id(run) in seeds:
            name, members = seeds[id(run)]
            spread = {key: None if key in FIXED else value for key, value in deviations(members).items()}
            rows.append(Row("mean", name, mean_figures(members), len(members)))
            rows.append(Row("deviation", name, spread, len(members)))
    empty = {key for key in OPTIONAL if not any(row.figures.get(key) for row in rows)}
    formats = {column: style for column, style in MAIN.items() if column.key not in empty}
    return Table("table", "Results", MAIN_TEXT, formats, rows)


def unfinished_runs(runs: Iterable[RunRecord]) -> list[tuple[str, str]]:
    """Return the name and the progress of each unfinished run."""
    return [(run.name, progress(run)) for run in runs if run.result is None]


def progress(run: RunRecord) -> str:
    """Return how many words an unfinished run has trained on, and its last validation perplexity."""
    lines = [*run.metrics, *run.evaluations]
    if not lines:
        return "nothing logged yet"
    text = f"{millions(max(line['words'] for line in lines))} M words so far"
    valid = [line["perplexity"] for line in run.evaluations if line["split"] == "valid"]
    return text + (f", validation perplexity {perplexity(valid[-1])}" if valid else "")


def gate_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a table if the runs have several kinds of gates or an MoE model was audited."""
    groups = seed_groups(runs)
    gated = [run for _, members in groups for run in members if members[0].is_moe]
    if len({gate_names(members[0]) for _, members in groups if members[0].is_moe}) < 2 and not any(
        run.audit for run in gated
    ):
        return []
    rows = [row_of(group, gate_figures(group[1])) for group in groups]
    return [Table("routing", "Gates", GATES_TEXT, GATES, rows)]


def gate_figures(runs: Sequence[RunRecord]) -> Figures:
    """Return the means over seeds with the names of the gates, their balance losses and the audit's finding."""
    losses = runs[0].settings.get("balance")
    losses = losses if isinstance(losses, Mapping) and runs[0].is_moe else {}
    names = ", ".join(name for name, part in losses.items() if isinstance(part, Mapping))
    named = {"gates": gate_names(runs[0]) or "none", "losses": names or None, "audited": audit_finding(runs)}
    return mean_figures(runs) | named


def audit_finding(runs: Sequence[RunRecord]) -> str:
    """Return what the audits found about the evaluation rule: `causal` only if every run's audit found that."""
    found = [run.audit and run.audit["causal"] for run in runs]
    if False in found:
        return "NOT CAUSAL"
    return "not audited" if None in found else "causal"
