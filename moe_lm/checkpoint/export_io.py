"""An export: one folder that holds a trained model and nothing else, each file with its checksum; never a pickle.

export.json  model.safetensors (or several, with an index)  config.yaml  vocabulary/  README.md
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from moe_lm.atomic_io import checksum, sync
from moe_lm.checkpoint import weights
from moe_lm.errors import UserError

FORMAT = 1
RECORD = "export.json"
_NAMES = re.compile(
    rf"{re.escape(weights.ONE)}|{re.escape(weights.INDEX)}|{weights.SEVERAL.pattern}|"
    r"config\.yaml|README\.md|vocabulary/\w[\w.]*"
)
_PICKLES = re.compile(rb"\x80[\x00-\x05]|PK\x03\x04")
"""How a pickle begins since its second protocol, and the zip archive of them that torch writes."""
_AGAIN = "export or copy the model again"


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, or was one before it lost its record."""
    return any((folder / name).exists() for name in (RECORD, weights.ONE, weights.INDEX))


def beside(folder: Path, name: str) -> Path:
    """Return where what is made of a model goes: into a run's folder, but beside an export's, which stays as it is."""
    if not is_export(folder):
        return folder / name
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(f"{folder.name}-{name}")


def opened(folder: Path) -> dict:
    """Return export.json once every file is found to be the one that it names, and no other is there.

    Raises `UserError` for a missing, altered or additional file, and for pickled data under any name.
    """
    record = _record(folder)
    files, there = record["files"], _entries(folder)
    if missing := sorted(files.keys() - there):
        raise UserError(f"{folder / missing[0]} is missing: {_AGAIN}")
    if more := sorted(there - files.keys()):
        raise UserError(f"{folder / more[0]} is no part of the export: take it away")
    for name, listed in files.items():
        path = folder / name
        try:
            with path.open("rb") as stream:
                # A safetensors file begins with a number, which may be any; what else such a file holds does not load.
                if _PICKLES.match(stream.read(4)) and path.suffix != ".safetensors":
                    raise UserError(f"{path} holds pickled data, which could run anything: refused")
            if path.stat().st_size != listed["bytes"] or checksum(path) != listed["blake2b"]:
                raise UserError(f"{path} was altered since it was exported: {_AGAIN}")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return record


def write(folder: Path, record: dict, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder beside this one, add export.json, and put it in place whole or not at all.

    Raises `UserError` where it cannot be written, or another process writes it.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                save(partial)
                _finish(partial, record)
                partial.rename(folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        raise UserError(f"{folder} is being written by another process: wait for it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; choose another to=... or mend that") from error


def _finish(partial: Path, record: dict) -> None:
    files = {name: partial / name for name in sorted(_entries(partial))}
    listed = {name: {"bytes": path.stat().st_size, "blake2b": checksum(path)} for name, path in files.items()}
    text = json.dumps({"format": FORMAT, **record, "files": listed}, indent=1, ensure_ascii=False)
    (partial / RECORD).write_text(text + "\n", encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():
            shutil.copymode(partial / RECORD, path)  # safetensors writes files that only their owner may read
        sync(path)


def _record(folder: Path) -> dict:
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {record['format']!r}, this version reads {FORMAT}: take another version"
            )
        sound = type(record["step"]) is int and all(isinstance(record[key], str) for key in ("name", "data"))
        for listed in record["files"].values():
            sound &= isinstance(listed["bytes"], int) and isinstance(listed["blake2b"], str)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {_AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}): {_AGAIN}") from error
    if not sound:
        raise UserError(f"{path} is damaged: {_AGAIN}")
    if foreign := [name for name in record["files"] if not _NAMES.fullmatch(name)]:
        raise UserError(f"{path} names {foreign[0]!r}, which is no part of an export: refused")
    return record


def _entries(folder: Path) -> set[str]:
    """Return all that is in the folder but the record, and but the folder of the vocabulary itself."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name
        for name, path in paths.items()
        if name != RECORD and not (name == "vocabulary" and path.is_dir() and not path.is_symlink())
    }
