"""A run's directory to the model it trained, and to the text it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lm import checkpoint
from moe_lm.commands import build as make
from moe_lm.commands.data import existing_data, prepared_data
from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel
from moe_lm.prepared import Prepared
from moe_lm.run import Run
from moe_lm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, with what it takes to read text with it."""

    model: LanguageModel
    vocabulary: Vocabulary
    config: dict
    step: int
    fingerprint: str
    """Of the data it was trained on."""


def load(folder: str, which: str, on: torch.device) -> Trained:
    """Load a checkpoint (`last`, `best` or a step) of a run; raises `Mistake` where anything is amiss."""
    run = Run(make.existing(folder))
    config = run.config()
    make.check_targets(config)
    for group in ("corpus", "vocabulary", "softmax"):
        if config[group].get("_target_") not in make.packaged_targets(group):
            raise Mistake(f"{run.config_file} is damaged: {config[group].get('_target_')!r} is no {group}")
    try:
        recipe = make.build(config["vocabulary"])
        vocabulary = recipe.load(run.vocabulary)
        with torch.device("meta"):
            model = make.build_model(config, vocabulary.size)
    except (KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{run.config_file} is damaged: {error!r}") from error
    path = find(run, which)
    model = model.to_empty(device="cpu")
    checkpoint.load_model(path, model)
    return Trained(model.to(on).eval(), vocabulary, config, int(path.name), checkpoint.load_state(path)["data"])


def data_of(trained: Trained, run: str, folder: str | None, say: Callable[[str], None]) -> Prepared:
    """Return the prepared text of a run's training, from `folder` or where the training had it.

    It is prepared anew where it has gone; raises `Mistake` where the text is not what it was.
    """
    settings = trained.config | {"data": folder or str(trained.config.get("data", "data"))}
    # The token ids it was trained on, if they are there: then the text itself may have gone or changed.
    data = existing_data(settings, trained.fingerprint)
    if data is None:
        say(f"the token ids of its training are not in {settings['data']}: preparing them there")
        data = prepared_data(settings, say=say)
    if data.fingerprint != trained.fingerprint:
        raise Mistake(f"{run} was trained on other data than those in {settings['data']}: the text changed")
    return data


def find(run: Run, which: str) -> Path:
    """Return the folder of the checkpoint that `checkpoint=...` names."""
    steps = checkpoint.steps(run.checkpoints)
    if not steps:
        raise Mistake(f"{run.folder} has no checkpoint yet: train it first")
    last = checkpoint.path_of(run.checkpoints, steps[-1])
    if which == "last":
        return last
    if which == "best":
        best = checkpoint.load_state(last)["progress"]["best"]
        if best is None:
            raise Mistake(f"{run.folder} was never validated: no best checkpoint; use checkpoint=last")
        which = str(int(best["step"]))
    if not which.isdecimal() or int(which) not in steps:
        raise Mistake(f"{run.folder} has no checkpoint {which}: choose last, best or {', '.join(map(str, steps))}")
    return checkpoint.path_of(run.checkpoints, int(which))
