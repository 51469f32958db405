"""Loading a model and its vocabulary from the folder of a run or an export."""

from pathlib import Path

import torch
from torch import nn

from moe_lm.checkpoint import checkpoint, export
from moe_lm.construction import build, build_model, check_targets, is_target_of
from moe_lm.errors import UserError
from moe_lm.run import Run


def load(folder: Path, which: str, device: torch.device) -> dict[str, object]:
    """Return the fields of a `moe_lm.inference.LoadedModel`, read from a run's checkpoint or from an export.

    `which` is `last`, `best` or a step; an export has one step only. Raises `UserError`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: name a folder, as in runs/moe_4")
    is_export = export.is_export(folder)
    record = _export_record(folder, which) if is_export else {}
    run = Run(folder)  # an export has its configuration and vocabulary at the same paths as a run
    config = run.config()
    model, vocabulary = _build(config, run)
    path = folder if is_export else find_checkpoint(run, which)
    model = model.to_empty(device="cpu")
    if is_export:
        export.load_weights(folder, model, {})
        step, fingerprint = record["step"], record["data"]
    else:
        checkpoint.load_model(path, model, {})
        step, fingerprint = int(path.name), checkpoint.load_state(path)["data"]
    _check_finite(model, path)
    model = model.to(device).eval()
    return {"model": model, "vocabulary": vocabulary, "config": config, "step": step, "fingerprint": fingerprint}


def check_source(folder: Path, vocabulary: Path) -> dict:
    """Return the configuration of the run or export that a training starts from.

    Raises `UserError` if it is missing or altered, or its vocabulary differs from the one in the folder `vocabulary`.
    """
    if not folder.is_dir():
        raise UserError(f"init_from={folder} is no folder: name a run or an export, as in init_from=runs/moe_4")
    source = Run(folder)
    if export.is_export(folder):
        export.verify(folder)
    ours, theirs = ({file.name: file.read_bytes() for file in f.glob("*")} for f in (vocabulary, source.vocabulary))
    if ours != theirs:
        file = source.vocabulary / "vocabulary.txt"
        raise UserError(
            f"init_from={folder} has another vocabulary than this training: use the corpus and vocabulary keys that it "
            "was trained with" + (f", or vocabulary.file={file}" if file.exists() else "")
        )
    return source.config()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the folder of a run's last checkpoint, None for an export."""
    return None if export.is_export(folder) else find_checkpoint(Run(folder), "last")


def load_weights(folder: Path, path: Path | None, model: nn.Module, shards: checkpoint.Shards) -> None:
    """Load the weights of a run's checkpoint at `path`, or those of an export if there is none, in place."""
    if path is None:
        export.load_weights(folder, model, shards)
    else:
        checkpoint.load_model(path, model, shards)


def find_checkpoint(run: Run, which: str) -> Path:
    """Return the folder of a run's checkpoint: `last`, `best` or a step."""
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


def stored_model(folder: Path) -> nn.Module:
    """Return the model of a run's or export's configuration on the meta device."""
    return _build(Run(folder).config(), Run(folder))[0]


def _export_record(folder: Path, which: str) -> dict:
    record = export.verify(folder)
    if which != "last" and not (which.isdecimal() and int(which) == record["step"]):
        raise UserError(f"{folder} is an export of step {record['step']} and holds no other: omit checkpoint={which}")
    return record


def _check_finite(model: nn.Module, path: Path) -> None:
    """Raise `UserError` for infinite or NaN weights; the sum shows them without a second tensor of the same size."""
    for name, parameter in model.named_parameters():
        if not parameter.detach().sum().isfinite():
            raise UserError(f"{path} is damaged: {name} holds numbers that are not finite")


def _build(config: dict, run: Run) -> tuple[nn.Module, object]:
    """Return the model of a stored configuration on the meta device, and the vocabulary."""
    check_targets(config)
    for group in ("corpus", "vocabulary", "softmax"):
        if not is_target_of(group, target := config[group].get("_target_")):
            raise UserError(f"{run.config_file} is damaged: {target!r} is no {group}")
    try:
        vocabulary = build(config["vocabulary"]).load(run.vocabulary)
        with torch.device("meta"):
            return build_model(config, vocabulary.size), vocabulary
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.config_file} is damaged: {error!r}") from error
