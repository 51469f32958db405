"""The 1-Billion-Word Benchmark (Chelba et al. 2013, arXiv 1312.3005), from its archive or through `datasets`.

In both forms `test` is held-out shard 0, the one that every published perplexity is measured on, and `valid` the
other held-out shards.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

from moe_lm.data.corpus import Part
from moe_lm.data.corpus.lines import blocks, disk_errors_named
from moe_lm.data.corpus.tables import Rows, hub_files, local_files
from moe_lm.errors import UserError

NUM_SHARDS = {"train": 99, "held-out": 50}
"""Shards of the whole benchmark."""
FIGURES = {
    "train.sentences": 30_301_028,
    "train.words": 798_949_912,
    "test.sentences": 6_075,
    "test.words": 159_658,
}
"""Published counts, words with one `</S>` a sentence; 829,250,940 is the training text's with both markers."""
HUB = {"path": "billion-word-benchmark/lm1b", "revision": "refs/convert/parquet", "subset": "plain_text"}
"""Where the hub has the benchmark as Parquet files, unless the configuration says otherwise."""
VOCABULARY = {3: 793_471}
"""Published size by least count, the markers `<S>`, `</S>` and `<UNK>` included."""

_FOLDERS = {"train": "training-monolingual.tokenized.shuffled", "held-out": "heldout-monolingual.tokenized.shuffled"}
_SUFFIX = r"(\.gz|\.xz|\.zst)?"
_NAMES = {
    # Number 0 is what the held-out shards were cut from.
    "train": re.compile(rf"news\.en-(?!00000)(\d{{5}})-of-00100{_SUFFIX}"),
    "held-out": re.compile(rf"news\.en\.heldout-(\d{{5}})-of-00050{_SUFFIX}"),
}


class Lm1b:
    """The benchmark's training shards, its test shard, and its other held-out shards for validation."""

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
        """Read the archive's `folder` where given, else `path`: a folder of tables here, or a dataset on the hub.

        `revision` applies to the hub: which branch or commit. `subset` is a folder in either; all three are
        null for those of `HUB`.
        """
        if max_words < 1:
            raise UserError(f"corpus.max_words={max_words} leaves no sentence; give 1 or more")
        self.max_words = max_words
        self._folder, self._streaming = folder, streaming
        self._given = {"path": path, "revision": revision, "subset": subset}
        self._given = {name: value for name, value in self._given.items() if value is not None}
        if folder is not None and self._given:
            name, value = next(iter(self._given.items()))
            raise UserError(f"corpus.{name}={value} does not apply to corpus.folder, the original archive; drop one")

    @cached_property
    def _form(self) -> "_Archive | _Tables | _Hub":
        if self._folder is not None:
            return _Archive(Path(self._folder).expanduser())
        path, revision, subset = (HUB | self._given).values()
        tables = Path(path).expanduser()
        with disk_errors_named(tables):
            is_local, inside = tables.is_dir(), (tables / subset).is_dir()
        if is_local:
            if "revision" in self._given:
                raise UserError(f"corpus.revision={revision} does not apply to {tables}, a folder here; drop it")
            if "subset" in self._given and not inside:
                raise UserError(f"{tables} holds no folder {subset}; give another corpus.subset or drop it")
            root = tables / subset if inside else tables
            return _Tables({split: local_files(root, split) for split in ("train", "test")}, self._streaming)
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return _Hub(path, revision, subset, self._streaming)
        raise UserError(f"corpus.path={path}: there is no such folder, nor can it be the name of a dataset")

    def parts(self, split: str) -> Sequence[Part]:
        """Return the split's shards, or blocks of their lines."""
        return self._form.parts(split)

    def inputs(self) -> dict:
        """Return the files with bytes and times; of the hub its names alone, so that no network is needed."""
        return self._form.inputs()

    def notes(self) -> list[str]:
        """Return a loud line where shards are missing."""
        return self._form.notes()

    def figures(self, min_count: int | None) -> dict[str, int]:
        """Return the published counts of what is there as a whole: the test shard, the 99 training shards."""
        figures = dict(FIGURES)
        if not self._form.is_whole:
            figures = {name: count for name, count in figures.items() if name.startswith("test.")}
        elif min_count in VOCABULARY:
            figures["vocabulary"] = VOCABULARY[min_count]
        return figures


