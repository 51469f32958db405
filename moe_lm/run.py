"""A run's directory: its configuration, its lock, its metrics, its result.

runs/<name>/config.yaml  metrics.jsonl  checkpoints/<step>/  vocabulary/  result.json  audit.json
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from moe_lm.atomic_io import GrowingFile, write_text
from moe_lm.errors import UserError

IDENTITY = ("model", "corpus", "vocabulary", "batch", "softmax", "optimizer", "schedule", "balance", "seed", "init")
"""What makes a run this run: another value under the same name is refused."""

_NOT_IDENTITY = {"softmax.max_logits"}
"""Keys of those that change memory and time alone."""


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

    def claim(self, config: dict) -> None:
        """Create the directory or take it up again, locked against a second process until this one ends.

        A directory without checkpoint, metrics or result takes any configuration.

        Raises `UserError` where it holds another run, is in use, or cannot be written.
        """
        if (self.folder / "export.json").exists():
            raise UserError(f"{self.folder} is an export, not a run: choose another name=... or runs=...")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if self.config_file.exists() and self._has_begun():
                self._compare(config)
            write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        except Timeout:
            raise UserError(f"{self.folder} is in use by another process: wait for it or choose another name") from None
        except OSError as error:
            raise UserError(f"cannot write to the run directory {self.folder}: {error.strerror}") from error

    def begun(self) -> dict | None:
        """Return the configuration of a run that has begun, None where there is none yet."""
        return self.config() if self.config_file.exists() and self._has_begun() else None

    def config(self) -> dict:
        """Return the stored configuration as plain data; raises `UserError` where there is none."""
        try:
            text = self.config_file.read_text(encoding="utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                # None is ever written; a few can stand for more than a memory holds, or for one without end.
                raise UserError(f"{self.config_file} is damaged: it refers to parts of itself")
            config = yaml.safe_load(text)
        except FileNotFoundError:
            raise UserError(f"{self.folder} is no run: it has no config.yaml") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{self.config_file} cannot be read: {str(error).splitlines()[0]}") from error
        for key in (*IDENTITY, "training"):
            if not isinstance(config, dict) or not (isinstance(config.get(key), dict) or key in ("seed", "init")):
                raise UserError(f"{self.config_file} is damaged: {key} is missing")
        return config

    def result(self) -> dict | None:
        """Return the result of a finished run, else None; raises `UserError` where it is damaged."""
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
        """Copy the vocabulary into the run, so that scoring text needs nothing but this directory.

        One that belongs to a checkpoint stays; without any it may be left from another attempt.
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
        """Add a line to metrics.jsonl; on a full disk it waits in memory, and training goes on."""
        self._metrics.append(json.dumps(line))

    def finish_metrics(self) -> None:
        """Write the lines of metrics.jsonl that wait; raises `UserError` where that still cannot be."""
        self._metrics.finish()

    def cut_metrics(self, step: int, *, and_training_at_step: bool = False) -> None:
        """Drop the lines after this step, and a last line that a crash left unfinished.

        `and_training_at_step` drops the training line of this very step too.
        """
        if not self.metrics_file.exists():
            return
        kept = []
        for number, line in enumerate(self.metrics_file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                continue
            try:
                record = json.loads(line)
                drop = and_training_at_step and record["step"] == step and "split" not in record
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
        """Whether there is anything to lose: a first attempt that a mistake ended left only a configuration."""
        return self.metrics_file.exists() or self.checkpoints.exists() or self.result_file.exists()

    def _compare(self, config: dict) -> None:
        stored, wanted = (flatten({key: each.get(key) for key in IDENTITY}) for each in (self.config(), config))
        before, now = (each["training"]["num_words"] for each in (self.config(), config))
        if now < before:
            raise UserError(f"{self.folder} is a run of training.num_words={before}: it can grow, not shrink to {now}")
        for key in sorted((stored.keys() | wanted.keys()) - _NOT_IDENTITY):
            if stored.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} holds another run: {key}={stored.get(key)} there, {wanted.get(key)} here; "
                    "choose another name=... or delete that folder"
                )


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """Return nested dicts as one level of dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
