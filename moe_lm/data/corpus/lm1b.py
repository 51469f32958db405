"""The 1-Billion-Word Benchmark (Chelba et al. 2013, arXiv 1312.3005), from its archive or through `datasets`.

In either form `test` is held-out shard 0, which every published perplexity is measured on, and `valid` is the other
held-out shards.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

from moe_lm.data.corpus import SPLITS, Corpus, Part
from moe_lm.data.corpus.lines import blocks, disk_errors_named
from moe_lm.data.corpus.tables import Rows, hub_files, local_files
from moe_lm.errors import UserError

NUM_SHARDS = {"train": 99, "held-out": 50}
"""Shards of the whole benchmark."""
REFERENCE_COUNTS = {
    "train.sentences": 30_301_028,
    "train.words": 798_949_912,
    "test.sentences": 6_075,
    "test.words": 159_658,
}
"""Published counts, with one `</S>` per sentence among the words; 829,250,940 training words include `<S>` too."""
HUB = {"path": "billion-word-benchmark/lm1b", "revision": "refs/convert/parquet", "subset": "plain_text"}
"""Default location of the benchmark's Parquet files on the hub."""
VOCABULARY = {3: 793_471}
"""Published vocabulary size by minimum count, with the markers `<S>`, `</S>` and `<UNK>`."""

_FOLDERS = {"train": "training-monolingual.tokenized.shuffled", "held-out": "heldout-monolingual.tokenized.shuffled"}
_SUFFIX = r"(\.gz|\.xz|\.zst)?"
_NAMES = {
    # The held-out shards were cut from training shard 0.
    "train": re.compile(rf"news\.en-(?!00000)(\d{{5}})-of-00100{_SUFFIX}"),
    "held-out": re.compile(rf"news\.en\.heldout-(\d{{5}})-of-00050{_SUFFIX}"),
}


class Lm1b(Corpus):
    """The benchmark: its training shards, its test shard, and its other held-out shards for validation."""

    def __init__(
        self,
        *,
        folder: str | None,
        path: str | None,
        revision: str | None,
        subset: str | None,
        streaming: bool,
        max_words: int,
    ) -> None:
        """Read the archive's `folder` if given, else `path`: a local folder of tables, or a dataset on the hub.

        `revision` is a branch or commit on the hub. `subset` is a folder of the dataset or of the tables. Where `path`,
        `revision` or `subset` is null, its value in `HUB` is used.
        """
        if max_words < 1:
            raise ValueError(f"corpus.max_words={max_words} leaves no sentence; give 1 or more")
        self.max_words = max_words
        self._folder, self._streaming = folder, streaming
        given = {"path": path, "revision": revision, "subset": subset}
        self._given = {name: value for name, value in given.items() if value is not None}
        if folder is not None and self._given:
            name, value = next(iter(self._given.items()))
            raise ValueError(f"corpus.{name}={value} does not apply to corpus.folder, the original archive; drop one")

    @cached_property
    def _form(self) -> "_Archive | _Tables":
        if self._folder is not None:
            return _Archive(Path(self._folder).expanduser())
        path, revision, subset = (HUB | self._given).values()
        tables = Path(path).expanduser()
        with disk_errors_named(tables):
            is_local, has_subset = tables.is_dir(), (tables / subset).is_dir()
        if is_local:
            if "revision" in self._given:
                raise UserError(f"corpus.revision={revision} does not apply to {tables}, a folder here; drop it")
            if "subset" in self._given and not has_subset:
                raise UserError(f"{tables} holds no folder {subset}; give another corpus.subset or drop it")
            root = tables / subset if has_subset else tables
            return _Tables(lambda split: local_files(root, split), self._streaming)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            address = {"path": path, "revision": revision, "subset": subset}
            return _Tables(lambda split: hub_files(path, revision, f"{subset}/{split}"), self._streaming, address)
        raise UserError(f"corpus.path={path}: there is no such folder, nor can it be the name of a dataset")

    def parts(self, split: str) -> Sequence[Part]:
        """Return the split's shards, or blocks of their lines."""
        return self._form.parts(split)

    def inputs(self) -> dict:
        """Return the files with their sizes and times or, without using the network, the address on the hub."""
        return self._form.inputs()

    def notes(self) -> list[str]:
        """Return a warning where shards are missing."""
        return self._form.notes()

    def reference_counts(self, min_count: int | None) -> dict[str, int]:
        """Return the published counts of the test shard and, if all training shards are there, of the training text."""
        if not self._form.is_whole:
            return {name: count for name, count in REFERENCE_COUNTS.items() if name.startswith("test.")}
        return REFERENCE_COUNTS | ({"vocabulary": VOCABULARY[min_count]} if min_count in VOCABULARY else {})


