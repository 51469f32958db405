"""moe-lm export: a trained model as one folder that opens anywhere, with a model card and checksums."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from moe_lm.checkpoint import checkpoint, export
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.describe import size
from moe_lm.cli.result import counts_of, versions
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel, load
from moe_lm.run import IDENTITY, Run

MEASURED = ("perplexity", "predicted_words", "unigram_perplexity")


def main(arguments: list[str]) -> int:
    """Write the folder `to`, whole or not at all; a folder that holds the same model already is left as it is."""
    config = resolved(composed("export", arguments))
    if not config["to"]:
        raise UserError("to=: name a folder that does not exist yet, as in to=exports/moe_4")
    source, to = Path(config["run"]), Path(config["to"])
    if config["max_file_bytes"] < 1:
        raise UserError(f"max_file_bytes={config['max_file_bytes']}: must be at least 1")
    if source.is_dir() and export.is_export(source):
        raise UserError(f"{source} is an export already: copy the folder")
    trained = load(source, str(config["checkpoint"]), torch.device("cpu"))
    run = Run(source)
    if _occupied(to):
        _refuse_another(to, run, trained)
        print(f"{to}: step {trained.step} of {source} is there already")
        return 0
    record = record_of(run, trained)
    export.write(to, record, lambda folder: _save(folder, record, trained, config["max_file_bytes"]))
    whole = size(sum(path.stat().st_size for path in to.rglob("*") if path.is_file()))
    print(f"{to}: step {trained.step} of {source}, {whole}; open it with run={to}")
    if "perplexity" not in record:
        print("no result.json holds its perplexity at this step, so the model card has none", file=sys.stderr)
    return 0


def record_of(run: Run, trained: LoadedModel) -> dict:
    """Return the content of export.json without the list of files."""
    config, result = trained.config, run.result()
    state = checkpoint.load_state(checkpoint.path_of(run.checkpoints, trained.step))
    record = {
        "name": _name(run, config),
        "step": trained.step,
        "words": state["progress"]["words"],
        "data": trained.fingerprint,
        "vocabulary": {"kind": config["vocabulary"]["_target_"].split(".")[-2], "size": trained.vocabulary.size},
        **asdict(counts_of(trained.model)),
        "versions": versions("torch", "safetensors"),
    }
    if result is not None and "preset" in result:
        record["preset"] = result["preset"]
    if result is not None and result.get("steps") == trained.step:
        record |= {key: result.get(key, {}) for key in MEASURED}
    return record


def _save(folder: Path, record: dict, trained: LoadedModel, max_file_bytes: int) -> None:
    export.save_weights(folder, trained.model, max_file_bytes)
    text = yaml.safe_dump(trained.config, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    (folder / "vocabulary").mkdir()
    trained.vocabulary.save(folder / "vocabulary")
    (folder / "README.md").write_text(export.model_card(record, trained.config), encoding="utf-8")


def _occupied(to: Path) -> bool:
    if to.exists() and not to.is_dir():
        raise UserError(f"to={to} is a file: name a folder that does not exist yet")
    return to.is_dir() and any(to.iterdir())


def _refuse_another(to: Path, run: Run, trained: LoadedModel) -> None:
    """Raise unless the folder holds an export of this very model."""
    other = f"{to} holds something else than step {trained.step} of {run.folder}"
    if not export.is_export(to):
        raise UserError(f"{other}: choose another to=... or empty it")
    there = load(to, "last", torch.device("cpu"))
    ours, theirs = trained.model.state_dict(), there.model.state_dict()
    same = (trained.step, trained.fingerprint) == (there.step, there.fingerprint)
    same &= _name(run, trained.config) == _name(run, there.config)
    same &= all(trained.config.get(key) == there.config.get(key) for key in IDENTITY)
    if not (same and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())):
        raise UserError(f"{other}: choose another to=... or delete it")


def _name(run: Run, config: dict) -> str:
    return str(config.get("name") or run.folder.resolve().name)
