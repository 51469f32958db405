"""Files that stay whole through a crash or a full disk: they are replaced atomically or grow by whole lines."""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from moe_lm.errors import UserError


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def replace_files(folder: Path, contents: Mapping[str, bytes], sometimes: Iterable[str] = ()) -> tuple[Path, ...]:
    """Replace each file atomically, and delete the files named in `sometimes` that `contents` does not name.

    Raises `UserError` if the folder is not writable.
    """
    try:
        folder.mkdir(exist_ok=True)
        for name, data in contents.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(data)
            temporary.replace(folder / name)
        for stale in set(sometimes) - contents.keys():
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}): make it a folder you may write to") from error
    return tuple(folder / name for name in contents)


def checksum(path: Path) -> str:
    """Return the blake2b digest of a file, 16 bytes in hexadecimal."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class GrowingFile:
    """A file that grows by whole lines; lines that cannot be written, as on a full disk, wait for the next append."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []
        self._valid_size: int | None = None  # size up to which the file is valid, after a write that failed halfway

    def append(self, line: str) -> None:
        """Append a line, given without its newline; log when lines begin to wait and when they are written."""
        num_waited = len(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        reason = self._write()
        if reason and not num_waited:
            _log(f"WARNING: cannot write {self.path} ({reason}): its lines wait in memory; make room")
        if num_waited and not reason:
            _log(f"{self.path} can be written again: {num_waited} waiting lines are in it")

    def finish(self) -> None:
        """Write the waiting lines; raises `UserError` if that is still impossible."""
        if self._waiting and (reason := self._write()):
            lost = len(self._waiting)
            raise UserError(
                f"cannot write {self.path} ({reason}): its last {lost} lines are lost; make room on that disk"
            )

    def _write(self) -> str | None:
        """Write all waiting lines; if that fails, write none and return the reason."""
        try:
            self._append_waiting()
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the next append truncates the file
                if self._valid_size is not None and self._valid_size < self.path.stat().st_size:
                    os.truncate(self.path, self._valid_size)
            return error.strerror or str(error)
        self._waiting, self._valid_size = [], None
        return None

    def _append_waiting(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if self._valid_size is not None and self._valid_size < size:
                os.ftruncate(descriptor, self._valid_size)
                size = self._valid_size
            self._valid_size = size
            rest = b"".join(self._waiting)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)  # a network file system may report a full disk only here


def _log(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
        tqdm.write(line, file=sys.stderr)  # does not break a progress bar