class _Archive:
    """The folder that the original archive unpacks to; each shard may be compressed by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _shards(self) -> dict[str, dict[int, Path]]:
        """Paths of the training and held-out shards, by number."""
        with disk_errors_named(self._folder):
            if not self._folder.is_dir():
                raise UserError(f"corpus.folder={self._folder} is no folder; name the one that the archive unpacks to")
            shards = {kind: self._find(kind) for kind in _FOLDERS}
        train, held_out = (self._folder / name for name in _FOLDERS.values())
        if not shards["train"]:
            raise UserError(f"{train} holds no shard news.en-00001-of-00100 to ...-00099-...")
        if 0 not in shards["held-out"]:
            raise UserError(f"{held_out} lacks news.en.heldout-00000-of-00050, the test shard")
        if len(shards["held-out"]) == 1:
            reason = "validation needs another, such as news.en.heldout-00001-of-00050"
            raise UserError(f"{held_out} holds the test shard only; {reason}")
        return shards

    def _find(self, kind: str) -> dict[int, Path]:
        folder = self._folder / _FOLDERS[kind]
        if not folder.is_dir():
            raise UserError(f"{self._folder} lacks {_FOLDERS[kind]}; name the folder that the archive unpacks to")
        found: dict[int, Path] = {}
        for path in sorted(folder.iterdir()):
            if match := _NAMES[kind].fullmatch(path.name):
                number = int(match[1])
                if number in found:
                    raise UserError(f"{path} and {found[number].name} are the same shard; keep one of them")
                if path.stat().st_size == 0:
                    raise UserError(f"{path} is empty: a shard holds sentences; fetch it again, or remove the file")
                found[number] = path.resolve()
        return found

    def _paths(self, split: str) -> list[Path]:
        if split == "train":
            return list(self._shards["train"].values())
        test, *others = self._shards["held-out"].values()
        return [test] if split == "test" else others

    @property
    def is_whole(self) -> bool:
        return len(self._shards["train"]) == NUM_SHARDS["train"]

    def parts(self, split: str) -> list[Part]:
        return list(chain.from_iterable(blocks(path) for path in self._paths(split)))

    def inputs(self) -> dict:
        stats = {split: [(path, path.stat()) for path in self._paths(split)] for split in SPLITS}
        return {
            split: [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]
            for split, found in stats.items()
        }

    def notes(self) -> list[str]:
        missing = {kind: NUM_SHARDS[kind] - len(shards) for kind, shards in self._shards.items()}
        if not any(missing.values()):
            return []
        there = " and ".join(f"{len(self._shards[kind])} of {NUM_SHARDS[kind]} {kind} shards" for kind in missing)
        loss = ": perplexities cannot be set beside published ones" if missing["train"] else ""
        return [f"WARNING: {self._folder} holds PART of the benchmark, {there}{loss}"]


class _Tables:
    """Tables of the training shards and of all held-out shards in order: a local folder, or the hub's Parquet files."""

    is_whole = True
    """Assumed: if tables hold only a part of the benchmark, only their counts reveal it."""

    def __init__(
        self, find: Callable[[str], list[tuple[str, int]]], streaming: bool, address: dict[str, str] | None = None
    ) -> None:
        """`find` returns the files of `train` or `test` with their bytes; `address` names them on the hub."""
        self._find, self._streaming, self._address = find, streaming, address

    @cached_property
    def _files(self) -> dict[str, list[tuple[str, int]]]:
        return {split: self._find(split) for split in ("train", "test")}

    def parts(self, split: str) -> list[Part]:
        if split == "train":
            return [Rows((file,), size, self._streaming) for file, size in self._files["train"]]
        files = tuple(file for file, _ in self._files["test"])
        size, cut = sum(size for _, size in self._files["test"]), REFERENCE_COUNTS["test.sentences"]
        test, valid = Rows(files, size, self._streaming, 0, cut), Rows(files, size, self._streaming, cut)
        if split == "valid" and any(True for _ in valid.sentences()):
            return [valid]
        self._check(test)
        if split == "test":
            return [test]
        raise UserError(
            f"{files[-1]} ends with the {cut:,} held-out sentences of the benchmark's test shard, and `valid` consists "
            "of the sentences after them; add the other held-out shards"
        )

    def _check(self, test: Rows) -> None:
        """Raise `UserError` unless the first held-out sentences are those of the benchmark's test shard."""
        counts = [len(sentence.split()) + 1 for sentence in test.sentences()]
        sentences, words = REFERENCE_COUNTS["test.sentences"], REFERENCE_COUNTS["test.words"]
        if (len(counts), sum(counts)) != (sentences, words):
            raise UserError(
                f"the first {len(counts):,} held-out sentences of {test.files[0]} hold {sum(counts):,} words with "
                f"</S>, not the {words:,} in {sentences:,} of the benchmark's test shard: the text or its order "
                "differs; use corpus.folder=..., the folder of the original archive"
            )

    def inputs(self) -> dict:
        return self._address or {
            split: [[file, size, Path(file).stat().st_mtime_ns] for file, size in files]
            for split, files in self._files.items()
        }

    def notes(self) -> list[str]:
        return []
