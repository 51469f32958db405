"""What experts buy: perplexity against their number, and what a dense model of the same perplexity would cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from moe_lm.report import Column, Row, RunRecord, Table
from moe_lm.report.formats import perplexity, times
from moe_lm.report.runs import seed_groups

COSTS = {
    "operations_per_timestep": "operations",
    "parameters_without_embedding_and_softmax": "parameters w/o embedding, softmax",
    "flops": "training FLOPs",
}
LEAVES_OPEN = 0.2
"""Largest share of the variance of log perplexity that a fitted power law may leave unexplained."""
LEVERAGE_TEXT = (
    "How many times its own cost a dense model needs for the perplexity of a mixture: dense models of different width "
    "({dense}) are joined by straight lines in log perplexity over log cost, and nothing is extrapolated. > means that "
    "no dense model here reaches the perplexity, < that the smallest one is better. In brackets: the smallest and the "
    "largest figure of single seeds, each compared with the dense models of the same seed."
)
Point = tuple[float, float]


@dataclass(frozen=True)
class Law:
    """perplexity = floor + factor * experts^-exponent, fitted to counts of experts at equal operations."""

    floor: float
    factor: float
    exponent: float

    def __call__(self, experts: float) -> float:
        """Return the perplexity of a number of experts."""
        return self.floor + self.factor * experts**-self.exponent

    def __str__(self) -> str:
        floor = f"{self.floor:.1f} + " if self.floor else ""
        return f"{floor}{self.factor:.1f} · E^−{self.exponent:.2f}"


@dataclass(frozen=True)
class Family:
    """Mixtures that differ only in the number of experts: (experts, mean test perplexity), ascending."""

    label: str
    points: tuple[Point, ...]

    @property
    def doublings(self) -> int:
        """Number of doublings from the fewest experts to the most, rounded up."""
        return math.ceil(math.log2(self.points[-1][0] / self.points[0][0]))

    def law(self) -> Law | None:
        """Return the fitted law, None where fewer than three counts, or too much scatter, do not carry one."""
        return fit_law(self.points)


def scaling_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a table of leverage and a table of fits, where the runs have what these need."""
    return [*leverage_tables(runs), *fit_tables(runs)]


def families(runs: Sequence[RunRecord]) -> list[Family]:
    """Return the flat mixtures with at least three numbers of experts, whose other settings are equal."""
    found: dict[tuple, dict[int, list[float]]] = {}
    for _, members in seed_groups(runs):
        sizes, losses = mixture_sizes(members[0]), [run.perplexity("test") for run in members]
        if sizes and all(loss is not None and math.isfinite(loss) for loss in losses):
            experts, rest = sizes
            found.setdefault(rest, {}).setdefault(experts, []).append(fmean(losses))
    return [
        Family(f"{k} of E experts of {hidden} hidden units", tuple(sorted((e, fmean(v)) for e, v in counts.items())))
        for (_, hidden, k, *_), counts in found.items()
        if len(counts) >= 3
    ]


def mixture_sizes(run: RunRecord) -> tuple[int, tuple] | None:
    """Return the number of experts and the other sizes of a run's only flat mixture, None for other models."""
    model = run.settings.get("model")
    layers = model.get("layers") if isinstance(model, Mapping) else None
    order = model.get("order") if isinstance(layers, Mapping) else None
    chosen = [layers.get(name) for name in order] if isinstance(order, list) else []
    mixtures = [layer for layer in chosen if isinstance(layer, Mapping) and "num_experts" in layer]
    if len(mixtures) != 1 or "num_groups" in mixtures[0]:
        return None
    [layer] = mixtures
    gate = layer["gate"].get("_target_") if isinstance(layer.get("gate"), Mapping) else None
    experts, width, hidden, k = (layer.get(key) for key in ("num_experts", "width", "hidden", "k"))
    if not all(isinstance(size, int) for size in (experts, width, hidden, k)):
        return None
    return experts, (width, hidden, k, gate, layer.get("num_shared_experts"))


def fit_law(points: Sequence[Point]) -> Law | None:
    """Fit a power law in least squares of perplexity, with a floor if there are at least four points."""
    if len(points) < 3:
        return None
    mean = fmean(y for _, y in points)
    variance = sum((y - mean) ** 2 for _, y in points)
    with_floor = len(points) >= 4
    laws = [law for step in range(1, 301) if (law := _law_of(points, step / 100, with_floor))]
    best = min(laws, key=lambda law: _left(points, law), default=None)
    if best is None or variance == 0 or _left(points, best) > LEAVES_OPEN * variance:
        return None
    return best


def _left(points: Sequence[Point], law: Law) -> float:
    return sum((y - law(x)) ** 2 for x, y in points)


