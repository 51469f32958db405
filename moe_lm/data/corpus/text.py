"""A corpus of the user's own files: one sentence per line, plain or compressed, read as a stream."""

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from moe_lm.data.corpus import SPLITS, Corpus
from moe_lm.data.corpus.lines import Block, blocks, disk_errors_named
from moe_lm.errors import UserError


class Text(Corpus):
    """Sentences from files, one per line; only "\\n" ends a line, and words are separated as by `str.split`."""

    def __init__(
        self,
        *,
        train: str | Sequence[str],
        valid: str | Sequence[str],
        test: str | Sequence[str],
        max_words: int,
    ) -> None:
        """Take one or several globs per split; they are resolved, and errors raised, when the text is read."""
        if max_words < 1:
            raise ValueError(f"corpus.max_words={max_words} leaves no sentence; give 1 or more")
        patterns = zip(SPLITS, (train, valid, test), strict=True)
        self._patterns = {split: [globs] if isinstance(globs, str) else list(globs) for split, globs in patterns}
        self.max_words = max_words

    def parts(self, split: str) -> list[Block]:
        """Return the split's files in sorted order, large ones in blocks of lines."""
        return [block for path in self._files()[split] for block in blocks(path)]

    def inputs(self) -> dict:
        """Return each file's absolute path, size in bytes and modification time in nanoseconds, by split."""
        record = {}
        for split, paths in self._files().items():
            stats = [(path, path.stat()) for path in paths]
            record[split] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return record

    def _files(self) -> dict[str, list[Path]]:
        """Return the resolved paths of each split's files, sorted and without repetition."""
        files = {split: _matches(split, patterns) for split, patterns in self._patterns.items()}
        for split in ("valid", "test"):
            shared = sorted(set(files["train"]) & set(files[split]))
            if shared:
                raise UserError(f"{shared[0]} is in corpus.train and in corpus.{split}; take it out of one of them")
        return files


def _matches(split: str, patterns: list[str]) -> list[Path]:
    if not patterns:
        raise UserError(f"corpus=text needs the {split} files: give corpus.{split}=[...], a list of paths or globs")
    found = set()
    for pattern in patterns:
        name = Path(pattern).expanduser()
        with disk_errors_named(name):
            files = _files_of(split, pattern, name)
        if not files:
            raise UserError(f"corpus.{split}: no file matches {pattern} (looked from {Path.cwd()})")
        found |= files
    return sorted(found)


def _files_of(split: str, pattern: str, name: Path) -> set[Path]:
    """Return the resolved paths of the files that a path or glob names."""
    if name.is_dir():
        raise UserError(f"corpus.{split}: {pattern} is a folder; name its files, for example {pattern}/*.txt")
    # An existing path is taken literally, even with brackets in it; Path.glob refuses absolute patterns.
    is_one = name.exists() or name.is_symlink()
    matches = [str(name)] if is_one else glob(str(name), recursive=True)  # noqa: PTH207
    paths = [path for path in map(Path, matches) if not path.is_dir()]
    for path in paths:
        path.stat()  # so that an error names a broken link itself
    return {path.resolve() for path in paths}
