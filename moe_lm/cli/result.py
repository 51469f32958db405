"""result.json: the sizes, costs and perplexities of a finished run."""

import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from tqdm import tqdm

from moe_lm import __version__
from moe_lm.analysis.cost import (
    operations_per_timestep,
    parameters_total,
    parameters_without_embedding_and_softmax,
)
from moe_lm.analysis.perplexity import EvalResult, evaluate
from moe_lm.data.prepared import Prepared
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.train.trainer import Trainer


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of these packages, of Python, and of moe-lm, which may run uninstalled from a checkout."""
    return {"moe-lm": __version__, **{name: version(name) for name in packages}, "python": platform.python_version()}


def measure_split(
    model: LanguageModel,
    config: dict,
    data: Prepared,
    split: str,
    limit: int | None = None,
    on_progress: Callable[[int], object] = int,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> EvalResult:
    """Measure the model on a split, or on its first `limit` sentences, with micro-batches of the training's size."""
    words, start = config["batch"]["micro_words"], data.vocabulary.start
    return evaluate(
        model,
        data.splits[split],
        start=start,
        max_sentences=words,
        max_words=words,
        limit=limit,
        on_progress=on_progress,
        parallel=parallel,
    )


@dataclass(frozen=True)
class Counts:
    """Operations and parameters of a model as the paper counts them, over all processes."""

    operations_per_timestep: int
    parameters_without_embedding_and_softmax: int
    parameters_total: int


def counts_of(model: LanguageModel) -> Counts:
    """Count an unsharded model on any device."""
    return Counts(
        operations_per_timestep(model), parameters_without_embedding_and_softmax(model), parameters_total(model)
    )


def measuring_bar(split: str, num_words: int, hidden: bool = False) -> tqdm:
    """Return the progress bar of a measurement; without a terminal it prints only after 20 s."""
    seen = sys.stderr.isatty()
    return tqdm(
        total=num_words,
        desc=split,
        unit="word",
        unit_scale=True,
        delay=0 if seen else 20,
        mininterval=0.5 if seen else 20,
        dynamic_ncols=True,
        disable=hidden,
    )


def result_of(config: dict, preset: str, data: Prepared, trainer: Trainer, counts: Counts) -> dict:
    """Return the content of result.json; all processes measure the last step's model on all of valid and test."""
    model, progress, parallel = trainer.model, trainer.progress, trainer.parallel
    measured = {}
    for split in ("valid", "test"):
        with measuring_bar(split, data.splits[split].num_words, hidden=not parallel.is_first) as bar:
            measured[split] = measure_split(model, config, data, split, on_progress=bar.update, parallel=parallel)
    if not all(math.isfinite(m.perplexity) for m in measured.values()):
        raise UserError(
            "the training diverged (no finite perplexity): lower optimizer.learning_rate under another name"
        )
    return {
        "name": config["name"],
        "model": {key: value for key, value in config["model"].items() if key != "layers"},
        "preset": preset,
        "seed": config["seed"],
        **asdict(counts),
        "steps": progress.step,
        "words": progress.words,
        "flops": trainer.flops(),
        "seconds": progress.seconds,
        "words_per_second": progress.words / progress.seconds,
        "device": torch.cuda.get_device_name() if model.embedding.weight_VD.is_cuda else f"CPU {platform.machine()}",
        "num_processes": parallel.size,
        "perplexity": {split: m.perplexity for split, m in measured.items()},
        "predicted_words": {split: m.words for split, m in measured.items()},
        "unigram_perplexity": {split: data.statistics[split]["unigram_perplexity"] for split in measured},
        "versions": versions("torch", "numpy", "hydra-core"),
    }


def summary(result: dict) -> str:
    """Return the result in one line."""
    perplexity = result["perplexity"]
    return (
        f"test perplexity {perplexity['test']:.2f}, valid {perplexity['valid']:.2f} "
        f"after {result['words']:,} words in {result['seconds']:.0f} s"
    )
