"""Files that a crash or a full disk leaves whole: the old one or the new one, line by line where they grow."""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from moe_lm.errors import UserError


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def replace_files(folder: Path, contents: Mapping[str, bytes], sometimes: Iterable[str] = ()) -> tuple[Path, ...]:
    """Put each file in place whole, and remove those of `sometimes` that were there and are not among them.

    Raises `UserError` where the folder cannot be written.
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
    """Return the blake2b of a file, 16 bytes in hexadecimal."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class GrowingFile:
    """A file that grows by whole lines; those that cannot be written, as on a full disk, wait for the next."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []
        self._whole: int | None = None  # the bytes up to which a file is right that could not be cut back

    def append(self, line: str) -> None:
        """Add a line, given without its end; say so once where it has to wait, and once when it waits no longer."""
        waited = len(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        reason = self._write()
        if reason and not waited:
            _tell(f"WARNING: cannot write {self.path} ({reason}): its lines wait in memory; make room")
        if waited and not reason:
            _tell(f"{self.path} can be written again: {waited} waiting lines are in it")

    def finish(self) -> None:
        """Write what waits; raises `UserError` where that still cannot be."""
        if self._waiting and (reason := self._write()):
            lost = len(self._waiting)
            raise UserError(
                f"cannot write {self.path} ({reason}): its last {lost} lines are lost; make room on that disk"
            )

    def _write(self) -> str | None:
        """Write what waits, all or nothing; return the reason where nothing."""
        try:
            self._write_at_once()
        except OSError as error:
            with contextlib.suppress(OSError):  # else before the next line
                if self._whole is not None and self._whole < self.path.stat().st_size:
                    os.truncate(self.path, self._whole)
            return error.strerror or str(error)
        self._waiting, self._whole = [], None
        return None

    def _write_at_once(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if self._whole is not None and self._whole < size:
                os.ftruncate(descriptor, self._whole)
                size = self._whole
            self._whole = size
            rest = b"".join(self._waiting)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)  # only here a network's file system may tell that its disk is full


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # a log may lie on the same full disk
        tqdm.write(text, file=sys.stderr)  # leaves a progress bar whole
