"""Prepared folders: numbers worked out by hand, a whole folder or none, and repair of every kind of damage."""

import errno
import json
import math
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import moe_lm.data.parts
import moe_lm.data.prepare
from moe_lm.data.prepare import Preparation, prepare
from moe_lm.data.prepared import open_prepared
from moe_lm.data.vocabulary.subwords import Subwords
from moe_lm.data.vocabulary.words import Words
from moe_lm.errors import UserError

TEXT = {
    "train": ["b a a", "a b", "", "c a b d e", "  ", "a"],  # the third sentence is longer than max_words
    "valid": ["a x", "a b c d e f"],
    "test": ["b"],
}


class Lines:
    """A corpus in memory that counts how often it is read; `None` among the lines stands for an error."""

    max_words = 4

    def __init__(self, text=TEXT, stamp=0, error=None):
        self.text, self.stamp, self.error, self.passes = text, stamp, error, Counter()

    def parts(self, split):
        return [Whole(self, split)]

    def inputs(self):
        return {"stamp": self.stamp, "tuple": (1, 2)}

    def notes(self):
        return []

    def reference_counts(self, min_count):
        return {}


class Whole:
    """A split of such a corpus as one part."""

    size = 1

    def __init__(self, corpus, name):
        self.corpus, self.name = corpus, name

    def sentences(self):
        self.corpus.passes[self.name] += 1
        for line in self.corpus.text[self.name]:
            if line is None:
                raise self.corpus.error
            yield line


WORDS = Words(file=None, min_count=1, max_size=None)


