"""Large text: the same folder with any number of processes and after any interruption, each part encoded once."""

import json
import random
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import moe_lm.data.corpus.lines
import moe_lm.data.prepare
from moe_lm.data.corpus.text import Text
from moe_lm.data.prepare import Preparation, prepare
from moe_lm.data.prepared import open_prepared
from moe_lm.data.vocabulary.words import Words
from moe_lm.errors import UserError

WORDS = Words(file=None, min_count=2, max_size=None)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """A few kilobytes count as large text, in blocks of half a kilobyte."""
    make_large(monkeypatch.setattr)


def make_large(setattr=setattr):
    setattr(moe_lm.data.prepare, "LARGE", 1)
    setattr(moe_lm.data.corpus.lines, "BLOCK", 500)


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    for split, count in {"train-1": 150, "train-2": 120, "valid": 30, "test": 30}.items():
        lines = [" ".join(draw.choices(words, range(300, 0, -1), k=draw.randint(0, 12))) for _ in range(count)]
        (tmp_path / split).write_text("\n".join(lines) + "\n" * (split != "train-1"))
    return tmp_path


def corpus(folder):
    return Text(train=str(folder / "train-*"), valid=str(folder / "valid"), test=str(folder / "test"), max_words=10)


def make(corpus, folder, num_processes=1, log=lambda line: None, recipe=WORDS):
    return prepare(
        corpus=corpus,
        recipe=recipe,
        folder=folder,
        settings={},
        log=log,
        progress=False,
        num_processes=num_processes,
    )


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Spied:
    """A corpus that counts how often each part is read; one part may kill the process."""

    def __init__(self, folder, deadly=None):
        self.inner, self.deadly, self.reads = corpus(folder), deadly, Counter()
        self.max_words, self.inputs, self.notes = self.inner.max_words, self.inner.inputs, self.inner.notes
        self.reference_counts = self.inner.reference_counts

    def parts(self, split):
        return [SpiedPart(self, split, index, part) for index, part in enumerate(self.inner.parts(split))]


class SpiedPart:
    def __init__(self, corpus, split, index, part):
        self.corpus, self.split, self.index, self.part = corpus, split, index, part
        self.name, self.size = part.name, part.size

    def sentences(self):
        for number, line in enumerate(self.part.sentences()):
            if number == 1:  # asking for the first sentence only is no reading
                self.corpus.reads[self.split, self.index] += 1
                if (self.split, self.index, self.corpus.reads[self.split, self.index]) == self.corpus.deadly:
                    import os
                    import signal

                    os.kill(os.getpid(), signal.SIGKILL)
            yield line


