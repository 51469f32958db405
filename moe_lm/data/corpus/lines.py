"""Lines of text files, read as a stream: a plain file in blocks, a compressed file as a whole."""

import codecs
import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from moe_lm.errors import UserError

BLOCK = 16 << 20
"""Bytes per part of a plain file: a few million words, some seconds of work."""
_COMPRESSED = (".gz", ".xz", ".zst")
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@dataclass(frozen=True)
class Block:
    """The lines of a plain file that begin at bytes `begin` to `end` - 1, or all lines of a compressed file."""

    path: Path
    begin: int
    end: int

    @property
    def name(self) -> str:
        """Path and range of bytes."""
        return f"{self.path}:{self.begin}-{self.end}"

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.end - self.begin

    def sentences(self) -> Iterator[str]:
        """Stream the lines; raises `UserError` with file and line where the file cannot be read."""
        if self.path.suffix in _COMPRESSED:
            yield from lines(self.path)
            return
        try:
            with self.path.open("rb") as stream:
                yield from decoded_lines(self._lines(stream), str(self.path), self._lines_before)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _lines(self, stream: io.BufferedReader) -> Iterator[bytes]:
        position = self._first_line(stream)
        while position < self.end and (line := stream.readline()):
            position += len(line)
            yield line

    def _first_line(self, stream: io.BufferedReader) -> int:
        """Seek to the first line that begins at or after `begin`; return its offset."""
        if self.begin > 0:
            stream.seek(self.begin - 1)
            stream.readline()
        return stream.tell()

    def _lines_before(self) -> int:
        """Count the lines before the block's first line."""
        with self.path.open("rb") as stream:
            left, count = self._first_line(stream), 0
            stream.seek(0)
            while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
                left -= len(chunk)
                count += chunk.count(b"\n")
        return count


def blocks(path: Path) -> list[Block]:
    """Return a file's parts in order: `BLOCK` bytes each, or the whole compressed file."""
    size = path.stat().st_size
    step = max(size, 1) if path.suffix in _COMPRESSED else BLOCK
    return [Block(path, begin, min(begin + step, size)) for begin in range(0, max(size, 1), step)]


def lines(path: Path) -> Iterator[str]:
    """Stream a file's lines, decompressed according to its suffix; raises `UserError` where it cannot be read."""
    try:
        with _open(path) as stream:
            yield from decoded_lines(stream, str(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def decoded_lines(stream: Iterable[bytes], name: str, lines_before: Callable[[], int] = lambda: 0) -> Iterator[str]:
    """Decode lines one by one, so that an invalid byte is reported with its line number.

    `lines_before` returns the number of lines of file `name` before the stream, and is called only for such a report
    or where the stream starts with a byte-order mark.
    """
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith(codecs.BOM_UTF8) and lines_before() == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line.decode().rstrip("\n")
    except UnicodeDecodeError as error:
        number += lines_before()
        raise UserError(f"{name}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: damaged or cut short after line {number} ({reason}); fetch it again") from error


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn an OSError into a `UserError` that names the error's file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise _unreadable(Path(error.filename or path), error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    if error.errno == errno.ENOENT and path.is_symlink():
        return UserError(f"{path} is a link to {path.readlink()}, which does not exist; mend or delete the link")
    return UserError(f"{path} cannot be read: {error.strerror or error}")


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """The bytes of all frames of a .zst file; zstandard's own reader does not notice a truncated file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_began = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._frame_began = zstandard.ZstdDecompressor().decompressobj(), False
            chunk = chunk or self._file.read(1 << 16)
            if not chunk:
                if self._frame_began:
                    raise EOFError("the last frame is not complete")
                return 0
            self._frame_began = True
            self._ready = memoryview(self._frame.decompress(chunk))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
