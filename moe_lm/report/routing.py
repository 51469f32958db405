"""Gates side by side: perplexity by the causal rule, balance, what is dropped, and what training's choice leaks."""

from collections.abc import Iterator, Mapping, Sequence

from moe_lm.report import Column, RunRecord, Table
from moe_lm.report.beside import row_of
from moe_lm.report.figures import LAST_LINES, mean_figures
from moe_lm.report.formats import bits, millions, percent, perplexity, plain, small
from moe_lm.report.seeds import seed_groups

FORMATS = {
    Column("gates", "gate"): str,
    Column("losses", "balance losses"): str,
    Column("test_perplexity", "test perplexity"): perplexity,
    Column("audited", "by an evaluation that is"): str,
    Column("operations_per_timestep", "ops/timestep (M)"): millions,
    Column("parameters_without_embedding_and_softmax", "parameters (M)"): millions,
    Column("cv_importance", "CV (importance)"): small,
    Column("cv_load", "CV (load)"): small,
    Column("max_over_mean_load", "max/mean load"): small,
    Column("max_over_mean_tokens", "max/mean tokens"): small,
    Column("dropped", "dropped"): percent,
    Column("words_per_second", "words/s"): plain,
    Column("audited_experts_per_token", "experts a token, evaluated"): small,
    Column("audited_unserved", "tokens without expert, evaluated"): percent,
    Column("leak_bits", "leak of training (bits/token)"): bits,
    Column("leak_of_later_words_bits", "of later words alone"): bits,
    Column("perplexity_shift", "perplexity, training's choice to evaluation's"): percent,
}
TEXT = (
    "Perplexity is by each gate's rule of evaluation, which looks at no other token; moe-lm audit says whether that is "
    "so, by replacing later words and other sentences. Balance and the share of dropped choices are of training "
    f"batches, means over the last {LAST_LINES} logged lines. The load of noisy top-k gating is the expected one "
    "(equation 10), without the chance of the draw, of other gates the tokens taken; max/mean tokens counts these for "
    "all gates alike. The leak is how much predictions change, in bits, when "
    "those words are replaced under training's choice: a lower bound, as lengths and numbers of sentences stay. The "
    "last column compares the perplexities of the audit's words: below 100 % the model does better with the whole "
    "batch in view, which is nothing it could do on new text."
)


def routing_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """One table where runs have several kinds of gates, or where a mixture was audited, else none."""
    groups = [(name, members) for name, members in seed_groups(runs) if members[0].result is not None]
    gated = [members for _, members in groups if members[0].is_moe]
    kinds = {gates(members[0]) for members in gated}
    if len(kinds) < 2 and not any(member.audit for members in gated for member in members):
        return []
    rows = [row_of(name, members, figures_of(members)) for name, members in groups]
    return [Table("routing", "Gates", TEXT, FORMATS, rows)]


def figures_of(runs: Sequence[RunRecord]) -> dict[str, float | str | None]:
    """The means over seeds, with the names of the gates and of the losses that reach them."""
    figures = dict(mean_figures(runs)) | {"gates": gates(runs[0]) or "none", "audited": audited(runs)}
    losses = runs[0].settings.get("balance")
    names = [name for name, part in losses.items() if isinstance(part, Mapping)] if isinstance(losses, Mapping) else []
    return figures | {"losses": ", ".join(names) if runs[0].is_moe and names else None}


def audited(runs: Sequence[RunRecord]) -> str:
    """What the audits of these runs say of their evaluation: `causal` only if each of them does."""
    found = [run.audit and run.audit["causal"] for run in runs]
    if False in found:
        return "NOT CAUSAL"
    return "not audited" if None in found else "causal"


def gates(run: RunRecord) -> str:
    """The kinds of a run's gates, in the order of its layers, each once: `switch`."""
    model = run.settings.get("model")
    layers = model.get("layers") if isinstance(model, Mapping) else None
    return ", ".join(dict.fromkeys(_named(layers))) if isinstance(layers, Mapping) else ""


def _named(layers: Mapping) -> Iterator[str]:
    for layer in layers.values():
        for part in ("primary_gate", "gate"):
            gate = layer.get(part) if isinstance(layer, Mapping) else None
            if isinstance(gate, Mapping):
                yield str(gate.get("_target_")).split(".")[-2]
