"""Optional logging to Weights & Biases: which of its runs a training run belongs to, and whether it is online."""

import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from moe_lm.atomic_io import write_text
from moe_lm.errors import UserError


def start_wandb(folder: Path, config: dict):
    """Return the W&B run of the training run in this folder; raises `UserError` if W&B cannot start.

    Without an API key the W&B run is offline, as wandb would otherwise ask for a key at a prompt.
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
    except Exception as error:  # HTTP, wandb's settings and its service raise many classes
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"logging.wandb=true: Weights & Biases does not start ({type(error).__name__}: {said}); "
            "WANDB_MODE=offline needs no connection, and logging.wandb=false does not use it"
        ) from error


def _wandb_id(folder: Path) -> str:
    """Return the W&B id by which a resumed run stays one run; it is random for a new folder, so that none is shared."""
    path = folder / "wandb" / "id.txt"
    if not path.exists():
        begun = path.parent.exists()  # by a version whose ids were made of the folder's path
        path.parent.mkdir(exist_ok=True)
        old = "".join(c if c.isalnum() else "-" for c in str(folder))[-64:]
        write_text(path, old if begun else secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def _has_wandb_key(address: str) -> bool:
    """Return whether a key for this server is set, or stored by `wandb login`; asking wandb itself may prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    place = os.environ.get("NETRC")
    try:
        found = netrc.netrc(Path(place).expanduser() if place else None)
    except (OSError, netrc.NetrcParseError, ValueError):  # ValueError: the file is not text
        return False
    server = urlsplit(address).netloc
    own = server.endswith((".wandb.ai", ".coreweave.com"))  # W&B's own server, which has had both names
    return any(found.authenticators(name) for name in (server, *(["api.wandb.ai"] if own else [])))
