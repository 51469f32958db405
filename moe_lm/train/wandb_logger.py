"""Weights & Biases, where asked for: which of its runs a training is, and whether online."""

import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from moe_lm.atomic_io import write_text
from moe_lm.errors import UserError


def start_wandb(folder: Path, config: dict):
    """Return the W&B run of a training in this folder; raises `UserError` for what keeps it from starting.

    Offline without an API key, as nothing may ask at a prompt.
    """
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key(wandb.Settings().base_url) else "offline")
        return wandb.init(
            project="moe-lm",
            name=folder.name,
            id=_wandb_id(folder),
            resume="allow",
            dir=folder,
            config=config,
            mode=mode,
        )
    except Exception as error:  # of HTTP, of its settings, of a service beside it: no list of their classes stays true
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"logging.wandb=true: Weights & Biases does not start ({type(error).__name__}: {said}); "
            "WANDB_MODE=offline needs no connection, logging.wandb=false none of it"
        ) from error


def _wandb_id(folder: Path) -> str:
    """Return what makes a resumed run one run there: drawn for a new folder, so that no other run is taken for it."""
    path = folder / "wandb" / "id.txt"
    if not path.exists():
        begun = path.parent.exists()  # by a version whose ids were made of the folder's path
        path.parent.mkdir(exist_ok=True)
        old = "".join(c if c.isalnum() else "-" for c in str(folder))[-64:]
        write_text(path, old if begun else secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def _has_wandb_key(address: str) -> bool:
    """Where `wandb login` puts its key for this server, port and all: asking wandb itself may prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    place = os.environ.get("NETRC")
    try:
        found = netrc.netrc(Path(place).expanduser() if place else None)
    except (OSError, netrc.NetrcParseError, ValueError):  # also bytes that are no text
        return False
    server = urlsplit(address).netloc
    own = server.endswith((".wandb.ai", ".coreweave.com"))  # W&B's own, which has had both names
    return any(found.authenticators(name) for name in (server, *(["api.wandb.ai"] if own else [])))
