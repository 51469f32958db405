"""moe-lm audit: whether a run's predictions see the future, and how many bits training's routing leaks."""

import json
from dataclasses import asdict
from pathlib import Path

from moe_lm.analysis.causality import TOLERANCE_BITS, Audit, audit
from moe_lm.atomic_io import replace_files
from moe_lm.checkpoint.export import output_path
from moe_lm.cli import log
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_of
from moe_lm.cli.validate_gates import gates_of
from moe_lm.data.corpus import SPLITS
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel, load

NOT_CAUSAL = 3


def main(arguments: list[str]) -> int:
    """Print the findings and write them to audit.json; return 3 if the evaluation is not causal."""
    config = resolved(composed("audit", arguments))
    if config["split"] not in SPLITS:
        raise UserError(f"split={config['split']}: choose {', '.join(SPLITS)}")
    if config["probes"] < 1:
        raise UserError(f"probes={config['probes']}: must be at least 1")
    trained_words = config["batch"]["words"] is None
    config["batch"]["words"] = 1 if trained_words else config["batch"]["words"]
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    words = trained.config["batch"]["micro_words"] if trained_words else config["batch"]["words"]
    split = data_of(trained, config["run"], config["data"], log).splits[config["split"]]
    vocabulary = trained.vocabulary
    found = audit(
        trained.model,
        split,
        start=vocabulary.start,
        end=vocabulary.end,
        words=words,
        probes=config["probes"],
        seed=config["seed"],
    )
    figures = figures_of(found, trained) | {"split": config["split"], "batch_words": words, "seed": config["seed"]}
    print(json.dumps(figures) if config["json"] else table(config["run"], figures), flush=True)
    # Reports read audit.json, which is about the last step.
    name = "audit.json" if config["checkpoint"] == "last" else f"audit-{trained.step}.json"
    place = output_path(Path(config["run"]), name)
    replace_files(place.parent, {place.name: (json.dumps(figures, indent=1) + "\n").encode()})
    if not found.causal:
        log(
            f"moe-lm: {config['run']} is not causal: a prediction moved by {found.evaluation.largest_bits:.2g} bits "
            "when words that it must not see were replaced; its perplexities mean nothing"
        )
        return NOT_CAUSAL
    return 0


def figures_of(found: Audit, trained: LoadedModel) -> dict:
    """Return the content of audit.json."""
    gates = {key: getattr(gate, "non_causal_note", None) for key, gate in gates_of(trained.model)}
    return {"step": trained.step, "causal": found.causal, **asdict(found), "gates": gates}


def table(run: str, figures: dict) -> str:
    """Return the audit as text."""
    evaluation, training = figures["evaluation"], figures["training"]
    lines = [
        f"{run} step {figures['step']}, {figures['split']}: {figures['probes']} probes in micro-batches of "
        f"{figures['batch_words']:,} words, {figures['compared_tokens']:,} predictions compared",
        f"evaluation: {'causal' if figures['causal'] else 'NOT CAUSAL'}, a prediction changes by at most "
        f"{evaluation['largest_bits']:.1e} bits (above {TOLERANCE_BITS:.0e} would be a leak)",
        f"training's choice leaks {training['mean_bits']:.4f} bits a token (at most {training['largest_bits']:.3g}); "
        f"the true words gain {training['gain_bits']:+.4f}",
    ]
    for key in ("later_words", "other_sentences"):
        what, leak = key.replace("_", " "), figures[key]
        lines.append(f"  by {what} alone {leak['mean_bits']:.4f}; gain {leak['gain_bits']:+.4f}")
    causal, by_training = figures["by_evaluation"], figures["by_training"]
    lines += [
        f"perplexity of these {figures['words']:,} words {causal['perplexity']:.3f}{_routing(causal)}",
        f"  with training's choice, which is not causal, {by_training['perplexity']:.3f}{_routing(by_training)}",
    ]
    return "\n".join([*lines, *(f"{key}: {note}" for key, note in figures["gates"].items() if note)])


def _routing(part: dict) -> str:
    if part["experts_per_token"] is None:
        return ""
    experts, unrouted = part["experts_per_token"], part["unrouted_fraction"]
    return f" by {experts:.2f} experts a token, {unrouted:.1%} of the tokens without any"
