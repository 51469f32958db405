"""A run's or an export's folder to its model: what it takes to read text with it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lm.analysis.perplexity import measure
from moe_lm.analysis.sample import Drawing, sample
from moe_lm.analysis.score import Scored, scored, split_of
from moe_lm.checkpoint import checkpoint, weights
from moe_lm.checkpoint import export_io as exported
from moe_lm.construction import build, build_model, check_targets, packaged_targets
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError
from moe_lm.model.language_model import LanguageModel
from moe_lm.parallel.context import SINGLE_PROCESS, ParallelContext
from moe_lm.run import Run

MAX_SENTENCES, MAX_WORDS = 256, 16_384
"""Of a batch where nobody says otherwise, as in configs/evaluate.yaml: memory and speed, not the result."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, with what it takes to read text with it."""

    model: LanguageModel
    vocabulary: Vocabulary
    config: dict
    step: int
    fingerprint: str
    """Of the data it was trained on."""

    def perplexity(self, sentences: Iterable[str]) -> float:
        """Return the perplexity a word, `</S>` included, of sentences of words separated by spaces.

        It is what `moe-lm evaluate` makes of the same sentences; empty ones are none. Raises `UserError` without any.
        """
        if isinstance(sentences, str):
            raise UserError("perplexity takes a list of sentences: perplexity([sentence])")
        split = split_of(self.vocabulary, (sentence for sentence in sentences if sentence.strip()))
        if split.num_sentences == 0:
            raise UserError("perplexity needs a sentence: all that were given are empty")
        start = self.vocabulary.start
        return measure(self.model, split, start=start, max_sentences=MAX_SENTENCES, max_words=MAX_WORDS).perplexity

    def log10(self, sentence: str) -> float:
        """Return the log10 probability of a sentence, its end included, as `moe-lm score` does."""
        return self.score(sentence).log10

    def score(self, sentence: str) -> Scored:
        """Return the sentence's words with the log10 probability of each."""
        [only] = scored(self.model, self.vocabulary, [sentence], max_words=MAX_WORDS)
        return only

    def sample(self, prefix: str = "", *, num: int = 5, seed: int = 1, **how: float | bool | None) -> list[str]:
        """Return `num` sentences as `moe-lm sample` draws them; `how` are the fields of `sampling.Drawing`."""
        drawing = Drawing(**how)
        several = (sample(self.model, self.vocabulary, prefix, seed=seed, number=i, how=drawing) for i in range(num))
        return [one.sentence for one in several]


def load(folder: str | Path, which: str, on: torch.device) -> LoadedModel:
    """Load a checkpoint (`last`, `best` or a step) of a run, or an export, which has one; raises `UserError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: name a folder, as in runs/moe_4")
    if exported.is_export(folder):
        return _load_export(folder, which, on)
    run = Run(folder)
    config = run.config()
    model, vocabulary = _empty(config, run)
    path = find(run, which)
    model = model.to_empty(device="cpu")
    checkpoint.load_model(path, model)
    fingerprint = checkpoint.load_state(path)["data"]
    _refuse_not_finite(model, path)
    return LoadedModel(model.to(on).eval(), vocabulary, config, int(path.name), fingerprint)


def _load_export(folder: Path, which: str, on: torch.device) -> LoadedModel:
    record = exported.opened(folder)
    step = record["step"]
    if which != "last" and not (which.isdecimal() and int(which) == step):
        raise UserError(f"{folder} is an export of step {step} and holds no other: leave checkpoint={which} away")
    run = Run(folder)  # its configuration and vocabulary stand where a run's do
    config = run.config()
    model, vocabulary = _empty(config, run)
    model = model.to_empty(device="cpu")
    weights.load(folder, model)
    _refuse_not_finite(model, folder)
    return LoadedModel(model.to(on).eval(), vocabulary, config, step, record["data"])


def fill(model: LanguageModel, folder: Path, vocabulary: Path, parallel: ParallelContext = SINGLE_PROCESS) -> None:
    """Fill a model with the weights of another run (its last checkpoint) or of an export, for a training from there.

    Raises `UserError` where shapes differ, or the words of its vocabulary from those in the folder `vocabulary`.
    """
    if not folder.is_dir():
        raise UserError(f"init={folder} is no folder: name the folder of a run or an export, as in init=runs/moe_4")
    source, is_export = Run(folder), exported.is_export(folder)
    if is_export:
        exported.opened(folder)
    words = [{path.name: path.read_bytes() for path in each.glob("*")} for each in (vocabulary, source.vocabulary)]
    if words[0] != words[1]:
        file = source.vocabulary / "vocabulary.txt"
        raise UserError(
            f"init={folder} has another vocabulary than this training: the same corpus and vocabulary keys make the "
            "same one" + (f", or vocabulary.file={file}" if file.exists() else "")
        )
    if is_export:
        weights.load(folder, model)
    else:
        # Found once: a run that still trains may have another last checkpoint a moment later.
        checkpoint.load_model(parallel.first(lambda: find(source, "last")), model)


def find(run: Run, which: str) -> Path:
    """Return the folder of the checkpoint that `checkpoint=...` names."""
    steps = checkpoint.steps(run.checkpoints)
    if not steps:
        raise UserError(f"{run.folder} has no checkpoint yet: train it first")
    last = checkpoint.path_of(run.checkpoints, steps[-1])
    if which == "last":
        return last
    if which == "best":
        best = checkpoint.load_state(last)["progress"]["best"]
        if best is None:
            raise UserError(f"{run.folder} was never validated: no best checkpoint; use checkpoint=last")
        which = str(int(best["step"]))
    if not which.isdecimal() or int(which) not in steps:
        raise UserError(f"{run.folder} has no checkpoint {which}: choose last, best or {', '.join(map(str, steps))}")
    return checkpoint.path_of(run.checkpoints, int(which))


def _refuse_not_finite(model: LanguageModel, folder: Path) -> None:
    """Raise for weights that training never leaves behind; their sum tells, without a second tensor as large."""
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum().isfinite():
            raise UserError(f"{folder} is damaged: {name} holds numbers that are not finite")


def _empty(config: dict, run: Run) -> tuple[LanguageModel, Vocabulary]:
    """Return the model of a stored configuration, without any weight in memory yet, and the vocabulary."""
    check_targets(config)
    for group in ("corpus", "vocabulary", "softmax"):
        if config[group].get("_target_") not in packaged_targets(group):
            raise UserError(f"{run.config_file} is damaged: {config[group].get('_target_')!r} is no {group}")
    try:
        vocabulary = build(config["vocabulary"]).load(run.vocabulary)
        with torch.device("meta"):
            return build_model(config, vocabulary.size), vocabulary
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.config_file} is damaged: {error!r}") from error
