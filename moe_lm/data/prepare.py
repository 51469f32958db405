"""The making of a prepared folder, part by part: resumed where it stopped, on as many processes as wanted.

Beside `<folder>` stands `.<folder>.partial` until it is done: `plan.json` (what is being made), `counts/` (a file of
word counts a part), `vocabulary/`, `parts/` (arrays and statistics a part) and `whole/`, which becomes the folder.
Each file there counts from the moment it has its final name.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from moe_lm import __version__
from moe_lm.atomic_io import sync, write_text
from moe_lm.data.corpus import SPLITS, Corpus, Part
from moe_lm.data.prepare_stages import Encoder, count_part, kept, read_json, record_of, stem_of
from moe_lm.data.reference_counts import compare, report
from moe_lm.data.split_writer import STATISTICS, join_parts, part_is_there, statistics_line, unigram_perplexity
from moe_lm.data.vocabulary import Vocabulary, VocabularyRecipe
from moe_lm.data.workers import each
from moe_lm.errors import UserError

FORMAT = 1
_SAMPLE = 1000
"""Sentences by which the size of the arrays is told before they are made."""
_LARGE = 32 << 20
"""Bytes of text from which worker processes, waiting for the disk and figures of speed are worth their time."""


class Making:
    """One making, and what of it is done already."""

    def __init__(
        self,
        corpus: Corpus,
        recipe: VocabularyRecipe,
        folder: Path,
        *,
        say: Callable[[str], None],
        progress: bool,
        num_processes: int,
    ) -> None:
        self._corpus, self._recipe, self.folder = corpus, recipe, folder
        self._say, self._progress = say, progress
        self._parts: dict[str, list[Part]] = {split: list(corpus.parts(split)) for split in SPLITS}
        self.is_large = sum(part.size for parts in self._parts.values() for part in parts) >= _LARGE
        self._num_processes = num_processes if self.is_large else 1
        self.whole = folder / "whole"

    def take_up(self, inputs: dict) -> None:
        """Keep what an interrupted making of the very same left, and remove anything else."""
        plan = {"format": FORMAT, "version": __version__, "inputs": inputs}
        plan["parts"] = {split: [part.name for part in parts] for split, parts in self._parts.items()}
        for stale in self.folder.parent.glob(f"{self.folder.name}-*"):  # of an earlier version
            shutil.rmtree(stale)
        if self.folder.exists() and read_json(self.folder / "plan.json") == plan:
            self._say(f"going on with {self.folder}, which an interruption left")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("counts", "parts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.whole, ignore_errors=True)
        self.whole.mkdir()
        write_text(self.folder / "plan.json", json.dumps(plan))

    def run(self) -> dict:
        """Make the vocabulary and the arrays; return fingerprint, statistics and what was compared."""
        for split in SPLITS:
            if not any(line.split() for line in self._kept(split)):
                longest = f" of at most {self._corpus.max_words} words" if split == "train" else ""
                raise UserError(f"the {split} split of the corpus has no sentence{longest}; give it some text")
        for note in self._corpus.notes():
            self._say(note)
        vocabulary = self._vocabulary()
        self._say(f"vocabulary: {vocabulary.size:,} tokens")
        if self.is_large and not any((self.folder / "counts").iterdir()):  # else the check went before
            self._refuse_small_disk_by_sample()
        records = self._encode()
        fingerprint, statistics = self._join(vocabulary, records)
        figures = compare(self._corpus.figures(self._recipe.min_count), statistics, vocabulary.size)
        for line in report(figures):
            self._say(line)
        return {"fingerprint": fingerprint, "statistics": statistics, "figures": figures}

    def _kept(self, split: str) -> Iterator[str]:
        """Stream the sentences that are not left out for their length."""
        for part in self._parts[split]:
            yield from kept(part, self._corpus.max_words if split == "train" else None)

    def _vocabulary(self) -> Vocabulary:
        folder = self.folder / "vocabulary"
        if not folder.exists():
            made = folder.with_name("vocabulary.new")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            vocabulary = self._recipe.build(self)
            vocabulary.save(made)
            for path in made.iterdir():
                sync(path)
            made.rename(folder)
        return self._recipe.load(folder)

    # What a recipe asks of the training text (`moe_lm.data.vocabulary.TrainingText`).

    def sentences(self) -> Iterator[str]:
        """Stream the training sentences, in this process."""
        return iter(tqdm(self._kept("train"), "vocabulary", disable=not self._progress, unit=" sentences"))

    def count_words(self) -> tuple[Counter[str], int]:
        """Return how often each word of the training split occurs, and the number of sentences."""
        tasks = list(enumerate(self._parts["train"]))
        paths = [self.folder / "counts" / f"{index:05}.json" for index, _ in tasks]
        work = partial(count_part, folder=self.folder / "counts", max_words=self._corpus.max_words)
        began, fresh = time.perf_counter(), 0
        total, num_sentences = {}, 0
        for index, is_fresh in self._each("counting", tasks, [path.exists() for path in paths], work):
            found = read_json(paths[index])
            num_sentences += found["sentences"]
            for word, count in zip(found["words"], found["counts"], strict=True):
                total[word] = total.get(word, 0) + count
            fresh += sum(found["counts"]) if is_fresh else 0
        self._say_rate("counting", len(tasks), fresh, time.perf_counter() - began)
        self._refuse_small_disk(sum(total.values()) + num_sentences, num_sentences)
        return Counter(total), num_sentences

    def say(self, line: str) -> None:
        """Tell the user."""
        self._say(line)

    def _encode(self) -> dict[str, list[dict]]:
        """Write every part's arrays; return their statistics by split."""
        tasks = [(split, index, part) for split in SPLITS for index, part in enumerate(self._parts[split])]
        stems = [stem_of(self.folder, split, index) for split, index, _ in tasks]
        done = [(record := read_json(record_of(stem))) is not None and part_is_there(stem, record) for stem in stems]
        work = Encoder(self._recipe, self.folder, self._corpus.max_words, durable=self.is_large)
        began, fresh = time.perf_counter(), 0
        records: dict[str, list[dict]] = {split: [{}] * len(self._parts[split]) for split in SPLITS}
        for index, is_fresh in self._each("encoding", tasks, done, work):
            split, number, _ = tasks[index]
            record = records[split][number] = read_json(record_of(stems[index]))
            fresh += record["words"] if is_fresh else 0
        self._say_rate("encoding", len(tasks), fresh, time.perf_counter() - began)
        return records

    def _join(self, vocabulary: Vocabulary, records: dict[str, list[dict]]) -> tuple[str, dict]:
        """Put vocabulary and arrays into `whole`; return fingerprint and statistics."""
        every = [record for split in SPLITS for record in records[split]]
        self._refuse_small_disk(sum(record["tokens"] for record in every), sum(record["sentences"] for record in every))
        digest = blake2b(digest_size=16)
        for path in sorted((self.folder / "vocabulary").iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
            shutil.copyfile(path, self.whole / path.name)
        statistics, counts = {}, {}
        for split in SPLITS:
            stems = [stem_of(self.folder, split, index) for index in range(len(records[split]))]
            counts[split] = join_parts(stems, self.whole, split, vocabulary.size, digest)
            statistics[split] = {name: sum(record[name] for record in records[split]) for name in STATISTICS}
            self._say(statistics_line(split, statistics[split], self._corpus.max_words))
        for split in SPLITS[1:]:
            statistics[split]["unigram_perplexity"] = unigram_perplexity(
                counts["train"], counts[split], statistics[split]["words"]
            )
        held_out = ", ".join(f"{split} {statistics[split]['unigram_perplexity']:,.1f}" for split in SPLITS[1:])
        self._say(f"unigram perplexity: {held_out}")
        return digest.hexdigest(), statistics

    def _each(self, what: str, tasks: list, done: list[bool], work) -> Iterator[tuple[int, bool]]:
        """Yield each task's index, and whether it was worked on now: first what was done before."""
        left = [index for index, is_done in enumerate(done) if not is_done]
        sizes = [task[-1].size for task in tasks]
        sentences = 0

        def watch(amount: int) -> None:
            nonlocal sentences
            sentences += amount
            bar.set_postfix_str(f"{sentences:,} sentences")

        with tqdm(desc=what, total=sum(sizes), unit="B", unit_scale=True, disable=not self._progress) as bar:
            for index, is_done in enumerate(done):
                if is_done:
                    bar.update(sizes[index])
                    yield index, False
            for place, _ in each([tasks[i] for i in left], work, num_processes=self._num_processes, watch=watch):
                bar.update(sizes[left[place]])
                yield left[place], True

    def _say_rate(self, what: str, num_tasks: int, num_words: int, seconds: float) -> None:
        if self.is_large and num_words:
            number = min(self._num_processes, num_tasks)
            rate = f"{num_words / seconds:,.0f} words/s, {number} process{'es' * (number > 1)}"
            self._say(f"{what}: {num_words:,} words in {seconds:.1f} s, {rate}")

    def _refuse_small_disk_by_sample(self) -> None:
        """Raise where the disk cannot hold four fifths of the arrays that the first sentences promise.

        They promise a token a word and as much text as there are bytes: compressed text and subwords are more.
        """
        lines = chain.from_iterable(part.sentences() for part in self._parts["train"])
        sample = [(len(line.split()), len(line.encode()) + 1) for line in islice(lines, _SAMPLE)]
        lengths = [words + 1 for words, _ in sample if 0 < words <= self._corpus.max_words]
        share = 0.8 * sum(part.size for part in self._parts["train"]) / sum(size for _, size in sample)
        self._refuse_small_disk(int(share * sum(lengths)), int(share * len(lengths)))

    def _refuse_small_disk(self, num_tokens: int, num_sentences: int) -> None:
        """Raise where the disk cannot hold the arrays: in parts and, before those go, as a whole."""
        there = sum(path.stat().st_size for path in (self.folder / "parts").iterdir() if path.suffix != ".json")
        needed = (4 + 4) * num_tokens + (8 + 12) * num_sentences - there
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder.parent} needs {needed / 1e9:,.1f} GB for the token ids and has {free / 1e9:,.1f} GB "
                "free; make room or choose another data=..., and repeat the command"
            )
