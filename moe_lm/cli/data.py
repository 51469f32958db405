"""A configuration's, or a trained model's, corpus and vocabulary to prepared data."""

import json
import os
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from moe_lm.checkpoint.export_io import is_export
from moe_lm.cli.machine import build
from moe_lm.data.prepared import Prepared, open_prepared, prepare
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel


def prepared_data(config: dict, say: Callable[[str], None]) -> Prepared:
    """Return the token ids of `corpus` and `vocabulary`, prepared now unless they lie in `data` already.

    Large text is prepared by `parallel` of the configuration, else one for each core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {"corpus": config["corpus"], "vocabulary": config["vocabulary"]}
    return prepare(
        corpus=build(config["corpus"]),
        recipe=build(config["vocabulary"]),
        folder=data_folder(config),
        settings=settings,
        say=say,
        progress=sys.stderr.isatty(),
        num_processes=config.get("processes") or cores,
    )


def data_of(trained: LoadedModel, run: str, folder: str | None, say: Callable[[str], None]) -> Prepared:
    """Return the prepared text of a run's training, from `folder` or where the training had it.

    It is prepared anew where it has gone; raises `UserError` where text or vocabulary are not what they were. An export,
    which may be another's, does not say where data go.
    """
    had = "data" if is_export(Path(run)) else str(trained.config.get("data", "data"))
    settings = trained.config | {"data": folder or had}
    # The token ids it was trained on, if they are there: then the text itself may have gone or changed.
    data = existing_data(settings, trained.fingerprint)
    if data is None:
        say(f"the token ids of its training are not in {settings['data']}: preparing them there")
        data = prepared_data(settings, say=say)
    if data.fingerprint != trained.fingerprint:
        raise UserError(f"{run} was trained on other data than those in {settings['data']}: the text changed")
    if _words(data.vocabulary) != _words(trained.vocabulary):
        raise UserError(f"{run} has another vocabulary than the data that it was trained on: it was altered")
    return data


def _words(vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.token(index) for index in range(vocabulary.size)]


def existing_data(config: dict, fingerprint: str) -> Prepared | None:
    """Return what lies in `data` for this configuration if it has the fingerprint; never prepares."""
    try:
        data = open_prepared(data_folder(config), build(config["vocabulary"]))
    except UserError:
        return None  # not there, or damaged: preparing mends that
    return data if data.fingerprint == fingerprint else None


def data_folder(config: dict) -> Path:
    """Return data/<corpus>-<vocabulary>-<hash of their settings>."""
    settings = {"corpus": config["corpus"], "vocabulary": config["vocabulary"]}
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    kinds = [part["_target_"].split(".")[-2] for part in settings.values()]
    return Path(config["data"]) / "-".join([*kinds, digest])
