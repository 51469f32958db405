"""Tables that compare runs with the paper: its models (Tables 7 and 8) and balance loss weights (Table 6)."""

from collections.abc import Mapping, Sequence

from moe_lm.report import Column, Figures, Row, RunRecord, Table
from moe_lm.report.formats import billions, change, millions, percent, perplexity, small, times, weight
from moe_lm.report.paper import TABLE_6, TRAINING_WORDS
from moe_lm.report.runs import LAST_LINES, mean_figures, seed_groups

BASELINES = ("moe_1_wide", "lstm_2048_512", "lstm_4x512", "news100b_lstm_4x512")
"""Dense presets against which changes are measured; the first of these that the table holds is used."""
COMPARED = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("paper_perplexity", "paper: after 10 epochs"): perplexity,
    Column("paper_later_perplexity", "paper: final"): perplexity,
    Column("difference", "change vs 10 epochs"): change,
    Column("words_share", "training words, of the paper's"): percent,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("paper_operations_millions", "paper: ops/timestep (M)"): str,
    Column("parameters_without_embedding_and_softmax", "parameters (M)"): millions,
    Column("paper_parameters_millions", "paper: parameters (M)"): str,
    Column("parameters_total", "total (B)"): billions,
    Column("paper_total_billions", "paper: total (B)"): str,
}
COMPARED_TEXT = (
    "These runs have the paper's operations and parameters and are tested on its text, the first held-out part of "
    "the 1-Billion-Word Benchmark. A fair comparison also needs the paper's number of training words (100 %). "
    "Parameters exclude embedding and softmax; the total includes them."
)
SCALED = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("change", "change vs {baseline}"): change,
    Column("paper_name", "paper's model"): str,
    Column("paper_change", "paper: change vs {paper_baseline}"): change,
    Column("paper_perplexity", "paper: test perplexity (not comparable)"): perplexity,
    Column("paper_operations_millions", "paper: ops/timestep (M)"): str,
    Column("paper_parameters_millions", "paper: parameters (M)"): str,
    Column("paper_times_width", "paper: width relative to ours"): times,
    Column("paper_times_words", "paper: training words relative to ours"): times,
}
SCALED_TEXT = (
    "The perplexities of these runs cannot be compared with the paper's. Its models have the same layers, but they are "
    "larger, were trained on more words or were tested on another text, as the last columns show. The change relative "
    "to a dense model of the same text, size and training words can be compared with care: its sign, and the order of "
    "the models."
)
BALANCE = {
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
BALANCE_TEXT = (
    f"This table follows the paper's Table 6. CV and load are measured on training batches and averaged over the last "
    f"{LAST_LINES} logged lines. The paper's figures are for MoE-256 (width 512, batches of 300,000 words) after 10 "
    "epochs of the 1-Billion-Word Benchmark. Its perplexities are not comparable with those of other models or texts, "
    "and smaller batches alone raise the CV."
)
Group = tuple[str, list[RunRecord]]


def row_of(group: Group, figures: Figures) -> Row:
    """Return the row of one run, or of the mean over several seeds."""
    name, runs = group
    return Row("run", runs[0].name, figures) if len(runs) == 1 else Row("mean", name, figures, len(runs))


def paper_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a table of the runs at the paper's sizes and a table of the runs at other sizes, if there are any."""
    groups = [group for group in seed_groups(runs) if group[1][0].paper]
    compared = [group for group in groups if group[1][0].paper.comparable]
    scaled = [group for group in groups if not group[1][0].paper.comparable]
    tables = []
    if compared:
        rows = [row_of(group, compared_figures(group[1])) for group in compared]
        tables.append(Table("paper", "Comparison with the paper", COMPARED_TEXT, COMPARED, rows))
    return [*tables, scaled_table(scaled)] if scaled else tables


def paper_figures(runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """Return the mean figures of runs together with the paper's figures of their model."""
    model, figures = runs[0].paper, mean_figures(runs)
    result, words = model.result, figures["words"]
    return figures | {
        "paper_name": result.name,
        "paper_perplexity": result.perplexity,
        "paper_later_perplexity": result.later_perplexity,
        "paper_operations_millions": result.operations,
        "paper_parameters_millions": result.parameters,
        "paper_total_billions": result.total,
        "paper_times_width": model.times_width,
        "paper_times_words": model.words / words if model.words and words else None,
    }


def compared_figures(runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """Return the figures of a model at the paper's sizes with its change relative to the paper's perplexity."""
    figures = paper_figures(runs)
    figures["words_share"] = figures["words"] / TRAINING_WORDS[7]
    return figures | {"difference": relative_change(figures["test_perplexity"], figures["paper_perplexity"])}


def scaled_table(groups: Sequence[Group]) -> Table:
    """Return the table of models at other sizes, with the change relative to a dense model here and in the paper."""
    baseline = find_baseline([runs for _, runs in groups])
    rows = []
    for group in groups:
        figures = paper_figures(group[1])
        if baseline and group[1] is not baseline and same_scale(group[1][0], baseline[0]):
            base = paper_figures(baseline)
            figures["change"] = relative_change(figures["test_perplexity"], base["test_perplexity"])
            figures["paper_change"] = relative_change(figures["paper_perplexity"], base["paper_perplexity"])
        rows.append(row_of(group, figures))
    formats = {column: style for column, style in SCALED.items() if baseline or not column.key.endswith("change")}
    if baseline:
        names = {"baseline": baseline[0].base_name, "paper_baseline": baseline[0].paper.result.name}
        formats = {Column(column.key, column.heading.format(**names)): style for column, style in formats.items()}
    return Table("imitated", "Models of the paper at other sizes", SCALED_TEXT, formats, rows)


def find_baseline(groups: Sequence[list[RunRecord]]) -> list[RunRecord] | None:
    """Return the runs of the first of the `BASELINES` that occurs; None unless it occurs once, among other models."""
    for preset in BASELINES:
        found = [runs for runs in groups if runs[0].paper.preset == preset]
        if found:
            return found[0] if len(found) == 1 and len(groups) > 1 else None
    return None


def same_scale(run: RunRecord, other: RunRecord) -> bool:
    """Whether two runs have the same scale relative to the paper and, within 1 %, the same training words."""
    ratio = run.result["words"] / max(other.result["words"], 1)
    return run.paper.times_width == other.paper.times_width and abs(ratio - 1) < 0.01


def relative_change(value: float | None, base: float | None) -> float | None:
    """Return the change from a base to a value as a share of the base."""
    return value / base - 1 if value is not None and base else None


def balance_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a table if MoE models with equal gates were trained with several pairs of balance loss weights."""
    groups = [group for group in seed_groups(runs) if group[1][0].is_moe]
    weights = [balance_weights(members[0]) for _, members in groups]
    if len({gate_names(members[0]) for _, members in groups}) > 1 or len(set(weights)) < 2:
        return []
    results = {(result.w_importance, result.w_load): result for result in TABLE_6}
    rows = []
    for group, pair in zip(groups, weights, strict=True):
        figures = mean_figures(group[1]) | dict(zip(("w_importance", "w_load"), pair, strict=True))
        if pair in results:
            figures |= {f"paper_{key}": value for key, value in vars(results[pair]).items()}
        rows.append(row_of(group, figures))
    return [Table("balance", "Weights of the balance losses", BALANCE_TEXT, BALANCE, rows)]


def balance_weights(run: RunRecord) -> tuple[float, float]:
    """Return the weights of the importance and load losses in a run's configuration, 0 for a missing loss."""
    losses = run.settings.get("balance")
    losses = losses if isinstance(losses, Mapping) else {}
    pair = (losses.get(name) for name in ("importance", "load"))
    return tuple(float(loss.get("weight", 0)) if isinstance(loss, Mapping) else 0.0 for loss in pair)


def gate_names(run: RunRecord) -> str:
    """Return the names of a run's gates in the order of its layers, each once, such as `noisy_top_k, switch`."""
    gates = [layer.get(part) for layer in run.layers for part in ("primary_gate", "gate")]
    targets = [str(gate.get("_target_")).split(".") for gate in gates if isinstance(gate, Mapping)]
    return ", ".join(dict.fromkeys(target[-2] for target in targets if len(target) > 1))