class _Archive:
    """The folder that the original archive unpacks to; its shards may be compressed one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _shards(self) -> dict[str, dict[int, Path]]:
        """Return the paths by number, training and held-out."""
        with disk_errors_named(self._folder):
            if not self._folder.is_dir():
                raise UserError(f"corpus.folder={self._folder} is no folder; name the one that the archive unpacks to")
            shards = {kind: self._found(kind) for kind in _FOLDERS}
        if not shards["train"]:
            raise UserError(
                f"{self._folder / _FOLDERS['train']} holds no shard news.en-00001-of-00100 to ...-00099-..."
            )
        if 0 not in shards["held-out"]:
            raise UserError(
                f"{self._folder / _FOLDERS['held-out']} lacks news.en.heldout-00000-of-00050, the test shard"
            )
        if len(shards["held-out"]) == 1:
            raise UserError(
                f"{self._folder / _FOLDERS['held-out']} holds the test shard only; validation needs another, "
                "such as news.en.heldout-00001-of-00050"
            )
        return shards

    def _found(self, kind: str) -> dict[int, Path]:
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
                    raise UserError(f"{path} is empty: a shard holds sentences; fetch it again, or take the file away")
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
        stats = {split: [(path, path.stat()) for path in self._paths(split)] for split in ("train", "valid", "test")}
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
    """Two lists of tables: training shards, and all held-out shards in order, as the hub's `test` split has them."""

    is_whole = True
    """Taken to be: a part of the benchmark in this form shows by its counts."""

    def __init__(self, files: dict[str, list[tuple[str, int]]], streaming: bool) -> None:
        self._files, self._streaming = files, streaming

    def parts(self, split: str) -> list[Part]:
        if split == "train":
            return [Rows((file,), size, self._streaming) for file, size in self._files["train"]]
        files = tuple(file for file, _ in self._files["test"])
        size, cut = sum(size for _, size in self._files["test"]), FIGURES["test.sentences"]
        test = Rows(files, size, self._streaming, 0, cut)
        if split == "valid":
            after = Rows(files, size, self._streaming, cut)
            if not any(True for _ in after.sentences()):
                self.parts("test")  # which says what is wrong with it
                raise UserError(
                    f"{files[-1]} ends with the {cut:,} held-out sentences of the benchmark's test shard, and `valid` "
                    "is what follows them; add the other held-out shards"
                )
            return [after]
        counts = [len(sentence.split()) + 1 for sentence in test.sentences()]
        if (len(counts), sum(counts)) != (cut, FIGURES["test.words"]):
            raise UserError(
                f"the first {len(counts):,} held-out sentences of {files[0]} hold {sum(counts):,} words with </S>, not "
                f"the {FIGURES['test.words']:,} in {cut:,} of the benchmark's test shard: this is other text or in "
                "another order; use corpus.folder=..., the folder of the original archive"
            )
        return [test]

    def inputs(self) -> dict:
        return {
            split: [[file, size, Path(file).stat().st_mtime_ns] for file, size in files]
            for split, files in self._files.items()
        }

    def notes(self) -> list[str]:
        return []


class _Hub:
    """The Parquet files that the hub made of the benchmark; asked for only when text is."""

    is_whole = True

    def __init__(self, path: str, revision: str, subset: str, streaming: bool) -> None:
        self._path, self._revision, self._subset, self._streaming = path, revision, subset, streaming

    @cached_property
    def _tables(self) -> _Tables:
        files = {split: hub_files(self._path, self._revision, f"{self._subset}/{split}") for split in ("train", "test")}
        return _Tables(files, self._streaming)

    def parts(self, split: str) -> list[Part]:
        return self._tables.parts(split)

    def inputs(self) -> dict:
        return {"path": self._path, "revision": self._revision, "subset": self._subset}

    def notes(self) -> list[str]:
        return []
