"""Text files as a corpus: order, lines, compression, and a clear error for every way they can be damaged."""

import gzip
import lzma
import os

import pytest
import zstandard
from omegaconf import OmegaConf
from training_text import sentences

from moe_lm.data.corpus.text import Text
from moe_lm.errors import UserError

LINES = ["the cat sat", "", "a\u2028b \x85 c", "naïve café —", "last line without an end"]
BYTES = "\n".join(LINES).encode()


def text(train, valid=(), test=()):
    """A corpus whose held-out splits are some other file unless given."""
    return Text(train=train, valid=valid, test=test, max_words=256)


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held-out"
    path.write_text("held out\n")
    return str(path)


def train_lines(pattern, held_out):
    return list(sentences(text(pattern, held_out, held_out), "train"))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("ending", "compress"), [("txt", bytes), ("gz", gzip.compress), ("xz", lzma.compress), ("zst", zst)]
)
def test_every_kind_of_file_gives_its_lines_and_only_newlines_end_one(tmp_path, held_out, ending, compress):
    (tmp_path / f"train.{ending}").write_bytes(compress(BYTES))
    assert train_lines(str(tmp_path / f"train.{ending}"), held_out) == LINES


def test_zst_of_several_frames_written_in_blocks_is_read_whole(tmp_path, held_out):
    lines = [f"sentence number {index}" for index in range(50_000)]
    data = "".join(line + "\n" for line in lines).encode()
    stream = zstandard.ZstdCompressor().compressobj()  # a frame that does not state its size
    frames = zst(data[:100_001]) + stream.compress(data[100_001:]) + stream.flush()
    (tmp_path / "train.zst").write_bytes(frames)
    assert train_lines(str(tmp_path / "train.zst"), held_out) == lines


def test_files_come_in_sorted_order_and_a_file_matched_twice_is_read_once(tmp_path, held_out):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(f"from {name}\n")
    globs = OmegaConf.create([str(tmp_path / "[bc].txt"), str(tmp_path / "*.txt")])
    assert train_lines(globs, held_out) == ["from a.txt", "from b.txt", "from c.txt"]


def test_an_existing_path_with_brackets_is_taken_literally(tmp_path, held_out):
    (tmp_path / "part[1].txt").write_text("literal\n")
    assert train_lines(str(tmp_path / "part[1].txt"), held_out) == ["literal"]


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_word(tmp_path, held_out):
    (tmp_path / "train").write_bytes(b"\xef\xbb\xbfone two\r\nthree\r\n")
    assert [line.split() for line in train_lines(str(tmp_path / "train"), held_out)] == [["one", "two"], ["three"]]


def test_inputs_name_path_size_and_time_and_change_with_the_file(tmp_path, held_out):
    path = tmp_path / "train"
    path.write_text("one\n")
    os.utime(path, ns=(5, 7))
    corpus = text(str(path), held_out, held_out)
    assert corpus.inputs()["train"] == [[str(path.resolve()), 4, 7]]
    path.write_text("two\n")
    assert corpus.inputs()["train"] != [[str(path.resolve()), 4, 7]]


def test_a_large_file_is_read_as_a_stream(tmp_path, held_out):
    (tmp_path / "train.xz").write_bytes(lzma.compress(b"one line\n" * 1000)[:-40])
    lines = sentences(text(str(tmp_path / "train.xz"), held_out, held_out), "train")
    assert next(lines) == "one line"  # the damage at the end is not met before it is read
    lines.close()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_without_a_glob_names_the_key(held_out, tmp_path, split):
    (tmp_path / "train").write_text("one\n")
    given = {"train": str(tmp_path / "train"), "valid": held_out, "test": held_out} | {split: []}
    with pytest.raises(UserError, match=rf"corpus\.{split}=\[\.\.\.\]"):
        text(**given).inputs()


def test_a_glob_without_a_match_is_named(tmp_path, held_out):
    with pytest.raises(UserError, match=r"corpus\.train: no file matches .*nothing-\*\.txt"):
        text(str(tmp_path / "nothing-*.txt"), held_out, held_out).inputs()


def test_a_folder_is_not_a_file(tmp_path, held_out):
    with pytest.raises(UserError, match=r"is a folder; name its files"):
        text(str(tmp_path), held_out, held_out).inputs()


def test_a_file_in_train_and_in_test_is_refused_even_by_another_name(tmp_path, held_out):
    (tmp_path / "train").write_text("one\n")
    (tmp_path / "link").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"is in corpus\.train and in corpus\.test"):
        text(str(tmp_path / "train"), held_out, str(tmp_path / "link")).inputs()


def test_a_link_to_nothing_is_named_itself(tmp_path, held_out):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    for pattern in ("gone.txt", "*.txt"):
        with pytest.raises(UserError, match=r"gone\.txt is a link to .*nothing, which does not exist"):
            text(str(tmp_path / pattern), held_out, held_out).inputs()


def test_bad_utf8_is_reported_with_file_and_line(tmp_path, held_out):
    (tmp_path / "train").write_bytes(b"good\nbad \xff byte\n")
    with pytest.raises(UserError, match=r"train, line 2: not UTF-8"):
        train_lines(str(tmp_path / "train"), held_out)


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zst)])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_compressed_file_is_named(tmp_path, held_out, ending, compress, damage):
    whole = compress(os.urandom(100_000).hex().encode() + b"\n")
    path = tmp_path / f"train.{ending}"
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"this is no archive")
    with pytest.raises(UserError, match=rf"train\.{ending}: damaged or cut short"):
        train_lines(str(path), held_out)


def test_a_file_that_vanishes_is_reported(tmp_path, held_out, monkeypatch):
    path = tmp_path / "train.gz"
    path.write_bytes(gzip.compress(b"one\n"))
    lines = sentences(text(str(path), held_out, held_out), "train")
    monkeypatch.setattr(gzip, "open", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"train\.gz cannot be read: Permission denied"):
        next(lines)


def test_max_words_below_one_is_refused():
    with pytest.raises(ValueError, match=r"corpus\.max_words=0"):
        Text(train=[], valid=[], test=[], max_words=0)
