"""Scaling with the number of experts: power-law fits of perplexity, and leverage over dense models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, linear_regression
from string import ascii_uppercase

from moe_lm.config_files import flatten
from moe_lm.report import Column, Row, RunRecord, Table
from moe_lm.report.axes import positive
from moe_lm.report.formats import perplexity, times
from moe_lm.report.runs import seed_groups

COSTS = {
    "operations_per_timestep": "operations",
    "parameters_without_embedding_and_softmax": "parameters w/o embedding, softmax",
    "flops": "training FLOPs",
}
MAX_UNEXPLAINED = 0.2
"""Largest unexplained share of the variance, 1 - R^2, of a fit that is reported."""
_EXPONENTS, _STEPS = (0.05, 2.0), 800
_RATIO = (_EXPONENTS[1] / _EXPONENTS[0]) ** (1 / _STEPS)
_COMPARED = ("model", "corpus", "vocabulary", "batch", "softmax", "optimizer", "schedule", "balance")
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
        return f"{floor}{self.factor:.1f} · E^−{self.exponent:.2g}"


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
        """Return the fitted law, or None if there are fewer than three counts or the fit is poor."""
        return fit_law(self.points)


def scaling_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a table of leverage and a table of fits, where the runs have what these need."""
    return [*leverage_tables(runs), *fit_tables(runs)]


def families(runs: Sequence[RunRecord]) -> list[Family]:
    """Return the flat mixtures with at least three numbers of experts, whose other settings are equal."""
    found: dict[tuple, dict[int, float]] = {}
    for _, members in seed_groups(runs):
        experts = _num_experts(members[0])
        if experts and all(positive(run.perplexity("test")) for run in members):
            others = found.setdefault(_settings_but_for(members[0], "num_experts"), {})
            others[experts] = fmean(run.perplexity("test") for run in members)
    counts = [tuple(sorted(points.items())) for points in found.values() if len(points) >= 3]
    labels = ["mixtures"] if len(counts) == 1 else [f"mixtures {letter}" for letter in ascii_uppercase]
    return [Family(label, points) for label, points in zip(labels, counts, strict=False)]


