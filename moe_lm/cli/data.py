"""Prepared data for a configuration or for a trained model."""

import json
import os
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from moe_lm.checkpoint.export import is_export
from moe_lm.cli.machine import build
from moe_lm.compat import stored_targets
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import Prepared, open_prepared
from moe_lm.data.vocabulary import Vocabulary
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel


def prepared_data(config: dict, log: Callable[[str], None]) -> Prepared:
    """Return the token ids of the configuration's corpus and vocabulary, prepared now unless its `data` holds them.

    The key `processes` says how many processes share the preparation of a large text; by default it is one per core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return prepare(
        corpus=build(config["corpus"]),
        recipe=build(config["vocabulary"]),
        folder=data_folder(config),
        settings=_settings(config),
        log=log,
        progress=sys.stderr.isatty(),
        num_processes=config.get("processes") or cores,
    )


def data_of(trained: LoadedModel, run: str, folder: str | None, log: Callable[[str], None]) -> Prepared:
    """Return the token ids that a run was trained on, from `folder` or else from the folder in its configuration.

    An export may come from another machine, so for an export `folder` is `data` by default. Missing token ids are
    prepared again. Raises `UserError` if the text or the vocabulary is not the one of the training.
    """
    had = "data" if is_export(Path(run)) else str(trained.config.get("data", "data"))
    settings = trained.config | {"data": folder or had}
    # If the token ids of the training are there, the text itself may be missing or changed.
    data = existing_data(settings, trained.fingerprint)
    if data is None:
        log(f"the token ids of its training are not in {settings['data']}: preparing them there")
        data = prepared_data(settings, log)
    if data.fingerprint != trained.fingerprint:
        raise UserError(f"{run} was trained on other data than {settings['data']} now holds: the text changed")
    if _words(data.vocabulary) != _words(trained.vocabulary):
        raise UserError(f"{run} has another vocabulary than the data of its training: the vocabulary was altered")
    return data


def _words(vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.token(index) for index in range(vocabulary.size)]


def existing_data(config: dict, fingerprint: str) -> Prepared | None:
    """Return this configuration's prepared data if they exist and have the fingerprint; nothing is prepared."""
    try:
        data = open_prepared(data_folder(config), build(config["vocabulary"]))
    except UserError:
        return None  # missing or damaged: to be prepared
    return data if data.fingerprint == fingerprint else None


def data_folder(config: dict) -> Path:
    """Return data/<corpus>-<vocabulary>-<hash of their settings>."""
    settings = _settings(config)
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    kinds = [part["_target_"].split(".")[-2] for part in settings.values()]
    return Path(config["data"]) / "-".join([*kinds, digest])


def _settings(config: dict) -> dict:
    """Return the settings that identify prepared data, spelled as earlier versions spelled them."""
    return stored_targets({"corpus": config["corpus"], "vocabulary": config["vocabulary"]})
