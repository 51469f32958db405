"""Files read in blocks: every line once, whole and with its number, wherever the blocks begin."""

import gzip

import pytest

import moe_lm.data.corpus.lines
from moe_lm.data.corpus.lines import Block, blocks
from moe_lm.errors import UserError

TEXT = "\ufeffone two\n\nthree\r\nfür vier \u2028 x\n\n\na long line, longer than many a block is\nlast".encode()
LINES = ["one two", "", "three\r", "für vier \u2028 x", "", "", "a long line, longer than many a block is", "last"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_wherever_a_file_is_cut_its_lines_stay_whole(tmp_path, monkeypatch, end):
    (tmp_path / "text").write_bytes(TEXT + end)
    for size in range(1, len(TEXT) + 2):
        monkeypatch.setattr(moe_lm.data.corpus.lines, "BLOCK", size)
        parts = blocks(tmp_path / "text")
        assert [line for part in parts for line in part.sentences()] == LINES, size
        assert sum(part.size for part in parts) == len(TEXT + end)
        assert len({part.name for part in parts}) == len(parts) == -(-len(TEXT + end) // size)


@pytest.mark.parametrize("begin", [0, 10, 20, 29])
def test_a_bad_byte_is_on_the_line_of_the_file_and_not_of_the_block(tmp_path, begin):
    (tmp_path / "text").write_bytes(b"one\ntwo three\nfour five six\nbad \xff\n")
    block = Block(tmp_path / "text", begin, 100)
    if begin == 29:
        assert list(block.sentences()) == []
        return
    with pytest.raises(UserError, match="text, line 4: not UTF-8"):
        list(block.sentences())


def test_a_compressed_file_is_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_lm.data.corpus.lines, "BLOCK", 5)
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 100))
    (part,) = blocks(tmp_path / "text.gz")
    assert list(part.sentences()) == ["one", "two"] * 100
    assert part.size == (tmp_path / "text.gz").stat().st_size


def test_an_empty_file_is_a_block_without_a_line(tmp_path):
    (tmp_path / "text").write_bytes(b"")
    (part,) = blocks(tmp_path / "text")
    assert list(part.sentences()) == []
