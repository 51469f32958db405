"""Which model of the paper a run is, or imitates, and our figures beside the printed ones (Tables 7 and 8)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_lm.report import Column, PaperModel, Row, RunRecord, Table
from moe_lm.report.figures import Figures, mean_figures
from moe_lm.report.formats import billions, change, millions, percent, perplexity, times
from moe_lm.report.paper import TABLE_7, Printed, printed
from moe_lm.report.seeds import seed_groups
from moe_lm.run import flatten

Presets = Callable[[str], Mapping[str, Any]]
"""From a preset's name to the configuration that it gives."""

# What may differ in a model that imitates another: sizes, and what changes no operation.
SIZES = ("width", "expert_hidden", "hidden", "lstm_units", "units", "dropout", "exact")
TEST_WORDS = 159_658  # predicted words of the benchmark's test text
TRAINING_WORDS = {
    7: 10 * 798_949_912,
    8: 100e9,
}  # by table: 10 epochs of the benchmark, 1 of 100 thousand million words
# How far a count may lie from the printed figure, in its units: half its last digit, and the named exceptions
# (8.651 printed as 8.6, 5.94 as 6.0).
TOLERANCE = {"operations": 0.055, "parameters": 0.055, "total": 0.065}
# Dense models that a change is measured against, the first of them that stands in the same table.
REFERENCES = ("moe_1_wide", "lstm_2048_512", "lstm_4x512", "news100b_lstm_4x512")

COMPARED = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("paper_perplexity", "paper: after 10 epochs"): perplexity,
    Column("paper_later_perplexity", "paper: finally"): perplexity,
    Column("difference", "ours to its 10 epochs"): change,
    Column("words_share", "our training words to its"): percent,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("paper_operations_millions", "paper: ops/timestep (M)"): str,
    Column("parameters_without_embedding_and_softmax", "parameters (M)"): millions,
    Column("paper_parameters_millions", "paper: parameters (M)"): str,
    Column("parameters_total", "total (B)"): billions,
    Column("paper_total_billions", "paper: total (B)"): str,
}
IMITATED = {
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("change", "change to {reference}"): change,
    Column("paper_name", "imitates the paper's"): str,
    Column("paper_change", "paper: change to {paper_reference}"): change,
    Column("paper_perplexity", "paper: test perplexity (not comparable)"): perplexity,
    Column("paper_operations_millions", "paper: ops/timestep (M)"): str,
    Column("paper_parameters_millions", "paper: parameters (M)"): str,
    Column("paper_times_width", "paper: width, of ours"): times,
    Column("paper_times_words", "paper: training words, of ours"): times,
}
COMPARED_TEXT = (
    "These runs have the paper's operations and parameters and are tested on its text, the first held-out part of "
    "the 1-Billion-Word Benchmark; a fair comparison also needs its training words (100 %). Parameters are without "
    "embedding and softmax, the total is with them."
)
IMITATED_TEXT = (
    "No perplexity of the paper's can be set beside one of these runs: its models are of the same shapes but larger, "
    "or trained on more words, or on another text, as the last columns say. What can be compared with care is the "
    "change to a dense model of the same text, size and words: its sign and the order of the models."
)


def set_beside(runs: Sequence[RunRecord], presets: Presets) -> list[RunRecord]:
    """Return the runs, each with the paper's model that it is or imitates."""
    return [replace(run, paper=paper_model(run, presets)) for run in runs]


def paper_model(run: RunRecord, presets: Presets) -> PaperModel | None:
    """The paper's model of a finished run's preset, None where the run changes more than sizes."""
    preset = run.result.get("preset") if run.result else None
    row = printed(preset)
    if row is None or not run.settings.get("model"):
        return None
    theirs = presets(preset)
    if not alike(run.settings, theirs):
        return None
    words = TRAINING_WORDS[7 if preset in TABLE_7 else 8]
    return PaperModel(
        preset=preset,
        printed=row,
        comparable=preset in TABLE_7 and has_figures(run, row),
        times_width=theirs["model"]["width"] / run.settings["model"]["width"],
        words=None if row.perplexity is None else words,
    )


def alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two configurations have the same layers and balance losses, but for their sizes."""
    a, b = ({key: settings.get(key) for key in ("model", "balance")} for settings in (ours, theirs))
    a, b = flatten(a), flatten(b)
    return all(a.get(key) == b.get(key) for key in a.keys() | b.keys() if key.split(".")[-1] not in SIZES)


def has_figures(run: RunRecord, row: Printed) -> bool:
    """Whether a run has the operations, parameters, vocabulary and test text of a printed row."""
    counts = {
        "operations": run.result["operations_per_timestep"] / 1e6,
        "parameters": run.result["parameters_without_embedding_and_softmax"] / 1e6,
        "total": run.result["parameters_total"] / 1e9,
    }
    near = all(abs(count - float(getattr(row, key))) < TOLERANCE[key] for key, count in counts.items())
    return near and (run.result.get("predicted_words") or {}).get("test") == TEST_WORDS


def paper_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Our figures beside the paper's: one table for runs at its sizes, one for those that imitate its models."""
    groups = [(name, members) for name, members in seed_groups(runs) if members[0].paper]
    compared = [(name, members) for name, members in groups if members[0].paper.comparable]
    imitated = [(name, members) for name, members in groups if not members[0].paper.comparable]
    tables = []
    if compared:
        rows = [row_of(name, members, compared_figures(members)) for name, members in compared]
        tables.append(Table("paper", "Beside the paper", COMPARED_TEXT, COMPARED, rows))
    if imitated:
        tables.append(imitated_table(imitated))
    return tables


def row_of(name: str, runs: Sequence[RunRecord], figures: Figures) -> Row:
    """A row for one run, or for the mean of several seeds."""
    return Row("run", runs[0].name, figures) if len(runs) == 1 else Row("mean", name, figures, len(runs))


def paper_figures(runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """The means of the runs with the paper's figures of their model."""
    model, figures = runs[0].paper, dict(mean_figures(runs))
    row, words = model.printed, figures["words"]
    return figures | {
        "paper_name": row.name,
        "paper_perplexity": row.perplexity,
        "paper_later_perplexity": row.later_perplexity,
        "paper_operations_millions": row.operations,
        "paper_parameters_millions": row.parameters,
        "paper_total_billions": row.total,
        "paper_times_width": model.times_width,
        "paper_times_words": model.words / words if model.words and words else None,
    }


def compared_figures(runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """The figures of a model at the paper's sizes, with the difference to what is printed."""
    figures = paper_figures(runs)
    shares = {"words_share": figures["words"] / TRAINING_WORDS[7]}
    return figures | shares | {"difference": relative(figures["test_perplexity"], figures["paper_perplexity"])}


def imitated_table(groups: Sequence[tuple[str, Sequence[RunRecord]]]) -> Table:
    """The models of the paper that runs imitate, with the change to a dense model in ours and in the paper's."""
    reference = reference_of([members for _, members in groups])
    rows = []
    for name, members in groups:
        figures = paper_figures(members)
        if reference and fair(members, reference):
            base, same = paper_figures(reference), members is reference
            for key, source in {"change": "test_perplexity", "paper_change": "paper_perplexity"}.items():
                figures[key] = None if same else relative(figures[source], base[source])
        rows.append(row_of(name, members, figures))
    names = {"reference": "the dense model", "paper_reference": "its own"}
    if reference:
        names = {"reference": reference[0].base_name, "paper_reference": reference[0].paper.printed.name}
    formats = {Column(column.key, column.heading.format(**names)): style for column, style in IMITATED.items()}
    if not reference:
        formats = {column: style for column, style in formats.items() if not column.key.endswith("change")}
    return Table("imitated", "The paper's models that these runs imitate", IMITATED_TEXT, formats, rows)


def reference_of(groups: Sequence[Sequence[RunRecord]]) -> Sequence[RunRecord] | None:
    """The dense model to measure changes against: of the first preset that occurs, and only if it occurs once."""
    for preset in REFERENCES:
        found = [members for members in groups if members[0].paper.preset == preset]
        if found:
            return found[0] if len(found) == 1 and len(groups) > 1 else None
    return None


def fair(runs: Sequence[RunRecord], reference: Sequence[RunRecord]) -> bool:
    """Whether two models are as much smaller than the paper's and read as many words, within one per cent."""
    (run, other), ratio = (runs[0], reference[0]), runs[0].result["words"] / max(reference[0].result["words"], 1)
    return run.paper.times_width == other.paper.times_width and abs(ratio - 1) < 0.01


def relative(value: float | None, base: float | None) -> float | None:
    """The change from a base to a value as a share of the base."""
    return value / base - 1 if value is not None and base else None
