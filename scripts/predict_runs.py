"""Predicts the paper's largest runs on modern GPUs from counts, datasheets and assumed efficiencies: no measurement.

.venv/bin/python scripts/predict_runs.py            prints the table of docs/distributed.md
"""

import argparse
import json

import torch

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.describe import figures_of
from moe_lm.construction import build_model

# H200 SXM, NVIDIA's datasheet: dense bfloat16, float32, HBM3e, memory; NVLink 4 and NDR InfiniBand in one direction.
BFLOAT16, FLOAT32, HBM, MEMORY, NVLINK, NETWORK = 989e12, 67e12, 4.8e12, 141e9, 450e9, 50e9
# What is reached of each: assumptions, to be replaced by measurements of docs/gpu-checklist.md's machine.
OF_GROUPED, OF_DENSE, OF_LSTM, OF_HBM, OF_WIRES = 0.25, 0.4, 0.5, 0.7, 0.7
GPUS_OF_A_MACHINE = 8
# Bytes an expert's parameter costs in each pass over a micro-batch (read float32, write and twice read bfloat16, add
# the gradient to the last micro-batch's), and in a factored update (gradient twice, weight there and back).
PASS_BYTES, UPDATE_BYTES = 4 + 2 + 2 + 2 + 8, 4 + 4 + 8

RUNS = {
    "moe_4096_h": {"words": 300_000, "micro_words": 37_500, "all": 8.1e9, "name": "MoE-4096-h, 10 epochs of 1B words"},
    "news100b_moe_131072_h": {
        **{"words": 2_500_000, "micro_words": 19_532, "all": 100e9, "name": "MoE-131072-h, 100 B words"}
    },
}


def predicted(preset: str, num_processes: int) -> dict:
    """Return seconds of each part of a step, and what follows from them."""
    run = RUNS[preset]
    micro_words = min(run["micro_words"], -(-run["words"] // num_processes))
    config = resolved(
        composed(
            "describe",
            [
                f"model={preset}",
                f"num_processes={num_processes}",
                f"batch.words={run['words']}",
                f"batch.micro_words={micro_words}",
                "machine.precision=bfloat16",
                "machine.recompute=true",
                "optimizer.experts=factored",
            ],
        )
    )
    figures = figures_of(config, preset)
    with torch.device("meta"):
        model = build_model(config, figures["vocabulary_size"])
    tokens, turns = run["words"] / num_processes, -(-run["words"] // (micro_words * num_processes))
    layers = model.layers.values()
    mixtures = [layer for layer in layers if hasattr(layer, "experts")]
    of_experts = sum(layer.assignments_per_token * layer.experts.operations_per_row() for layer in mixtures)
    of_lstms = sum(layer.operations_per_timestep() for layer in layers if hasattr(layer, "lstm"))
    # Gates and the softmax; experts once more, as their hidden activations are made anew.
    others = figures["operations_per_timestep"] - of_experts - of_lstms + model.softmax.operations_per_timestep()
    held = figures["memory"]["experts"]["parameters"]
    away = _seconds_a_byte(num_processes)
    parts = {
        "LSTMs": 6 * of_lstms * tokens / (FLOAT32 * OF_LSTM),
        "gates, softmax": 6 * others * tokens / (BFLOAT16 * OF_DENSE),
        "experts": max(8 * of_experts * tokens / (BFLOAT16 * OF_GROUPED), held * PASS_BYTES * turns / (HBM * OF_HBM)),
        "update": held * UPDATE_BYTES / (HBM * OF_HBM),
        "all to all": figures["sent"]["tokens"] * away,
        "gradients": (figures["sent"]["gradients"] + figures["sent"]["rows"]) * away,
    }
    seconds = sum(parts.values())
    return {
        "run": run["name"],
        "gpus": num_processes,
        "memory_bytes": figures["memory"]["total"],
        "fits": figures["memory"]["total"] < 0.9 * MEMORY,
        "sent_tokens_bytes": figures["sent"]["tokens"],
        "sent_other_bytes": figures["sent"]["gradients"] + figures["sent"]["rows"],
        "seconds": parts,
        "seconds_a_step": seconds,
        "words_per_second": run["words"] / seconds,
        "hours": run["all"] / run["words"] * seconds / 3600,
    }


def _seconds_a_byte(num_processes: int) -> float:
    """Of what goes to all others alike: by NVLink inside a machine, by the network between machines."""
    inside = min(num_processes, GPUS_OF_A_MACHINE) - 1
    outside = num_processes - 1 - inside
    return (inside / NVLINK + outside / NETWORK) / (num_processes - 1) / OF_WIRES


def table(rows: list[dict]) -> str:
    """Return the predictions as markdown."""
    parts = list(rows[0]["seconds"])
    heads = ["run", "GPUs", "memory, GiB", *[f"{part}, ms" for part in parts], "step, ms", "M words/s", "hours"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        memory = f"{row['memory_bytes'] / 2**30:.0f}" + ("" if row["fits"] else " (too much)")
        times = [f"{1000 * row['seconds'][part]:.1f}" for part in parts]
        last = [f"{1000 * row['seconds_a_step']:.0f}", f"{row['words_per_second'] / 1e6:.2f}", f"{row['hours']:.1f}"]
        lines.append("| " + " | ".join([row["run"], str(row["gpus"]), memory, *times, *last]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the predictions for 8 to 128 GPUs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    rows = [predicted(preset, gpus) for preset in RUNS for gpus in (8, 16, 32, 64, 128)]
    print("\n".join(map(json.dumps, rows)) if options.json else table(rows))


if __name__ == "__main__":
    main()
