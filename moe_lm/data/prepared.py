"""Token ids on disk: a corpus and a vocabulary made into one folder of flat arrays, once.

The folder holds `data.json`, the vocabulary's files, and per split of N sentences `<split>.tokens` (int32, the ids
of sentence 0 followed by `</S>`, then sentence 1, ...; no `<S>`), `<split>.starts` (int64, N + 1) and
`<split>.words` (uint32, N), all little-endian. It appears whole or not at all.
"""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from moe_lm.atomic_io import sync
from moe_lm.data.corpus import SPLITS, Corpus
from moe_lm.data.prepare import FORMAT, Making
from moe_lm.data.split_writer import DTYPES
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.errors import UserError

# What a disk says; a corpus fetched over a network raises other kinds of OSError, which are not ours to explain.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK |= {errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Split:
    """One split of N sentences, memory-mapped."""

    tokens: np.ndarray
    """int32: each sentence's ids followed by `</S>`."""
    starts: np.ndarray
    """int64, N + 1: where each sentence begins in `tokens`; the last entry is their number."""
    words: np.ndarray
    """uint32, N: words of each sentence with `</S>`, which is what perplexity divides by."""

    @property
    def num_sentences(self) -> int:
        """Return N."""
        return len(self.words)

    @property
    def num_words(self) -> int:
        """Return the number of words, one `</S>` a sentence included."""
        return int(self.words.sum(dtype=np.int64))


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation read: the vocabulary and the three splits."""

    vocabulary: Vocabulary
    splits: dict[str, Split]
    fingerprint: str
    """blake2b over the vocabulary's files and every token."""
    statistics: dict
    """Per split `sentences words tokens unknown_words empty_lines longer_than_max_words` (in training those are
    left out), and for the held-out splits `unigram_perplexity` (per word)."""
    figures: dict = field(default_factory=dict)
    """Published counts that were compared, by `<split>.<statistic>` or `vocabulary`: `expected` and `found`."""


def prepare(
    *,
    corpus: Corpus,
    recipe: VocabularyRecipe,
    folder: Path,
    settings: dict,
    say: Callable[[str], None],
    progress: bool,
    num_processes: int = 1,
) -> Prepared:
    """Make `folder` unless it stands there with the same inputs; raises `UserError` for bad text or disk.

    `settings` is the configuration that the inputs came from: any change of it prepares anew. The number of
    processes changes nothing in the folder.
    """
    inputs = {"settings": settings, "corpus": corpus.inputs(), "vocabulary": recipe.inputs()}
    inputs = json.loads(json.dumps(inputs | {"max_words": corpus.max_words}))
    if current := _open_current(folder, recipe, inputs):
        shutil.rmtree(partial_folder(folder), ignore_errors=True)  # a crash right after the last step left it
        return current
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, say):
            # Another process may have made it while this one waited.
            if current := _open_current(folder, recipe, inputs):
                return current
            _make(corpus, recipe, folder, inputs, say=say, progress=progress, num_processes=num_processes)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        reason = f"{error.strerror}; mend that and repeat the command, or choose another folder"
        raise UserError(f"cannot write {folder}: {reason}") from error
    return open_prepared(folder, recipe)


def _make(
    corpus: Corpus,
    recipe: VocabularyRecipe,
    folder: Path,
    inputs: dict,
    *,
    say: Callable[[str], None],
    progress: bool,
    num_processes: int,
) -> None:
    """Write everything beside `folder`, then put it in its place; the caller holds the folder's lock."""
    ours = (folder / "data.json").exists() or (folder / "train.tokens").exists()
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise UserError(f"{folder} holds other files than prepared text; choose another folder or empty it")
    making = Making(corpus, recipe, partial_folder(folder), say=say, progress=progress, num_processes=num_processes)
    try:
        making.take_up(inputs)
        record = {"format": FORMAT, "inputs": inputs} | making.run()
        whole = making.whole
        record["files"] = {path.name: path.stat().st_size for path in sorted(whole.iterdir())}
        (whole / "data.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for path in [*whole.iterdir(), whole]:
            sync(path)
        replaced = making.folder / "replaced"
        if folder.exists():
            folder.rename(replaced)
        whole.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        if not making.is_large:  # nothing worth going on with
            shutil.rmtree(making.folder, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            say(f"{making.folder} keeps what is done: repeat the command to go on")
        raise
    shutil.rmtree(making.folder, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Return where what is to become `folder` is made."""
    return folder.parent / f".{folder.name}.partial"


def open_prepared(folder: Path, recipe: VocabularyRecipe) -> Prepared:
    """Map a prepared folder into memory; raises `UserError` where it is missing, damaged or foreign."""
    record = _read_record(folder)
    splits = {}
    for split in SPLITS:
        paths = {part: folder / f"{split}.{part}" for part in DTYPES}
        splits[split] = Split(**{part: np.memmap(path, DTYPES[part], "r") for part, path in paths.items()})
    return Prepared(recipe.load(folder), splits, record["fingerprint"], record["statistics"], record.get("figures", {}))


def _open_current(folder: Path, recipe: VocabularyRecipe, inputs: dict) -> Prepared | None:
    try:
        if _read_record(folder)["inputs"] == inputs:
            return open_prepared(folder, recipe)
    except UserError:
        pass  # missing, damaged or of another format: to be made anew, which mends it
    return None


def _read_record(folder: Path) -> dict:
    """Return `data.json` once every file of the folder is found to have the size it names."""
    try:
        record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{folder} has format {record['format']}, this version reads {FORMAT}; prepare again")
        wrong = [name for name, size in record["files"].items() if (folder / name).stat().st_size != size]
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not prepared ({Path(error.filename).name} is missing); prepare it") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/data.json cannot be read ({error}); prepare it again") from error
    if wrong:
        raise UserError(f"{folder / wrong[0]} is damaged: not the size it was written with; prepare it again")
    return record


def _lock(folder: Path, say: Callable[[str], None]) -> AbstractContextManager:
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting: another process prepares {folder}")
        return lock.acquire()
