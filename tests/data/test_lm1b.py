"""The benchmark's archive: which shards are which split, what is missing, damaged or only a part is named."""

import lzma
from pathlib import Path

import pytest
from benchmark_forms import NAMES, SHARDS, TEST_WORDS, TRAIN, TRAINING, lm1b, make
from training_text import sentences

import moe_lm.data.corpus.lm1b
from moe_lm.errors import UserError

pytestmark = pytest.mark.usefixtures("reference_counts")


def test_the_archive_is_read_as_the_benchmark_defines_its_splits(archive):
    corpus = lm1b(archive)
    assert list(sentences(corpus, "train")) == TRAIN
    assert list(sentences(corpus, "test")) == SHARDS[NAMES[5]]
    assert list(sentences(corpus, "valid")) == SHARDS[NAMES[6]] + SHARDS[NAMES[7]]
    assert corpus.notes() == []


def test_shards_may_be_compressed(archive):
    plain = {split: list(sentences(lm1b(archive), split)) for split in ("train", "valid", "test")}
    for name in (NAMES[1], NAMES[5]):
        (archive / f"{name}.xz").write_bytes(lzma.compress((archive / name).read_bytes()))
        (archive / name).unlink()
    assert {split: list(sentences(lm1b(archive), split)) for split in ("train", "valid", "test")} == plain


def test_inputs_name_every_shard_and_change_with_it(archive):
    before = lm1b(archive).inputs()
    assert [len(before[split]) for split in ("train", "valid", "test")] == [4, 2, 1]
    (archive / NAMES[2]).write_text("other\n")
    assert lm1b(archive).inputs() != before


def test_a_part_of_the_benchmark_logs_a_warning(archive):
    (archive / NAMES[2]).unlink()
    (archive / NAMES[6]).unlink()
    (note,) = lm1b(archive).notes()
    assert "WARNING" in note
    assert "3 of 4 train shards and 2 of 3 held-out shards: perplexities cannot be set beside" in note
    assert lm1b(archive).reference_counts(3).keys() == {"test.sentences", "test.words"}
    logged = []
    make(lm1b(archive), archive.parent / "data", logged.append)
    assert note in logged
    agreed = "the test split, all that was compared, agrees with the published figures: "
    assert logged[-1] == f"{agreed}test sentences 25, test words with </S> {TEST_WORDS}"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([TRAINING], "lacks training-monolingual"),
        (NAMES[:4], "holds no shard news.en-00001-of-00100"),
        (NAMES[5:6], "lacks news.en.heldout-00000-of-00050"),
        (NAMES[6:8], "holds the test shard only; validation needs another"),
    ],
)
def test_what_is_missing_is_named(archive, gone, message):
    for name in gone:
        (archive / name).rename(archive.parent / name.replace("/", "-"))
    with pytest.raises(UserError, match=message):
        lm1b(archive).inputs()


def test_a_missing_folder_and_a_repeated_shard_are_refused(archive):
    with pytest.raises(UserError, match="is no folder; name the one that the archive unpacks to"):
        lm1b(archive / "nothing").inputs()
    (archive / f"{NAMES[1]}.gz").write_bytes(b"")
    with pytest.raises(UserError, match="are the same shard"):
        lm1b(archive).inputs()


def test_a_shard_that_is_a_link_to_nothing_is_named_itself(archive):
    (archive / NAMES[1]).unlink()
    (archive / NAMES[1]).symlink_to(archive / "nothing")
    with pytest.raises(UserError, match=r"news\.en-00002-of-00100 is a link to .*nothing, which does not exist; mend"):
        lm1b(archive).inputs()


@pytest.mark.parametrize("method", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_read_is_named(archive, tables, monkeypatch, method):
    root = tables("parquet")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    for corpus, name in ((lm1b(archive), "archive"), (lm1b(path=root), "tables")):
        with pytest.raises(UserError, match=rf"{name}\S* cannot be read: Permission denied"):
            corpus.inputs()


@pytest.mark.parametrize("name", [NAMES[1], NAMES[5]])
def test_an_empty_shard_is_refused(archive, name):
    (archive / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name} is empty: a shard holds sentences"):
        lm1b(archive).inputs()


def test_what_held_out_shards_were_cut_from_may_be_empty(archive):
    (archive / NAMES[4]).write_bytes(b"")
    assert len(lm1b(archive).inputs()["train"]) == 4


@pytest.mark.parametrize("key", ["path", "revision", "subset"])
def test_what_does_not_apply_to_the_archive_is_refused(archive, key):
    with pytest.raises(ValueError, match=rf"corpus\.{key}=other does not apply to corpus\.folder"):
        lm1b(archive, **{key: "other"})


def test_nothing_published_is_left_out_by_default():
    """The longest sentence must stay: 300 words and more occur in the benchmark."""
    from moe_lm.cli.config import composed, resolved

    assert resolved(composed("prepare", ["corpus=lm1b"]))["corpus"]["max_words"] == 100_000
    with pytest.raises(ValueError, match=r"corpus\.max_words=0"):
        lm1b(max_words=0)


def test_the_whole_is_compared_with_what_is_published(archive, reference_counts, monkeypatch):
    monkeypatch.setattr(moe_lm.data.corpus.lm1b, "VOCABULARY", {3: 48})
    logged = []
    prepared = make(lm1b(archive), archive.parent / "data", logged.append)
    assert prepared.vocabulary.size == 47  # 45 words but <UNK>, and three markers
    count = reference_counts["train.words"]
    assert prepared.reference_counts["train.words"] == {"expected": count, "found": count}
    assert any("<UNK>: 47, published 48 (-1)" in line for line in logged)
    assert any("may come from counting the markers" in line for line in logged)
    assert not any("NOT the published text" in line for line in logged)
    monkeypatch.setattr(moe_lm.data.corpus.lm1b, "VOCABULARY", {3: 47})
    logged.clear()
    make(lm1b(archive), archive.parent / "again", logged.append)
    assert logged[-1].startswith("agrees with the published figures: train sentences 240, ")
    assert logged[-1].endswith("vocabulary with <S>, </S> and <UNK> 47")


def test_a_vocabulary_by_another_rule_has_no_published_size(archive):
    assert "vocabulary" in lm1b(archive).reference_counts(3)
    assert "vocabulary" not in lm1b(archive).reference_counts(2)
    assert "vocabulary" not in lm1b(archive).reference_counts(None)