def make(folder, corpus=None, recipe=WORDS, log=lambda line: None, settings=None):
    return prepare(
        corpus=corpus or Lines(), recipe=recipe, folder=folder, settings=settings or {}, log=log, progress=False
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_arrays_worked_out_by_hand(tmp_path):
    prepared = make(tmp_path / "data")
    vocabulary = prepared.vocabulary
    # Kept for training: "b a a", "a b", "a"; so a 4, </S> 3, b 2, <UNK> 0, <S> last.
    assert [vocabulary.token(index) for index in range(5)] == ["a", "</S>", "b", "<UNK>", "<S>"]
    train, valid, test = (prepared.splits[split] for split in ("train", "valid", "test"))
    assert train.tokens.tolist() == [2, 0, 0, 1, 0, 2, 1, 0, 1]
    assert train.starts.tolist() == [0, 4, 7, 9]
    assert train.words.tolist() == [4, 3, 2]
    assert valid.tokens.tolist() == [0, 3, 1, 0, 2, 3, 3, 3, 3, 1]  # the long held-out sentence is kept
    assert (valid.starts.tolist(), valid.words.tolist()) == ([0, 3, 10], [3, 7])
    assert test.tokens.tolist() == [2, 1]
    assert (train.num_sentences, train.num_words) == (3, 9)
    assert (train.tokens.dtype, train.starts.dtype, train.words.dtype) == (np.int32, np.int64, np.uint32)
    assert all(isinstance(values, np.memmap) for values in (train.tokens, train.starts, train.words))


def test_statistics_worked_out_by_hand(tmp_path):
    statistics = make(tmp_path / "data").statistics
    assert statistics["train"] == {
        "sentences": 3,
        "words": 9,
        "tokens": 9,
        "unknown_words": 0,
        "empty_lines": 2,
        "longer_than_max_words": 1,
    }
    valid = statistics["valid"]
    assert (valid["unknown_words"], valid["longer_than_max_words"], valid["words"]) == (5, 1, 10)
    # Add one: a 5, </S> 4, b 3, <UNK> 1, <S> 1 of 14. Test is "b </S>".
    assert statistics["test"]["unigram_perplexity"] == pytest.approx((14 / 3 * 14 / 4) ** (1 / 2))
    nats = 2 * math.log(14 / 5) + 5 * math.log(14) + 2 * math.log(14 / 4) + math.log(14 / 3)
    assert valid["unigram_perplexity"] == pytest.approx(math.exp(nats / 10))


def test_lines_for_the_console_name_what_was_left_out(tmp_path):
    lines = []
    make(tmp_path / "data", log=lines.append)
    assert lines == [
        "vocabulary: 5 tokens",
        "train: 3 sentences, 9 words with </S>, 9 tokens, 0.00 % unknown"
        "; 1 of more than 4 words left out; 2 empty lines skipped",
        "valid: 2 sentences, 10 words with </S>, 10 tokens, 62.50 % unknown; 1 of more than 4 words kept",
        "test: 1 sentences, 2 words with </S>, 2 tokens, 0.00 % unknown",
        "unigram perplexity: valid 6.9, test 4.0",
    ]


def long_text():
    source = random.Random(0)
    sentence = lambda: " ".join(source.choices(["apple", "pear", "fig", "plum"], [8, 4, 2, 1], k=source.randint(1, 4)))  # noqa: E731
    return {"train": [sentence() for _ in range(300)], "valid": [sentence()], "test": [sentence()]}


@pytest.mark.parametrize("buffer", [1, 7, 1 << 20])
def test_the_size_of_the_buffer_changes_nothing(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(moe_lm.data.parts, "BUFFER", buffer)
    corpus = Lines(long_text())
    prepared = make(tmp_path / "data", corpus)
    train = prepared.splits["train"]
    ids = [[*prepared.vocabulary.encode(line), prepared.vocabulary.end] for line in corpus.text["train"]]
    assert train.tokens.tolist() == [index for sentence in ids for index in sentence]
    assert train.words.tolist() == [len(sentence) for sentence in ids]
    for index, sentence in enumerate(ids):
        assert train.tokens[train.starts[index] : train.starts[index + 1]].tolist() == sentence
    monkeypatch.undo()
    assert make(tmp_path / "whole", corpus).fingerprint == prepared.fingerprint


def test_with_subwords_the_words_are_counted_and_not_the_pieces(tmp_path):
    corpus = Lines(long_text())
    prepared = make(tmp_path / "data", corpus, Subwords(size=270, max_sentences=1000))
    train = prepared.splits["train"]
    assert train.words.tolist() == [len(line.split()) + 1 for line in corpus.text["train"]]
    assert len(train.tokens) > train.num_words
    for index, line in enumerate(corpus.text["train"]):
        assert prepared.vocabulary.decode(train.tokens[train.starts[index] : train.starts[index + 1]].tolist()) == line
    counts = np.bincount(train.tokens, minlength=270) + 1
    held_out = prepared.splits["test"]
    nats = -sum(math.log(counts[token] / counts.sum()) for token in held_out.tokens)
    expected = math.exp(nats / held_out.num_words)
    assert prepared.statistics["test"]["unigram_perplexity"] == pytest.approx(expected)


def test_a_repeat_reads_no_text(tmp_path):
    first = make(tmp_path / "data", settings={"seed": 1})
    corpus = Lines()
    again = make(tmp_path / "data", corpus, settings={"seed": 1})
    assert not corpus.passes
    assert again.fingerprint == first.fingerprint
    assert again.statistics == first.statistics


def test_other_inputs_prepare_the_text_again(tmp_path):
    make(tmp_path / "data")
    for corpus, settings in ((Lines(stamp=1), {}), (Lines(stamp=1), {"min_count": 2})):
        make(tmp_path / "data", corpus, settings=settings)
        assert corpus.passes
        repeat = Lines(stamp=1)
        make(tmp_path / "data", repeat, settings=settings)
        assert not repeat.passes
    assert names(tmp_path) == ["data"]


def test_another_max_words_prepares_the_text_again(tmp_path):
    make(tmp_path / "data")
    longer = Lines()
    longer.max_words = 5
    assert make(tmp_path / "data", longer).splits["train"].num_sentences == 4


def test_the_fingerprint_follows_vocabulary_and_tokens_only(tmp_path):
    fingerprint = make(tmp_path / "a").fingerprint
    assert make(tmp_path / "b", Lines(stamp=9)).fingerprint == fingerprint
    assert make(tmp_path / "c", Lines(TEXT | {"test": ["a"]})).fingerprint != fingerprint


@pytest.mark.parametrize("file", ["data.json", "vocabulary.txt", "train.tokens", "valid.starts", "test.words"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_folder_is_reported_and_mended(tmp_path, file, damage):
    folder = tmp_path / "data"
    whole = make(folder)
    path = folder / file
    before = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(before[:-3])
    with pytest.raises(UserError, match="prepare it"):
        open_prepared(folder, WORDS)
    assert make(folder).fingerprint == whole.fingerprint
    assert path.read_bytes() == before
    assert names(tmp_path) == ["data"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', '{"format": 1, "files": 3}', "\udcff"])
def test_a_damaged_record_is_reported(tmp_path, content):
    make(tmp_path / "data")
    (tmp_path / "data" / "data.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        open_prepared(tmp_path / "data", WORDS)


def test_another_format_is_reported(tmp_path):
    make(tmp_path / "data")
    record = json.loads((tmp_path / "data" / "data.json").read_text())
    (tmp_path / "data" / "data.json").write_text(json.dumps(record | {"format": 0}))
    with pytest.raises(UserError, match="has format 0, this version reads 1"):
        open_prepared(tmp_path / "data", WORDS)


def test_a_folder_that_was_never_prepared_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"nothing is not prepared \(data\.json is missing\)"):
        open_prepared(tmp_path / "nothing", WORDS)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_without_a_sentence_is_refused(tmp_path, split):
    with pytest.raises(UserError, match=f"the {split} split of the corpus has no sentence"):
        make(tmp_path / "data", Lines(TEXT | {split: ["", " \t"]}))
    assert names(tmp_path) == []


def test_training_text_of_long_sentences_only_is_refused(tmp_path):
    with pytest.raises(UserError, match="the train split of the corpus has no sentence of at most 4 words"):
        make(tmp_path / "data", Lines(TEXT | {"train": ["a b c d e"]}))


@pytest.mark.parametrize("error", [UserError("line 3: not UTF-8"), RuntimeError("bug"), ConnectionError("offline")])
def test_an_error_in_the_text_is_raised_and_leaves_no_files(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        make(tmp_path / "data", Lines(TEXT | {"valid": ["a", None]}, error=error))
    assert names(tmp_path) == []


def test_a_full_disk_is_a_user_error_and_keeps_the_old_folder(tmp_path, monkeypatch):
    before = make(tmp_path / "data").fingerprint

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*data: No space left on device"):
        make(tmp_path / "data", Lines(TEXT | {"test": ["a"]}, stamp=1))
    assert names(tmp_path) == ["data"]
    assert open_prepared(tmp_path / "data", WORDS).fingerprint == before


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/data: "):
        make(tmp_path / "file" / "data")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files than prepared text"):
        make(tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"


def test_a_process_killed_in_the_middle_leaves_no_prepared_folder(tmp_path):
    code = f"""
        import os, signal, sys
        sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
        from pathlib import Path
        from test_prepared import Lines, make
        class Killed(Lines):
            def parts(self, split):
                if split == "valid":
                    self.text = dict(self.text, valid=Deadly(self.text["valid"], self.passes))
                return super().parts(split)
        class Deadly(list):
            def __init__(self, lines, passes):
                super().__init__(lines)
                self.passes = passes
            def __iter__(self):
                yield from super().__iter__()
                if self.passes["valid"] == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        make(Path({str(tmp_path / "data")!r}), Killed())
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert (tmp_path / ".data.partial" / "parts" / "train-00000.tokens").exists()  # it was well under way
    with pytest.raises(UserError, match="not prepared"):
        open_prepared(tmp_path / "data", WORDS)
    assert make(tmp_path / "data").splits["train"].num_sentences == 3
    assert names(tmp_path) == ["data"]


def test_two_processes_do_not_prepare_at_once(tmp_path):
    """The second waits for the lock, says so, and then finds the work done."""
    corpus, logged = Lines(), []
    lock = FileLock(tmp_path / ".data.lock")
    lock.acquire()

    def log(line):
        logged.append(line)
        if line.startswith("waiting"):
            # What the other process does meanwhile: it prepares, then lets go.
            quiet = {"log": lambda line: None, "progress": False, "num_processes": 1}
            Preparation(Lines(), WORDS, tmp_path / "data", **quiet).run(inputs)
            lock.release()

    inputs = {"settings": {}, "corpus": {"stamp": 0, "tuple": [1, 2]}, "vocabulary": {"file": None}, "max_words": 4}
    make(tmp_path / "data", corpus, log=log)
    assert logged == [f"waiting: another process prepares {tmp_path / 'data'}"]
    assert not corpus.passes


def test_a_finished_folder_opens_where_no_lock_can_be_had(tmp_path, monkeypatch):
    make(tmp_path / "data")
    monkeypatch.setattr(moe_lm.data.prepare, "FileLock", lambda path: pytest.fail("a read-only place has no lock"))
    make(tmp_path / "data")


def test_progress_goes_to_standard_error_only_when_asked(tmp_path, capsys):
    make(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    with suppress(UserError):
        prepare(corpus=Lines(), recipe=WORDS, folder=tmp_path / "bars", settings={}, log=print, progress=True)
    output = capsys.readouterr()
    assert "vocabulary: 5 tokens" in output.out
    assert "counting" in output.err
    assert "encoding" in output.err
    assert "sentences" in output.err
