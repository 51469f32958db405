"""Training metrics: sums between two log lines, balance figures (Table 6), and where the lines go."""

import netrc
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from moe_lm.files import write_text
from moe_lm.gate import Gating
from moe_lm.mistake import Mistake
from moe_lm.run import Run


class Interval:
    """Sums of figures over the steps since the last log line; no wait for the device until they are read."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self._sums: dict[str, Tensor | float] = dict(sums or {})

    def add(self, **figures: Tensor | float) -> None:
        """Add one step's figures; none that steps before it lacked, as in a checkpoint of an earlier version.

        The mean over all steps would be wrong.
        """
        late = "steps" in figures and self._sums.get("steps", 0) > 0
        for name, value in figures.items():
            if late and name not in self._sums:
                continue
            if isinstance(value, Tensor):
                value = value.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + value

    def sums(self) -> dict[str, float]:
        """Return the sums as plain numbers: what a checkpoint stores and another interval starts from."""
        return {name: float(value) for name, value in self._sums.items()}


def balance_figures(gatings: Iterable[Gating]) -> dict[str, Tensor]:
    """Return CV(importance), CV(load) and max/mean load of the global batch, averaged over the gated layers."""
    rows = [
        torch.stack([_variation(gating.importance_E), _variation(gating.load_E), _peak(gating.load_E)])
        for gating in gatings
    ]
    names = ("cv_importance", "cv_load", "max_over_mean_load")
    return dict(zip(names, torch.stack(rows).mean(dim=0), strict=True)) if rows else {}


def _variation(x_E: Tensor) -> Tensor:
    return x_E.std(correction=0) / (x_E.mean() + 1e-10)


def _peak(x_E: Tensor) -> Tensor:
    return x_E.max() / (x_E.mean() + 1e-10)


class MetricsLog:
    """metrics.jsonl, the truth, and Weights & Biases as a view of it where asked for."""

    def __init__(self, run: Run, *, wandb: bool, config: dict):
        self._run = run
        self._wandb = _start_wandb(run, config) if wandb else None

    def write(self, line: dict) -> None:
        """Append one line."""
        self._run.append_metrics(line)
        if self._wandb is not None:
            prefix = f"{line['split']}/" if "split" in line else "train/"
            numbers = {prefix + key: value for key, value in line.items() if isinstance(value, int | float)}
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Let Weights & Biases finish; raises `Mistake` where a full disk still keeps lines out of metrics.jsonl."""
        if self._wandb is not None:
            self._wandb.finish()
        self._run.finish_metrics()


class NoLog:
    """The log of a process that writes none."""

    def write(self, line: dict) -> None:
        """Forget the line."""

    def close(self) -> None:
        """Do nothing."""


def _start_wandb(run: Run, config: dict):
    """Offline without an API key, as nothing may ask at a prompt; raises `Mistake` for what keeps it from starting."""
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key(wandb.Settings().base_url) else "offline")
        return wandb.init(
            project="moe-lm",
            name=run.folder.name,
            id=_wandb_id(run.folder),
            resume="allow",
            dir=run.folder,
            config=config,
            mode=mode,
        )
    except Exception as error:  # of HTTP, of its settings, of a service beside it: no list of their classes stays true
        said = " ".join(str(error).split())[:200]
        raise Mistake(
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