def dense_perplexities(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Return the mean test perplexity of each dense model by name."""
    dense = [(name, members) for name, members in seed_groups(runs) if not members[0].is_moe]
    found = {name: [run.perplexity("test") for run in members] for name, members in dense}
    return {name: fmean(values) for name, values in found.items() if all(map(positive, values))}


def _num_experts(run: RunRecord) -> int | None:
    """Return the number of experts of a model with a single, flat mixture, and None for any other model."""
    mixtures = [layer for layer in run.layers if "num_experts" in layer]
    if len(mixtures) != 1 or "num_groups" in mixtures[0]:
        return None
    experts = mixtures[0]["num_experts"]
    return experts if isinstance(experts, int) and experts >= 1 else None


def _settings_but_for(run: RunRecord, *names: str) -> tuple:
    """Return the settings that two runs of a family share: all but the seed and the keys that end in one of `names`."""
    settings = flatten({key: run.settings.get(key) for key in _COMPARED})
    kept = {key: str(value) for key, value in settings.items() if key.rpartition(".")[2] not in names}
    return (run.result["words"] // 1_000_000, *sorted(kept.items()))


def fit_law(points: Sequence[Point]) -> Law | None:
    """Fit a power law in least squares: with a floor where at least four points have one, else in log perplexity."""
    if len(points) < 3:
        return None
    mean = fmean(y for _, y in points)
    variance = sum((y - mean) ** 2 for _, y in points)
    law = (_with_floor(points) if len(points) >= 4 else None) or _without_floor(points)
    if law is None or variance == 0 or _left(points, law) > MAX_UNEXPLAINED * variance:
        return None
    return law


def _left(points: Sequence[Point], law: Law) -> float:
    return sum((y - law(x)) ** 2 for x, y in points)


def _without_floor(points: Sequence[Point]) -> Law | None:
    slope, height = linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return Law(0.0, math.exp(height), -slope) if slope < 0 else None


def _with_floor(points: Sequence[Point]) -> Law | None:
    """Search the exponent on a grid of ratios; None where the best one is at an end, or the floor is not positive."""
    laws = [_law_of(points, _EXPONENTS[0] * _RATIO**step) for step in range(_STEPS + 1)]
    place = min(range(len(laws)), key=lambda step: _left(points, laws[step]))
    law = laws[place]
    return law if 0 < place < _STEPS and law.factor > 0 and law.floor > 0 else None


def _law_of(points: Sequence[Point], exponent: float) -> Law:
    """Return the best law of this exponent."""
    factor, floor = linear_regression([x**-exponent for x, _ in points], [y for _, y in points])
    return Law(floor, factor, exponent)


def fit_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a row for each number of experts with the fitted perplexity and the residual."""
    rows, texts = [], []
    found = families(runs)
    for family in found:
        law = family.law()
        subject = "The fit" if len(found) == 1 else f"The fit to {family.label}"
        texts.append(f"{subject}: perplexity = {law}." if law else f"{subject}: no power law.")
        for experts, measured in family.points:
            fitted = {"fitted": law(experts), "residual": measured - law(experts)} if law else {}
            name = f"{experts} experts" + ("" if len(found) == 1 else f" ({family.label})")
            rows.append(Row("run", name, {"test_perplexity": measured, **fitted}))
    if not rows:
        return []
    formats = {
        Column("test_perplexity", "test perplexity"): perplexity,
        Column("fitted", "fitted"): perplexity,
        Column("residual", "residual"): lambda value: f"{value:+.2f}".replace("-", "−"),
    }
    text = "Test perplexity (mean over seeds) against the number of experts at equal operations but for the gate. "
    return [Table("experts", "Number of experts", f"{text}{' '.join(texts)}", formats, rows, names="mixture")]


def leverage_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return a row for each mixture if there are dense models of at least three different costs."""
    dense = _dense_family(runs)
    alike = _text_and_length(dense[0][1][0]) if dense else None
    mixtures = [
        (name, members)
        for name, members in seed_groups(runs)
        if members[0].is_moe and all(map(_can_be_placed, members)) and _text_and_length(members[0]) == alike
    ]
    if not mixtures:
        return []
    rows = []
    for name, members in mixtures:
        figures = {"test_perplexity": fmean(run.perplexity("test") for run in members)}
        figures |= {f"leverage_{key}": _leverage_text(members, dense, key) for key in COSTS}
        rows.append(Row("run" if len(members) == 1 else "mean", name, figures, len(members)))
    formats = {Column("test_perplexity", "test perplexity"): perplexity}
    formats |= {Column(f"leverage_{key}", f"leverage in {label}"): str for key, label in COSTS.items()}
    names = ", ".join(f"{name} {perplexity(fmean(run.perplexity('test') for run in runs))}" for name, runs in dense)
    return [Table("leverage", "Leverage", LEVERAGE_TEXT.format(dense=names), formats, rows)]


def _dense_family(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Return the dense models of equal preset, text and length that have the most different costs, at least three."""
    found: dict[tuple, list[tuple[str, list[RunRecord]]]] = {}
    for name, members in seed_groups(runs):
        if not members[0].is_moe and all(map(_can_be_placed, members)):
            key = (str(members[0].result.get("preset")), _text_and_length(members[0]))
            found.setdefault(key, []).append((name, members))
    best = max(found.values(), key=_num_costs, default=[])
    return best if _num_costs(best) >= 3 else []


def _can_be_placed(run: RunRecord) -> bool:
    """Whether a run has a test perplexity and all costs, on logarithmic axes."""
    return positive(run.perplexity("test")) and all(positive(run.result[key]) for key in COSTS)


def _text_and_length(run: RunRecord) -> tuple:
    """Return what runs must have in common to be compared: text, vocabulary, words of a batch and of the training."""
    shared = flatten({key: run.settings.get(key) for key in ("corpus", "vocabulary", "batch")})
    return (run.result["words"] // 1_000_000, *sorted((key, str(value)) for key, value in shared.items()))


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
    """Return the leverage: the cost of an equally good dense model over the mixture's cost. `>` or `<` marks a bound.

    Points are (cost, perplexity). The search along the dense curve begins at its cheapest model.
    """
    (cost, wanted), curve = mixture, sorted(dense)
    if curve[0][1] <= wanted:
        return curve[0][0] / cost, "<" if curve[0][1] < wanted else ""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= wanted < y0:
            share = math.log(y0 / wanted) / math.log(y0 / y1)
            return x0 * (x1 / x0) ** share / cost, ""
    return curve[-1][0] / cost, ">"
