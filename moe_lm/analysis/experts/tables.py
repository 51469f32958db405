"""The tables of an inspection, as report's records: for the page and for the console."""

from collections.abc import Sequence

from moe_lm.analysis.experts import Expert, InspectedLayer
from moe_lm.report import Column, Row, Table
from moe_lm.report.formats import percent, plain, small

LAYERS = {
    Column("num_experts", "experts"): plain,
    Column("per_token", "experts a token"): small,
    Column("unserved", "tokens without an expert"): plain,
    Column("unused", "unused experts"): plain,
    Column("effective", "effective experts (load)"): small,
    Column("load_entropy", "entropy of load (bits)"): small,
    Column("effective_importance", "effective experts (importance)"): small,
    Column("entropy", "entropy of a token's gates (bits)"): small,
    Column("largest", "largest load share"): percent,
}
LAYERS_TEXT = (
    "Load: tokens that an expert serves. Importance: the sum of its gate values. The effective number is 2^entropy of "
    "the shares: as many experts with equal shares would have this entropy. A token's gate values have entropy 0 where "
    "one expert has all the weight, and log2 k bits where k experts share it equally."
)
GROUPS = {
    Column("tokens", "tokens"): plain,
    Column("load_share", "share of load"): percent,
    Column("importance_share", "share of importance"): percent,
    Column("used", "experts in use"): plain,
}
GROUPS_TEXT = (
    "Tokens: those that at least one expert of the group serves. Share of load: of all assignments to experts."
)
PAIRS = {
    Column("tokens", "tokens"): plain,
    Column("of_first", "of the first's"): percent,
    Column("of_second", "of the second's"): percent,
    Column("lift", "lift"): small,
}
PAIRS_TEXT = (
    "Tokens that both experts serve, their share of all that the first and the second serve, and the lift: that number "
    "over what it would be on average if each served its tokens independently of the other."
)
EXPERTS = {
    Column("load_share", "share of load"): percent,
    Column("importance_share", "share of importance"): percent,
    Column("entropy", "entropy (bits)"): small,
    Column("words", "most characteristic words"): str,
}
GLANCE = 6
"""Words of an expert that the console shows."""
EXPERTS_TEXT = "Those with most load; the page shows more of them, and inspect.json all."


def layers_table(layers: Sequence[InspectedLayer]) -> Table:
    """A row for each gated layer."""
    rows = [Row("run", layer.layer, figures_of(layer)) for layer in layers]
    return Table("layers", "Layers with a gate", LAYERS_TEXT, LAYERS, rows, names="layer")


def figures_of(layer: InspectedLayer) -> dict[str, float | None]:
    """The figures of a layer as a whole."""
    return {
        "num_experts": layer.num_experts,
        "per_token": layer.assignments / layer.tokens,
        "unserved": layer.unserved,
        "unused": layer.unused,
        "effective": layer.load_spread.effective,
        "load_entropy": layer.load_spread.entropy,
        "effective_importance": layer.importance_spread.effective,
        "entropy": layer.entropy,
        "largest": max(expert.load_share for expert in layer.experts),
    }


def groups_table(layer: InspectedLayer, most: int) -> Table | None:
    """The groups of a hierarchical mixture, those with most load first; None for another layer."""
    if not layer.groups:
        return None
    groups = sorted(layer.groups, key=lambda group: (-group.load, group.group))[:most]
    rows = [Row("run", f"group {group.group}", vars(group)) for group in groups]
    heading = f"Groups of {layer.layer}" + of_all(len(groups), len(layer.groups))
    return Table("groups", heading, GROUPS_TEXT, GROUPS, rows, names="group")


def pairs_table(layer: InspectedLayer, most: int) -> Table | None:
    """The pairs of experts that serve most tokens together; None where no token has two experts."""
    pairs = layer.pairs.most_frequent[:most]
    if not pairs:
        return None
    rows = []
    for pair in pairs:
        first, second = (layer.experts[i] for i in pair.experts)
        shares = {"of_first": pair.tokens / first.load, "of_second": pair.tokens / second.load}
        rows.append(Row("run", f"{first.expert} and {second.expert}", vars(pair) | shares))
    heading = f"Experts of {layer.layer} that serve the same tokens" + of_all(len(pairs), layer.pairs.distinct)
    text = (
        f"{PAIRS_TEXT} All pairs together have lift {layer.pairs.lift:.2f}: below 1, as an expert takes one of a "
        "token's few places from all others."
        if layer.pairs.lift < 1
        else f"{PAIRS_TEXT} All pairs together have lift {layer.pairs.lift:.2f}."
    )
    return Table("pairs", heading, text, PAIRS, rows, names="experts")


def busiest_table(layer: InspectedLayer, most: int) -> Table:
    """The experts with most load, in short."""
    rows = []
    for expert in busiest(layer, most):
        words = "  ".join(word.word for word in expert.words[:GLANCE])  # a comma may be one of them
        rows.append(Row("run", f"expert {expert.expert}", vars(expert) | {"words": words}))
    heading = f"Experts of {layer.layer}" + of_all(len(rows), layer.num_experts)
    return Table("experts", heading, EXPERTS_TEXT, EXPERTS, rows, names="expert")


def busiest(layer: InspectedLayer, most: int) -> list[Expert]:
    """At most this many experts that serve anything, by load, equal ones by number."""
    used = [expert for expert in layer.experts if expert.load]
    return sorted(used, key=lambda expert: (-expert.load, expert.expert))[:most]


def of_all(shown: int, all_: int) -> str:
    """What stands behind a heading where not everything is shown."""
    return "" if shown == all_ else f" ({shown:,} of {all_:,})"
