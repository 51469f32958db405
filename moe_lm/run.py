"""The directory of a run: configuration, lock, metrics, checkpoints, result.

runs/<name>/config.yaml  metrics.jsonl  checkpoints/<step>/  vocabulary/  result.json  audit.json
"""

import json
import shutil
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from moe_lm.atomic_io import GrowingFile, write_text
from moe_lm.compat import KEYS, current_config, log_deprecation
from moe_lm.config_files import flatten
from moe_lm.errors import UserError

IDENTITY = (
    *("model", "corpus", "vocabulary", "batch", "softmax", "optimizer", "schedule", "balance"),
    *("seed", "init_from", "init_noise", "init_optimizer"),
)
"""Keys of the configuration that identify a run: a different value is refused under the same run name."""

_NOT_IDENTITY = {"softmax.chunk_logits"}
"""Keys within `IDENTITY` that change only memory and time."""


class Run:
    """The directory of one training run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_file = folder / "config.yaml"
        self.metrics_file = folder / "metrics.jsonl"
        self.result_file = folder / "result.json"
        self.checkpoints = folder / "checkpoints"
        self.vocabulary = folder / "vocabulary"
        self._metrics = GrowingFile(self.metrics_file)
        self._lock = FileLock(folder / ".lock")

    def claim(self, config: dict, *, may_grow: bool = True) -> None:
        """Create the directory or resume it, locked against other processes until this one ends.

        A directory without checkpoints, metrics and result accepts any configuration. A run may be resumed with a
        larger `training.num_words` only if `may_grow`: a schedule that ends with the training forbids it.

        Raises `UserError` if the directory holds another run, is in use, or cannot be written.
        """
        if (self.folder / "export.json").exists():
            raise UserError(f"{self.folder} is an export, not a run: choose another name=... or runs=...")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if self.config_file.exists() and self._has_begun():
                self._compare(config, may_grow)
            write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        except Timeout:
            raise UserError(f"{self.folder} is in use by another process: wait for it or choose another name") from None
        except OSError as error:
            raise UserError(f"cannot write to the run directory {self.folder}: {error.strerror}") from error

    def begun(self) -> dict | None:
        """Return the configuration of a run that has begun, None if it has not."""
        return self.config() if self.config_file.exists() and self._has_begun() else None

    def config(self) -> dict:
        """Return the stored configuration as plain data, with old keys and targets renamed.

        Raises `UserError` if it is missing or damaged.
        """
        try:
            text = self.config_file.read_text(encoding="utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                # moe-lm writes no aliases, and a few aliases can expand endlessly or to more than fits into memory.
                raise UserError(f"{self.config_file} is damaged: it refers to parts of itself")
            stored = yaml.safe_load(text)
            config = current_config(stored) if isinstance(stored, dict) else {}
        except FileNotFoundError:
            raise UserError(f"{self.folder} is no run: it has no config.yaml") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{self.config_file} cannot be read: {str(error).splitlines()[0]}") from error
        for key in (*IDENTITY, "training"):
            if not (isinstance(config.get(key), dict) or key == "seed" or key.startswith("init_")):
                raise UserError(f"{self.config_file} is damaged: {key} is missing")
        if moved := sorted(old for old in flatten(stored).keys() & KEYS.keys()):
            _log_stored_names(self.config_file, tuple(moved))
        return config

    def result(self) -> dict | None:
        """Return the result of a finished run, else None; raises `UserError` if it is damaged."""
        if not self.result_file.exists():
            return None
        try:
            result = json.loads(self.result_file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.result_file} is damaged ({error}): delete it and repeat the command") from error
        for key in ("words", "seconds", "perplexity"):
            if not isinstance(result, dict) or key not in result:
                raise UserError(f"{self.result_file} is damaged ({key} is missing): delete it and repeat the command")
        return result

    def keep_vocabulary(self, save: Callable[[Path], None]) -> None:
        """Copy the vocabulary into the run, so that scoring text needs this directory only.

        A vocabulary beside checkpoints is kept. Without checkpoints it may be left over from another attempt and is
        replaced.
        """
        if self.vocabulary.exists() and any(self.checkpoints.glob("[0-9]*")):
            return
        partial = self.folder / ".vocabulary.partial"
        for stale in (partial, self.vocabulary):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir()
        save(partial)
        partial.rename(self.vocabulary)

    def append_metrics(self, line: dict) -> None:
        """Append a line to metrics.jsonl; on a full disk it waits in memory while training goes on."""
        self._metrics.append(json.dumps(line))

    def finish_metrics(self) -> None:
        """Write the waiting lines of metrics.jsonl; raises `UserError` if the disk is still full."""
        self._metrics.finish()

    def cut_metrics(self, step: int, *, also_at_step: Collection[str | None] = ()) -> None:
        """Delete the lines after this step, and an unfinished last line.

        `also_at_step` names the splits whose lines of the step itself are deleted too, None for the training line.
        """
        if not self.metrics_file.exists():
            return
        kept = []
        for number, line in enumerate(self.metrics_file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                continue
            try:
                record = json.loads(line)
                drop = record["step"] == step and record.get("split") in also_at_step
                if record["step"] <= step and not drop:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.metrics_file}, line {number} is damaged ({error!r}): delete the line"
                ) from error
        write_text(self.metrics_file, "".join(kept))

    def write_result(self, result: dict) -> None:
        """Write result.json: from now on the run counts as finished."""
        write_text(self.result_file, json.dumps(result, indent=1) + "\n")

    def _has_begun(self) -> bool:
        """Return whether there is anything to lose: an attempt that failed early leaves only a configuration."""
        return self.metrics_file.exists() or self.checkpoints.exists() or self.result_file.exists()

    def _compare(self, config: dict, may_grow: bool) -> None:
        stored, wanted = (flatten({key: each.get(key) for key in IDENTITY}) for each in (self.config(), config))
        for key in sorted((stored.keys() | wanted.keys()) - _NOT_IDENTITY):
            if stored.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} holds another run: {key}={stored.get(key)} there, {wanted.get(key)} here; "
                    "choose another name=... or delete that folder"
                )
        before, now = (each["training"]["num_words"] for each in (self.config(), config))
        if now < before:
            may = "it can grow, not shrink" if may_grow else "it cannot shrink"
            raise UserError(f"{self.folder} is a run of training.num_words={before}: {may} to {now}")
        if now > before and not may_grow:
            raise UserError(
                f"{self.folder} is a run of training.num_words={before}, at which its schedule of the learning rate or "
                f"the noise ends: to train further, choose another name=... and init_from={self.folder}"
            )


@cache
def _log_stored_names(file: Path, keys: tuple[str, ...]) -> None:
    """Log, once for each file, which of its keys have been renamed since it was written."""
    log_deprecation(f"{file} was written by an earlier version: {', '.join(f'{k} is now {KEYS[k]}' for k in keys)}")
