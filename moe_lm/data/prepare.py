"""Preparation of a corpus: text to a folder of token ids, on several processes, resumed after an interruption.

Stages: count the words, build the vocabulary, encode each part, join the parts. Until all are done, their files are in
`.<folder>.partial`: `plan.json` (what is being prepared), `counts/` (word counts of each part), `vocabulary/`,
`parts/` (arrays and statistics of each part) and `whole/`, which becomes the folder.
"""

import errno
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from moe_lm.atomic_io import sync, write_text
from moe_lm.data.corpus import SPLITS, Corpus
from moe_lm.data.parts import (
    STATISTICS,
    Encoder,
    count_part,
    join_parts,
    kept_sentences,
    part_statistics,
    part_stem,
    read_json,
    run_on_parts,
)
from moe_lm.data.prepared import FORMAT, Prepared, open_prepared, read_record, reference_lines, statistics_line
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.errors import UserError

LARGE = 32 << 20
"""Bytes of text from which a preparation uses worker processes, flushes arrays to the disk and reports its speed."""
_SAMPLE = 1000
"""Sentences from which the size of the arrays is estimated."""
# Errors of a disk; a corpus read over a network raises OSError for other reasons.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_ERRORS |= {errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG}


def prepare(
    *,
    corpus: Corpus,
    recipe: VocabularyRecipe,
    folder: Path,
    settings: dict,
    log: Callable[[str], None],
    progress: bool,
    num_processes: int = 1,
) -> Prepared:
    """Prepare `folder` unless it is up to date; raises `UserError` for text that cannot be read and for a full disk.

    `settings` is the configuration of corpus and vocabulary; after any change to it the text is prepared again. The
    number of processes does not affect the folder's content.
    """
    inputs = {"settings": settings, "corpus": corpus.inputs(), "vocabulary": recipe.inputs()}
    inputs = json.loads(json.dumps(inputs | {"max_words": corpus.max_words}))
    if current := _open_if_current(folder, recipe, inputs):
        shutil.rmtree(partial_folder(folder), ignore_errors=True)  # a crash at the very end may have left it
        return current
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, log):
            # Another process may have prepared it while this one waited.
            if current := _open_if_current(folder, recipe, inputs):
                return current
            Preparation(corpus, recipe, folder, log=log, progress=progress, num_processes=num_processes).run(inputs)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        reason = f"{error.strerror}; mend this and repeat the command, or choose another folder"
        raise UserError(f"cannot write {folder}: {reason}") from error
    return open_prepared(folder, recipe)


def partial_folder(folder: Path) -> Path:
    """Return the folder in which `folder` is prepared."""
    return folder.parent / f".{folder.name}.partial"


def _open_if_current(folder: Path, recipe: VocabularyRecipe, inputs: dict) -> Prepared | None:
    try:
        if read_record(folder)["inputs"] == inputs:
            return open_prepared(folder, recipe)
    except UserError:
        pass  # missing, damaged or of another format: preparing it again mends that
    return None


def _lock(folder: Path, log: Callable[[str], None]) -> AbstractContextManager:
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log(f"waiting: another process prepares {folder}")
        return lock.acquire()


