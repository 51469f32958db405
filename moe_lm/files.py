"""Files that a crash leaves whole: the old one or the new one."""

import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

from moe_lm.mistake import Mistake


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

    Raises `Mistake` where the folder cannot be written.
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
        raise Mistake(f"cannot write {folder} ({error.strerror}): make it a folder you may write to") from error
    return tuple(folder / name for name in contents)


def checksum(path: Path) -> str:
    """Return the blake2b of a file, 16 bytes in hexadecimal."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