def _law_of(points: Sequence[Point], exponent: float, with_floor: bool) -> Law | None:
    """Return the best law of this exponent; None if its perplexity does not fall, or its floor is not positive."""
    xs, ys = [x**-exponent for x, _ in points], [y for _, y in points]
    if not with_floor:
        return Law(0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs), exponent)
    mean_x, mean_y = fmean(xs), fmean(ys)
    factor = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    floor = mean_y - factor * mean_x
    return Law(floor, factor, exponent) if factor > 0 and floor > 0 else None


def fit_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a row for each number of experts with the fitted perplexity and the residual."""
    rows, texts = [], []
    for family in families(runs):
        law = family.law()
        texts.append(f"{family.label}: " + (f"perplexity = {law}" if law else "no power law fits"))
        for experts, found in family.points:
            fitted = {"fitted": law(experts), "residual": found - law(experts)} if law else {}
            rows.append(Row("run", f"{experts} experts", {"test_perplexity": found, **fitted}))
    if not rows:
        return []
    formats = {
        Column("test_perplexity", "test perplexity"): perplexity,
        Column("fitted", "fitted"): perplexity,
        Column("residual", "residual"): lambda value: f"{value:+.2f}".replace("-", "−"),
    }
    text = "Test perplexity (mean over seeds) against the number of experts at equal operations but for the gate. "
    return [Table("experts", "Number of experts", f"{text}{'; '.join(texts)}.", formats, rows, names="mixture")]


def leverage_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a row for each mixture if there are dense models of at least three different costs."""
    dense = _dense_family(runs)
    mixtures = [(name, members) for name, members in seed_groups(runs) if members[0].is_moe]
    if not dense or not mixtures:
        return []
    rows = []
    for name, members in mixtures:
        figures = {"test_perplexity": fmean(run.perplexity("test") or math.nan for run in members)}
        figures |= {f"leverage_{key}": _leverage_text(members, dense, key) for key in COSTS}
        rows.append(Row("run" if len(members) == 1 else "mean", name, figures, len(members)))
    formats = {Column("test_perplexity", "test perplexity"): perplexity}
    formats |= {Column(f"leverage_{key}", f"leverage in {label}"): str for key, label in COSTS.items()}
    names = ", ".join(f"{name} {perplexity(fmean(run.perplexity('test') for run in runs))}" for name, runs in dense)
    return [Table("leverage", "Leverage", LEVERAGE_TEXT.format(dense=names), formats, rows)]


def _dense_family(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Return the dense models of the preset that has the most different costs, at least three."""
    presets: dict[str, list[tuple[str, list[RunRecord]]]] = {}
    for name, members in seed_groups(runs):
        if not members[0].is_moe and all(run.perplexity("test") for run in members):
            presets.setdefault(str(members[0].result.get("preset")), []).append((name, members))
    best = max(presets.values(), key=_num_costs, default=[])
    return best if _num_costs(best) >= 3 else []


def _num_costs(groups: Sequence[tuple[str, list[RunRecord]]]) -> int:
    return len({members[0].result["operations_per_timestep"] for _, members in groups})


def _leverage_text(members: Sequence[RunRecord], dense: Sequence[tuple[str, list[RunRecord]]], key: str) -> str:
    whole = leverage(_mean_point(members, key), [_mean_point(runs, key) for _, runs in dense])
    single = []
    for run in members:
        same_seed = [[other for other in runs if other.result["seed"] == run.result["seed"]] for _, runs in dense]
        if all(same_seed):
            single.append(leverage(_mean_point([run], key), [_mean_point(runs, key) for runs in same_seed]))
    text = _bounded(whole)
    if len(single) > 1:
        low, high = min(single, key=lambda found: found[0]), max(single, key=lambda found: found[0])
        text += f" ({_bounded(low)} to {_bounded(high)})"
    return text


def _bounded(found: tuple[float, str]) -> str:
    value, bound = found
    return f"{bound} {times(value)}".strip()


def _mean_point(runs: Sequence[RunRecord], key: str) -> Point:
    return fmean(run.result[key] for run in runs), fmean(run.perplexity("test") for run in runs)


def leverage(mixture: Point, dense: Sequence[Point]) -> tuple[float, str]:
    """Return the cost of a dense model of the mixture's perplexity over the mixture's cost, and `>` or `<` for a bound.

    Points are (cost, perplexity). The dense curve is followed from its cheapest model to the first one that is as good.
    """
    (cost, wanted), curve = mixture, sorted(dense)
    if curve[0][1] <= wanted:
        return curve[0][0] / cost, "<" if curve[0][1] < wanted else ""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= wanted < y0:
            share = math.log(y0 / wanted) / math.log(y0 / y1)
            return x0 * (x1 / x0) ** share / cost, ""
    return curve[-1][0] / cost, ">"