def killed(text, deadly):
    """Prepare text / "data" in a process that dies when it reads this part for the n-th time."""
    code = f"""
        import sys
        sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
        from pathlib import Path
        from test_preparation import Spied, make, make_large
        make_large()
        text = Path({str(text)!r})
        make(Spied(text, {deadly!r}), text / "data")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr


def test_arrays_equal_the_sentences_encoded_one_by_one(text):
    whole = make(corpus(text), text / "data").splits["train"]
    vocabulary = open_prepared(text / "data", WORDS).vocabulary
    lines = ((text / "train-1").read_text() + "\n" + (text / "train-2").read_text()).split("\n")
    sentences = [line.split() for line in lines if 0 < len(line.split()) <= 10]
    assert whole.num_sentences == len(sentences)
    for index, sentence in enumerate(sentences):
        ids = whole.tokens[whole.starts[index] : whole.starts[index + 1]].tolist()
        assert ids == [*vocabulary.encode(" ".join(sentence)), vocabulary.end]


def test_the_number_of_processes_changes_nothing(text):
    logged = []
    one = make(corpus(text), text / "one", 1)
    two = make(corpus(text), text / "two", 2, logged.append)
    assert len(corpus(text).parts("train")) > 8
    assert content(text / "one") == content(text / "two")
    assert one.fingerprint == two.fingerprint
    (counting,) = [line for line in logged if line.startswith("counting: ")]
    assert "words/s, 2 processes" in counting


# A train part is read for counting, then for encoding.
@pytest.mark.parametrize("deadly", [("train", 3, 1), ("train", 0, 2), ("train", 5, 2), ("test", 1, 1)])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_preparation_resumes_and_gives_the_same_bytes(text, deadly, num_processes):
    make(corpus(text), text / "undisturbed")
    killed(text, deadly)
    with pytest.raises(UserError, match="not prepared"):
        open_prepared(text / "data", WORDS)
    spied, logged = Spied(text), []
    if num_processes == 1:
        make(spied, text / "data", 1, logged.append)
        split, index, time = deadly
        for number in range(len(spied.parts("train"))):
            is_done = number < index or split == "test"
            # What was counted is left to encode, what was encoded is not read at all.
            passes = (1 if is_done else 2) if (split, time) == ("train", 1) else (0 if is_done else 1)
            assert spied.reads["train", number] == passes
    else:
        make(corpus(text), text / "data", 2, logged.append)
    assert logged[0].startswith("resuming the interrupted preparation in ")
    assert content(text / "data") == content(text / "undisturbed")
    assert not list(text.glob(".data.partial*"))


def test_an_interrupted_preparation_of_other_inputs_is_not_resumed(text):
    killed(text, ("train", 5, 2))
    (text / "train-2").write_text("w1 w2 w1 w2\n")
    logged = []
    make(corpus(text), text / "data", 1, logged.append)
    assert not logged[0].startswith("resuming")
    make(corpus(text), text / "undisturbed")
    assert content(text / "data") == content(text / "undisturbed")


def test_a_damaged_part_is_encoded_again(text):
    make(corpus(text), text / "undisturbed")
    killed(text, ("test", 1, 1))
    parts = text / ".data.partial" / "parts"
    (parts / "train-00001.tokens").write_bytes(b"cut")
    (parts / "train-00002.json").write_text("{")
    spied = Spied(text)
    make(spied, text / "data")
    assert {index for (split, index), reads in spied.reads.items() if split == "train" and reads} == {1, 2}
    assert content(text / "data") == content(text / "undisturbed")


def test_an_error_in_a_part_names_its_line(text):
    lines = (text / "train-1").read_bytes().split(b"\n")
    lines[100] = b"bad \xff byte"
    (text / "train-1").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"train-1, line 101: not UTF-8"):
        make(corpus(text), text / "data", 2)


def test_too_small_a_disk_is_refused_before_it_is_full(text, monkeypatch):
    free = shutil.disk_usage(text)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"needs 0\.0 GB for the token ids and has 0\.0 GB free; make room"):
        make(corpus(text), text / "data")


@pytest.fixture
def listed(text):
    """A vocabulary from a file, so that no word is counted, and the bytes of the arrays of parts and of splits."""
    (text / "words").write_text("".join(f"w{i}\n" for i in range(300)))
    recipe = Words(file=str(text / "words"), min_count=1, max_size=None)
    splits = make(corpus(text), text / "whole", recipe=recipe).splits.values()
    parts = sum(4 * len(split.tokens) + 8 * split.num_sentences for split in splits)
    return recipe, parts, sum(4 * len(split.tokens) + 12 * split.num_sentences for split in splits)


def test_too_small_a_disk_is_refused_before_encoding_where_no_word_is_counted(text, monkeypatch, listed):
    recipe, parts, whole = listed
    disk = shutil.disk_usage(text)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=(parts + whole) * 6 // 10))
    with pytest.raises(UserError, match="free; make room"):
        make(corpus(text), text / "data", recipe=recipe)
    assert not list((text / ".data.partial" / "parts").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=parts + whole))
    assert make(corpus(text), text / "data", recipe=recipe).fingerprint


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_disk_that_others_fill_is_refused_before_the_parts_are_joined(text, monkeypatch, listed, lacking):
    recipe, _, whole = listed
    disk, encode = shutil.disk_usage(text), Preparation._encode

    def encode_and_fill(preparation):
        parts = encode(preparation)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=whole - lacking))
        return parts

    monkeypatch.setattr(Preparation, "_encode", encode_and_fill)
    if not lacking:
        assert make(corpus(text), text / "data", recipe=recipe).fingerprint
        return
    with pytest.raises(UserError, match="free; make room"):
        make(corpus(text), text / "data", recipe=recipe)
    assert not list((text / ".data.partial" / "whole").iterdir())


class Published(Text):
    """Text with published counts."""

    published: dict

    def reference_counts(self, min_count):
        assert min_count == 2
        return self.published


def test_published_figures_are_compared_and_stored(text):
    plain = make(corpus(text), text / "plain")
    published = {"train.sentences": plain.statistics["train"]["sentences"], "vocabulary": plain.vocabulary.size}
    mine = Published(train=str(text / "train-*"), valid=str(text / "valid"), test=str(text / "test"), max_words=10)
    mine.published, logged = published, []
    same = make(mine, text / "same", log=logged.append)
    assert logged[-1].startswith(f"agrees with the published figures: train sentences {published['train.sentences']:,}")
    assert json.loads((text / "same" / "data.json").read_text())["figures"] == same.reference_counts
    assert same.reference_counts["vocabulary"] == {"expected": plain.vocabulary.size, "found": plain.vocabulary.size}
    found, size = published["train.sentences"], plain.vocabulary.size
    mine.published = {"train.sentences": found + 1, "vocabulary": size - 3}
    logged.clear()
    make(mine, text / "other", log=logged.append)
    stars, *warning, last = logged[-7:]
    assert stars == last == "*" * 72
    assert warning == [
        "WARNING: counts differ from the published figures",
        f"  train sentences: {found:,}, published {found + 1:,} (-1)",
        f"  vocabulary with <S>, </S> and <UNK>: {size:,}, published {size - 3:,} (+3)",
        "  So small a difference may come from counting the markers in another way.",
        "This is NOT the published text: perplexities on it cannot be compared with published ones.",
    ]
