"""What a finished run states: result.json."""

import math
import platform
from importlib.metadata import version

import torch

from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel
from moe_lm.operations import (
    operations_per_timestep,
    parameters_total,
    parameters_without_embedding_and_softmax,
)
from moe_lm.perplexity import Measured, measure
from moe_lm.prepared import Prepared
from moe_lm.trainer import Trainer


def measure_split(model: LanguageModel, config: dict, data: Prepared, split: str, limit: int | None = None) -> Measured:
    """Measure the model on a split (or its first sentences), in batches of the training's size."""
    words = config["batch"]["micro_words"]
    start = data.vocabulary.start
    return measure(model, data.splits[split], start=start, max_sentences=words, max_words=words, limit=limit)


def result_of(config: dict, preset: str, data: Prepared, trainer: Trainer) -> dict:
    """Return result.json's content: the last step's model, measured on all of valid and test."""
    model, progress = trainer.model, trainer.progress
    measured = {split: measure_split(model, config, data, split) for split in ("valid", "test")}
    if not all(math.isfinite(m.perplexity) for m in measured.values()):
        raise Mistake("the training diverged (no finite perplexity): lower optimizer.learning_rate under another name")
    return {
        "name": config["name"],
        "model": {key: value for key, value in config["model"].items() if key != "layers"},
        "preset": preset,
        "seed": config["seed"],
        "operations_per_timestep": operations_per_timestep(model),
        "parameters_without_embedding_and_softmax": parameters_without_embedding_and_softmax(model),
        "parameters_total": parameters_total(model),
        "steps": progress.step,
        "words": progress.words,
        "flops": trainer.flops(),
        "seconds": progress.seconds,
        "words_per_second": progress.words / progress.seconds,
        "device": torch.cuda.get_device_name() if model.embedding_VD.is_cuda else f"CPU {platform.machine()}",
        "num_processes": 1,
        "perplexity": {split: m.perplexity for split, m in measured.items()},
        "predicted_words": {split: m.words for split, m in measured.items()},
        "unigram_perplexity": {split: data.statistics[split]["unigram_perplexity"] for split in measured},
        "versions": {name: version(name) for name in ("moe-lm", "torch", "numpy", "hydra-core")}
        | {"python": platform.python_version()},
    }


def summary(result: dict) -> str:
    """Return the result in a line."""
    perplexity = result["perplexity"]
    return (
        f"test perplexity {perplexity['test']:.2f}, valid {perplexity['valid']:.2f} "
        f"after {result['words']:,} words in {result['seconds']:.0f} s"
    )
