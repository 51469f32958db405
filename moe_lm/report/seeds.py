"""Runs that differ only by seed, gathered so that their spread can be shown."""

from collections.abc import Iterable

from moe_lm.report import RunRecord


def seed_groups(runs: Iterable[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Finished runs gathered by name without `seed=N` and preset, in order; a group may be a single run."""
    groups: dict[tuple, dict[int, RunRecord]] = {}
    for run in runs:
        if run.result is not None:
            # Keyed by seed: `moe_4` and `moe_4,seed=1` may be the same seed, which is no second sample.
            group = groups.setdefault((run.base_name, run.result.get("preset")), {})
            group.setdefault(run.result["seed"], run)
    return [(name, list(group.values())) for (name, _), group in groups.items()]