class Preparation:
    """One preparation; the caller holds the folder's lock. Vocabulary recipes use it as their `TrainingText`."""

    def __init__(
        self,
        corpus: Corpus,
        recipe: VocabularyRecipe,
        folder: Path,
        *,
        log: Callable[[str], None],
        progress: bool,
        num_processes: int,
    ) -> None:
        self._corpus, self._recipe, self._folder, self._partial = corpus, recipe, folder, partial_folder(folder)
        self.log, self._progress = log, progress
        self._parts = {split: list(corpus.parts(split)) for split in SPLITS}
        self._is_large = sum(part.size for parts in self._parts.values() for part in parts) >= LARGE
        self._num_processes = num_processes if self._is_large else 1

    def run(self, inputs: dict) -> None:
        """Prepare everything in the partial folder, then put it in place."""
        is_prepared = (self._folder / "data.json").exists() or (self._folder / "train.tokens").exists()
        if self._folder.exists() and any(self._folder.iterdir()) and not is_prepared:
            raise UserError(f"{self._folder} holds other files than prepared text; choose another folder or empty it")
        try:
            self._start_or_resume(inputs)
            self._put_in_place({"format": FORMAT, "inputs": inputs} | self._run_stages())
        except BaseException as error:
            if not self._is_large:  # starting over takes seconds
                shutil.rmtree(self._partial, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                self.log(f"{self._partial} keeps what is done: repeat the command to resume")
            raise
        shutil.rmtree(self._partial, ignore_errors=True)

    def _start_or_resume(self, inputs: dict) -> None:
        """Keep the files of an interrupted preparation if its plan is the same, and remove them otherwise."""
        plan = {"format": FORMAT, "inputs": inputs}
        plan["parts"] = {split: [part.name for part in parts] for split, parts in self._parts.items()}
        if self._partial.exists() and read_json(self._partial / "plan.json") == plan:
            self.log(f"resuming the interrupted preparation in {self._partial}")
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
        shutil.rmtree(self._partial / "whole", ignore_errors=True)
        for name in ("counts", "parts", "whole"):
            (self._partial / name).mkdir(parents=True, exist_ok=True)
        write_text(self._partial / "plan.json", json.dumps(plan))

    def _put_in_place(self, record: dict) -> None:
        whole = self._partial / "whole"
        record["files"] = {path.name: path.stat().st_size for path in sorted(whole.iterdir())}
        (whole / "data.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for path in [*whole.iterdir(), whole]:
            sync(path)
        if self._folder.exists():
            self._folder.rename(self._partial / "replaced")
        whole.rename(self._folder)
        sync(self._folder.parent)

    def _run_stages(self) -> dict:
        """Return fingerprint, statistics and the comparison with published counts."""
        for split in SPLITS:
            if not any(line.split() for line in self._kept_sentences(split)):
                longest = f" of at most {self._corpus.max_words} words" if split == "train" else ""
                raise UserError(f"the {split} split of the corpus has no sentence{longest}; give it some text")
        for note in self._corpus.notes():
            self.log(note)
        vocabulary = self._build_vocabulary()
        self.log(f"vocabulary: {vocabulary.size:,} tokens")
        if self._is_large and not any((self._partial / "counts").iterdir()):  # otherwise checked after counting
            self._check_disk_space_by_sample()
        parts = self._encode()
        fingerprint, statistics = self._join(vocabulary, parts)
        found = {f"{split}.{name}": count for split, counts in statistics.items() for name, count in counts.items()}
        found["vocabulary"] = vocabulary.size
        published = self._corpus.reference_counts(self._recipe.min_count)
        figures = {name: {"expected": count, "found": found[name]} for name, count in published.items()}
        for line in reference_lines(figures):
            self.log(line)
        return {"fingerprint": fingerprint, "statistics": statistics, "figures": figures}

    def _kept_sentences(self, split: str) -> Iterator[str]:
        for part in self._parts[split]:
            yield from kept_sentences(part, self._corpus.max_words if split == "train" else None)

    def _build_vocabulary(self) -> Vocabulary:
        folder = self._partial / "vocabulary"
        if not folder.exists():
            new = self._partial / "vocabulary.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            self._recipe.build(self).save(new)
            for path in new.iterdir():
                sync(path)
            new.rename(folder)
        return self._recipe.load(folder)

    def sentences(self) -> Iterator[str]:
        """Stream the training sentences, in this process."""
        return iter(tqdm(self._kept_sentences("train"), "vocabulary", disable=not self._progress, unit=" sentences"))

    def count_words(self) -> tuple[Counter[str], int]:
        """Return the count of each word of the training split, and the number of its sentences."""
        folder = self._partial / "counts"
        tasks = list(enumerate(self._parts["train"]))
        files = [folder / f"{index:05}.json" for index, _ in tasks]
        work = partial(count_part, folder=folder, max_words=self._corpus.max_words)
        is_done, total, num_sentences = [path.exists() for path in files], {}, 0
        for _, part in self._run_stage("counting", tasks, is_done, work, lambda index: read_json(files[index])):
            num_sentences += part["sentences"]
            for word, count in zip(part["spelled"], part["counts"], strict=True):
                total[word] = total.get(word, 0) + count
        self._check_disk_space(sum(total.values()) + num_sentences, num_sentences)
        return Counter(total), num_sentences

    def _encode(self) -> dict[str, list[dict]]:
        """Encode every part; return their statistics by split."""
        tasks = [(split, index, part) for split in SPLITS for index, part in enumerate(self._parts[split])]
        stems = [part_stem(self._partial, split, index) for split, index, _ in tasks]
        work = Encoder(self._recipe, self._partial, self._corpus.max_words, durable=self._is_large)
        is_done = [part_statistics(stem) is not None for stem in stems]
        parts = {split: [{}] * len(self._parts[split]) for split in SPLITS}
        for task, part in self._run_stage("encoding", tasks, is_done, work, lambda task: part_statistics(stems[task])):
            split, index, _ = tasks[task]
            parts[split][index] = part
        return parts

    def _run_stage(
        self, name: str, tasks: list[tuple], is_done: list[bool], work: Callable, read: Callable[[int], dict]
    ) -> Iterator[tuple[int, dict]]:
        """Run the tasks that are not done; yield each task's index and the result of `read`, then log the speed."""
        started, new_words = time.perf_counter(), 0
        processes = self._num_processes
        for index, is_new in run_on_parts(name, tasks, is_done, work, num_processes=processes, progress=self._progress):
            part = read(index)
            new_words += part["words"] if is_new else 0
            yield index, part
        seconds = time.perf_counter() - started
        if self._is_large and new_words:
            number = min(processes, len(tasks))
            speed = f"{new_words / seconds:,.0f} words/s, {number} process{'es' * (number > 1)}"
            self.log(f"{name}: {new_words:,} words in {seconds:.1f} s, {speed}")

    def _join(self, vocabulary: Vocabulary, parts: dict[str, list[dict]]) -> tuple[str, dict]:
        """Write vocabulary and arrays to `whole`; return fingerprint and statistics."""
        every = list(chain.from_iterable(parts.values()))
        self._check_disk_space(sum(part["tokens"] for part in every), sum(part["sentences"] for part in every))
        whole, digest = self._partial / "whole", blake2b(digest_size=16)
        for path in sorted((self._partial / "vocabulary").iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
            shutil.copyfile(path, whole / path.name)
        statistics, counts = {}, {}
        for split in SPLITS:
            stems = [part_stem(self._partial, split, index) for index in range(len(parts[split]))]
            counts[split] = join_parts(stems, whole, split, vocabulary.size, digest)
            statistics[split] = {name: sum(part[name] for part in parts[split]) for name in STATISTICS}
            self.log(statistics_line(split, statistics[split], self._corpus.max_words))
        for split in SPLITS[1:]:
            perplexity = _unigram_perplexity(counts["train"], counts[split], statistics[split]["words"])
            statistics[split]["unigram_perplexity"] = perplexity
        held_out = ", ".join(f"{split} {statistics[split]['unigram_perplexity']:,.1f}" for split in SPLITS[1:])
        self.log(f"unigram perplexity: {held_out}")
        return digest.hexdigest(), statistics

    def _check_disk_space_by_sample(self) -> None:
        """Raise if the disk cannot hold four fifths of the arrays, whose size is estimated from the first sentences.

        The estimate is too low for compressed text, as only the compressed size is known, and for subwords, as a word
        may be several tokens.
        """
        lines = chain.from_iterable(part.sentences() for part in self._parts["train"])
        sample = [(len(line.split()), len(line.encode()) + 1) for line in islice(lines, _SAMPLE)]
        lengths = [words + 1 for words, _ in sample if 0 < words <= self._corpus.max_words]
        scale = 0.8 * sum(part.size for part in self._parts["train"]) / sum(size for _, size in sample)
        self._check_disk_space(int(scale * sum(lengths)), int(scale * len(lengths)))

    def _check_disk_space(self, num_tokens: int, num_sentences: int) -> None:
        """Raise if the disk cannot hold the arrays twice: once as parts, once joined to splits."""
        written = sum(path.stat().st_size for path in (self._partial / "parts").iterdir() if path.suffix != ".json")
        needed = (4 + 4) * num_tokens + (8 + 12) * num_sentences - written
        free = shutil.disk_usage(self._partial).free
        if needed > free:
            raise UserError(
                f"{self._folder.parent} needs {needed / 1e9:,.1f} GB for the token ids and has {free / 1e9:,.1f} GB "
                "free; make room or choose another data=..., and repeat the command"
            )


def _unigram_perplexity(train_V: np.ndarray, held_out_V: np.ndarray, num_words: int) -> float:
    """Return the perplexity per word of held-out counts under add-one smoothed training frequencies."""
    log_probability_V = np.log(train_V + 1) - np.log(train_V.sum() + len(train_V))
    return float(np.exp(-(held_out_V @ log_probability_V) / num_words))
