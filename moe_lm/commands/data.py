"""A configuration's corpus and vocabulary to prepared data."""

import json
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from moe_lm.commands.build import build
from moe_lm.prepared import Prepared, prepare


def prepared_data(config: dict, say: Callable[[str], None]) -> Prepared:
    """Return the token ids of `corpus` and `vocabulary`, prepared now unless they lie in `data` already."""
    settings = {"corpus": config["corpus"], "vocabulary": config["vocabulary"]}
    return prepare(
        corpus=build(config["corpus"]),
        recipe=build(config["vocabulary"]),
        folder=data_folder(config),
        settings=settings,
        say=say,
        progress=sys.stderr.isatty(),
    )


def data_folder(config: dict) -> Path:
    """Return data/<corpus>-<vocabulary>-<hash of their settings>."""
    settings = {"corpus": config["corpus"], "vocabulary": config["vocabulary"]}
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    kinds = [part["_target_"].split(".")[-2] for part in settings.values()]
    return Path(config["data"]) / "-".join([*kinds, digest])
