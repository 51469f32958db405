"""moe-lm describe: operations, parameters, memory and communication of a model, before anything runs."""

import json
from dataclasses import asdict

import torch

from moe_lm.analysis.cost import (
    flops_per_word,
    operations_per_timestep,
    parameters_total,
    parameters_without_embedding_and_softmax,
)
from moe_lm.analysis.memory import StepSizes, accumulation_bytes, activation_bytes, logits_bytes, parameter_memory
from moe_lm.analysis.traffic import bytes_sent
from moe_lm.cli.config import composed, preset_of, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel
from moe_lm.optim import OptimizerRecipe
from moe_lm.report.paper import TABLE_8, paper_result

BENCHMARK, NEWS = 793_471, 100_000  # vocabulary sizes; the paper does not state the second, see docs/decisions/model.md


def main(arguments: list[str]) -> int:
    """Print the figures as a table or as one JSON object."""
    config = resolved(composed("describe", arguments))
    preset = preset_of(arguments)
    keys = [argument.partition("=")[0] for argument in arguments]
    changed = any("model." in key or key == "vocabulary_size" for key in keys)
    figures = {"preset": preset, **figures_of(config, preset), "printed": None if changed else _printed(preset)}
    print(json.dumps(figures) if config["json"] else table(figures))
    return 0


def figures_of(config: dict, preset: str) -> dict:
    """Return all figures of a resolved configuration, memory in bytes, without allocating any weight."""
    vocabulary_size, step = _vocabulary_size(config, preset), _step(config)
    with torch.device("meta"):
        model = build_model(config, vocabulary_size)
    recipe = build(config["optimizer"])
    return {
        "vocabulary_size": vocabulary_size,
        "operations_per_timestep": operations_per_timestep(model),
        "parameters_without_embedding_and_softmax": parameters_without_embedding_and_softmax(model),
        "parameters_total": parameters_total(model),
        "flops_per_word": flops_per_word(model),
        "num_processes": step.num_processes,
        "words_at_a_time": step.micro_tokens,
        "precision": config["machine"]["precision"],
        "recompute": step.recompute,
        "memory": _memory_of(model, recipe, step),
        "sent": bytes_sent(model, recipe, step),
    }


def _vocabulary_size(config: dict, preset: str) -> int:
    size = config["vocabulary_size"]
    if size is None:
        return NEWS if preset in TABLE_8 else BENCHMARK
    if not 1 <= size < 2**31:
        raise UserError(f"vocabulary_size={size}: must be at least 1 and below 2^31, or null")
    return size


def _step(config: dict) -> StepSizes:
    precision = config["machine"]["precision"]
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"machine.precision={precision}: choose float32 or bfloat16")
    return StepSizes(
        words=config["batch"]["words"],
        micro_words=config["batch"]["micro_words"],
        num_processes=config["num_processes"],
        recompute=config["machine"]["recompute"],
        bfloat16=precision == "bfloat16",
        expert_parallel_size=config["parallel"]["expert_size"],
        vocab_parallel=config["parallel"]["vocab"],
    )


def _memory_of(model: LanguageModel, recipe: OptimizerRecipe, step: StepSizes) -> dict:
    parts = parameter_memory(model, recipe, step)
    passing = {
        "activations": activation_bytes(model, step),
        "logits": logits_bytes(model, step),
        "second_gradients": accumulation_bytes(model, recipe, step),
    }
    kinds = {kind: asdict(part) | {"bytes_per_parameter": part.bytes_per_parameter} for kind, part in parts.items()}
    return kinds | passing | {"total": sum(part.total for part in parts.values()) + sum(passing.values())}


def table(figures: dict) -> str:
    """Return the figures as text."""
    return "\n".join([*_counts(figures), "", *_memory(figures), *_sent(figures)])


def _printed(preset: str) -> dict | None:
    row = paper_result(preset)
    return row and {key: value for key, value in asdict(row).items() if value is not None}


def _counts(figures: dict) -> list[str]:
    paper = figures["printed"] or {}
    rows = [
        ("operations a timestep", f"{figures['operations_per_timestep'] / 1e6:,.1f} M", "operations"),
        (
            "parameters without embedding and softmax",
            f"{figures['parameters_without_embedding_and_softmax'] / 1e6:,.1f} M",
            "parameters",
        ),
        ("parameters", f"{figures['parameters_total'] / 1e9:,.3f} B", "total"),
        ("training FLOPs a word", f"{figures['flops_per_word'] / 1e6:,.1f} M", ""),
    ]
    lines = [f"{figures['preset']}, {figures['vocabulary_size']:,} words in the vocabulary"]
    for name, value, key in rows:
        beside = f"   the paper prints {paper[key]}" if key in paper else ""
        lines.append(f"  {name:<42}{value:>14}{beside}")
    return lines


def _memory(figures: dict) -> list[str]:
    memory, several = figures["memory"], figures["num_processes"] > 1
    where = f"memory of each of {figures['num_processes']:,} processes" if several else "memory"
    lines = [
        f"{where}, {figures['words_at_a_time']:,} words at a time, {figures['precision']}"
        + (", hidden activations recomputed" if figures["recompute"] else ""),
        f"  {'':<12}{'parameters':>18}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'a parameter':>14}",
    ]
    for kind in ("experts", "vocabulary", "rest"):
        part = memory[kind]
        sizes = "".join(f"{size(part[key]):>12}" for key in ("weights", "gradients", "optimizer"))
        cost = f"{part['bytes_per_parameter']:.2f} bytes" if part["parameters"] else "-"
        lines.append(f"  {kind:<12}{part['parameters']:>18,}{sizes}{cost:>14}")
    lines += [
        f"  {'activations kept for the backward pass (estimate)':<54}{size(memory['activations']):>12}",
        f"  {'a block of logits':<54}{size(memory['logits']):>12}",
        f"  {'gradients of a further micro-batch':<54}{size(memory['second_gradients']):>12}",
        f"  {'together, temporaries left out':<54}{size(memory['total']):>12}",
    ]
    return lines


def _sent(figures: dict) -> list[str]:
    if figures["num_processes"] == 1:
        return []
    sent = figures["sent"]
    return [
        "",
        "sent by each process in a step (estimate)",
        f"  {'rows to experts and back, all to all':<54}{size(sent['tokens']):>12}",
        f"  {'gradients of what several processes hold, all-reduce':<54}{size(sent['gradients']):>12}",
        f"  {'rows of embedding and softmax, at most':<54}{size(sent['rows']):>12}",
    ]


def size(count: int) -> str:
    """Return a number of bytes with a binary unit, as in 1.00 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.2f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:,.2f} GiB"
