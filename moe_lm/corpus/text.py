"""A corpus of the user's own files: one sentence a line, plain or compressed, read as a stream."""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path

import zstandard

from moe_lm.corpus import SPLITS
from moe_lm.mistake import Mistake

_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class Text:
    """Sentences from files, one a line; lines end at "\\n" only, words are what `str.split` gives."""

    def __init__(
        self,
        *,
        train: str | Sequence[str],
        valid: str | Sequence[str],
        test: str | Sequence[str],
        max_words: int,
    ) -> None:
        """Take one glob or several per split, resolved (and mistakes raised) only when text is asked for."""
        if max_words < 1:
            raise Mistake(f"corpus.max_words={max_words} leaves no sentence; give 1 or more")
        patterns = zip(SPLITS, (train, valid, test), strict=True)
        self._patterns = {split: [globs] if isinstance(globs, str) else list(globs) for split, globs in patterns}
        self.max_words = max_words

    def sentences(self, split: str) -> Iterator[str]:
        """Stream the lines of the split's files in sorted order; raises `Mistake` for a bad file."""
        for path in self._files()[split]:
            yield from lines(path)

    def inputs(self) -> dict:
        """Return each file's absolute path, size in bytes and modification time in nanoseconds, by split."""
        record = {}
        for split, paths in self._files().items():
            stats = [(path, path.stat()) for path in paths]
            record[split] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return record

    def _files(self) -> dict[str, list[Path]]:
        """Return the real paths of every split's files, sorted and without repetition."""
        files = {split: _matches(split, patterns) for split, patterns in self._patterns.items()}
        for split in ("valid", "test"):
            shared = sorted(set(files["train"]) & set(files[split]))
            if shared:
                raise Mistake(f"{shared[0]} is in corpus.train and in corpus.{split}; take it out of one of them")
        return files


def _matches(split: str, patterns: list[str]) -> list[Path]:
    if not patterns:
        raise Mistake(f"corpus=text needs the {split} files: give corpus.{split}=[...], a list of paths or globs")
    found = set()
    for pattern in patterns:
        name = Path(pattern).expanduser()
        if name.is_dir():
            raise Mistake(f"corpus.{split}: {pattern} is a folder; name its files, for example {pattern}/*.txt")
        # A path that exists is meant literally, even with a bracket in it; Path.glob refuses absolute patterns.
        matches = [str(name)] if name.exists() else glob(str(name), recursive=True)  # noqa: PTH207
        paths = [Path(path) for path in matches]
        files = {path.resolve() for path in paths if not path.is_dir()}
        if not files:
            raise Mistake(f"corpus.{split}: no file matches {pattern} (looked from {Path.cwd()})")
        found |= files
    return sorted(found)


def lines(path: Path) -> Iterator[str]:
    """Stream a file's lines, unpacked by its suffix; raises `Mistake` where it cannot be read."""
    try:
        with _open(path) as stream:
            yield from decoded_lines(stream, str(path))
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror or error}") from error


def decoded_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode lines one by one, so that a bad byte is reported with its line."""
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise Mistake(f"{name}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise Mistake(f"{name}: damaged or cut short after line {number} ({reason}); fetch it again") from error


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """The bytes of a .zst file, all its frames; zstandard's own reader ends silently in a file cut short."""

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
