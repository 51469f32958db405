"""The benchmark's forms: synthetic shards in its folders, and the same sentences in tables, give the same arrays."""

import lzma
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_text import sentences

import moe_lm.data.corpus.lm1b
from moe_lm.data.corpus.lm1b import Lm1b
from moe_lm.data.prepare import prepare
from moe_lm.data.vocabulary.words import Words
from moe_lm.errors import UserError

TRAINING = "training-monolingual.tokenized.shuffled"
HELD_OUT = "heldout-monolingual.tokenized.shuffled"
HUB = "billion-word-benchmark/lm1b"


def lines_of(seed, count):
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(40)] + ["naïve", "“", "\u2028x", "$", "<UNK>"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]


SHARDS = {
    **{f"{TRAINING}/news.en-{number:05}-of-00100": lines_of(number, 60) for number in (1, 2, 10, 99)},
    f"{TRAINING}/news.en-00000-of-00100": ["what the held-out shards were cut from is no training text"],
    f"{HELD_OUT}/news.en.heldout-00000-of-00050": lines_of(1000, 25),
    f"{HELD_OUT}/news.en.heldout-00007-of-00050": lines_of(1007, 12),
    f"{HELD_OUT}/news.en.heldout-00010-of-00050": lines_of(1010, 13),
    f"{HELD_OUT}/README": ["no shard"],
}
NAMES = list(SHARDS)
TEST_WORDS = sum(len(line.split()) + 1 for line in SHARDS[NAMES[5]])
TRAIN = [line for name in NAMES[:4] for line in SHARDS[name]]


@pytest.fixture(autouse=True)
def reference_counts(monkeypatch):
    """The published counts are those of the synthetic shards."""
    counts = {"train.sentences": 240, "train.words": sum(len(line.split()) + 1 for line in TRAIN)}
    counts |= {"test.sentences": 25, "test.words": TEST_WORDS}
    monkeypatch.setattr(moe_lm.data.corpus.lm1b, "REFERENCE_COUNTS", counts)
    monkeypatch.setattr(moe_lm.data.corpus.lm1b, "NUM_SHARDS", {"train": 4, "held-out": 3})
    return counts


@pytest.fixture
def archive(tmp_path):
    for name, lines in SHARDS.items():
        path = tmp_path / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "archive"


def lm1b(folder=None, path=None, revision=None, subset=None, streaming=True, max_words=1000):
    return Lm1b(
        folder=folder and str(folder),
        path=path and str(path),
        revision=revision,
        subset=subset,
        streaming=streaming,
        max_words=max_words,
    )


def make(corpus, folder, log=lambda line: None):
    recipe = Words(file=None, min_count=3, max_size=None)
    return prepare(corpus=corpus, recipe=recipe, folder=folder, settings={}, log=log, progress=False)


def arrays(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "data.json"}


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


def test_what_does_not_apply_to_tables_here_is_refused(tables):
    root = tables("parquet")
    with pytest.raises(UserError, match=r"corpus\.revision=other does not apply to .*tables, a folder here"):
        lm1b(path=root, revision="other").inputs()
    with pytest.raises(UserError, match=r"tables holds no folder other; give another corpus\.subset"):
        lm1b(path=root, subset="other").inputs()
    assert lm1b(path=root.parent, subset="tables").inputs() == lm1b(path=root).inputs()


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


@pytest.fixture
def tables(archive, tmp_path, monkeypatch):
    """Write the archive's sentences as tables, one a training shard, all held-out shards in one or each in its own."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(path, kind, lines):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": lines})
        if kind == "txt":
            path.write_text("".join(f"{line}\n" for line in lines))
        elif kind == "parquet":
            pq.write_table(table, path, row_group_size=20)
        else:
            new = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
            with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=20)

    def make_tables(kind, root=tmp_path / "tables", held_out=tuple(NAMES[5:8])):
        suffix = kind.removesuffix("-file")
        for number, name in enumerate(NAMES[:4]):
            write(root / "train" / f"{number:04}.{suffix}", kind, SHARDS[name])
        for number, name in enumerate(held_out):
            write(root / "test" / f"{number:04}.{suffix}", kind, SHARDS[name])
        return root

    return make_tables


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [
        ("parquet", True),
        ("arrow", True),
        ("arrow-file", True),
        ("txt", True),
        ("parquet", False),
        ("arrow-file", False),
    ],
)
def test_tables_give_the_very_arrays_of_the_archive(archive, tables, tmp_path, kind, streaming):
    expected = make(lm1b(archive), tmp_path / "data-archive")
    root = tables(kind)
    prepared = make(lm1b(path=root, streaming=streaming), tmp_path / "data-tables")
    assert arrays(tmp_path / "data-tables") == arrays(tmp_path / "data-archive")
    assert prepared.fingerprint == expected.fingerprint
    assert prepared.splits["test"].num_sentences == 25
    assert prepared.splits["test"].num_words == TEST_WORDS


def test_the_folder_of_the_hub_may_lie_inside(tables, tmp_path):
    tables("parquet", tmp_path / "clone" / "plain_text")
    assert list(sentences(lm1b(path=tmp_path / "clone"), "train")) == TRAIN


def test_held_out_shards_in_another_order_are_refused(tables):
    root = tables("parquet", held_out=NAMES[7:4:-1])
    with pytest.raises(
        UserError, match=rf"the first 25 held-out sentences of .* hold \d+ words.*, not the {TEST_WORDS:,}"
    ):
        lm1b(path=root).parts("test")


def test_too_few_held_out_sentences_are_refused(tables):
    root = tables("parquet", held_out=NAMES[6:7])
    for split in ("test", "valid"):
        with pytest.raises(
            UserError, match=r"the first 12 held-out sentences of .* in 25 of the benchmark's test shard"
        ):
            lm1b(path=root).parts(split)


def test_no_held_out_sentence_after_the_test_shard_is_refused(tables):
    root = tables("parquet", held_out=NAMES[5:6])
    assert len(list(lm1b(path=root).parts("test")[0].sentences())) == 25
    with pytest.raises(
        UserError, match=r"ends with the 25 held-out sentences of .* test shard.* add the other held-out"
    ):
        lm1b(path=root).parts("valid")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "null"])
def test_every_kind_of_text_is_read(tables, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tables("parquet")
    lines = pa.array([None, None] if kind == "null" else ["a b", None])
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    lines = lines.cast(types[kind] if kind in types else getattr(pa, kind)())
    pq.write_table(pa.table({"text": lines}), root / "train" / "0000.parquet")
    assert list(lm1b(path=root).parts("train")[0].sentences()) == ["" if kind == "null" else "a b", ""]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([["a", "b"]], "list<.*string>"), ([b"a"], "binary"), ([{"a": 1}], "struct")],
)
def test_a_column_of_anything_but_text_is_refused(tables, values, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tables("parquet")
    pq.write_table(pa.table({"text": values}), root / "train" / "0000.parquet")
    with pytest.raises(UserError, match=rf"train/0000\.parquet: column 'text' holds {kind}.*, not text") as caught:
        list(lm1b(path=root).parts("train")[0].sentences())
    assert "\n" not in str(caught.value)


def test_bad_tables_are_named(tables, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tables("parquet")
    (root / "train" / "0002.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"holds \.parquet and \.txt files; keep those of one format"):
        lm1b(path=root).inputs()
    (root / "train" / "0002.txt").unlink()
    (root / "train" / "0003.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"0003\.parquet cannot be read: \w+: "):
        list(sentences(lm1b(path=root), "train"))
    pq.write_table(pa.table({"sentence": ["a"]}), root / "train" / "0003.parquet")
    with pytest.raises(UserError, match=r"0003\.parquet has no column 'text', only sentence"):
        list(sentences(lm1b(path=root), "train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/train holds no \.parquet, \.arrow, \.txt file"):
        lm1b(path=tmp_path / "empty").inputs()
    with pytest.raises(UserError, match=r"corpus\.path=no/such/folder: there is no such folder"):
        lm1b(path="no/such/folder").inputs()


@pytest.fixture
def hub(monkeypatch):
    """Put an answer, or an error, in the place of the hub; what was asked is kept."""
    import huggingface_hub

    asked = []

    def answer(content):
        def dataset_info(self, path, **options):
            asked.append((path, options["revision"]))
            if isinstance(content, Exception):
                raise content
            return content

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        return asked

    return answer


def error_of(name):
    """An error of the hub's own classes, which want a response to be made properly."""
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)


def test_the_hub_is_not_asked_before_text_is_wanted(hub):
    asked = hub(RuntimeError("asked"))
    assert lm1b().inputs() == {"path": HUB, "revision": "refs/convert/parquet", "subset": "plain_text"}
    assert lm1b().reference_counts(3)["vocabulary"] == 793_471
    assert lm1b().notes() == []
    assert not asked


def test_the_hub_gives_the_files_of_one_commit(hub):
    names = ["README.md", "plain_text/test/0000.parquet", *(f"plain_text/train/{n:04}.parquet" for n in (2, 0, 1))]
    names += ["plain_text/train/index.duckdb", "other/train/0000.parquet"]
    asked = hub(SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name, size=7) for name in names]))
    parts = lm1b(revision="some/branch").parts("train")
    assert [part.files for part in parts] == [
        (f"hf://datasets/{HUB}@abc/plain_text/train/{number:04}.parquet",) for number in range(3)
    ]
    assert {part.size for part in parts} == {7}
    assert set(asked) == {(HUB, "some/branch")}
    with pytest.raises(UserError, match=rf"{HUB} at refs/convert/parquet holds no Parquet file in full/train"):
        lm1b(subset="full").parts("train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", rf"the hub has no dataset {HUB}"),
        (
            "RevisionNotFoundError",
            rf"the dataset {HUB} has no revision refs/convert/parquet; give another corpus\.revision",
        ),
        (
            ConnectionError("Name or\n service not known"),
            r"cannot be asked for .*Name or service not known\); try again",
        ),
    ],
)
def test_the_hub_s_errors_are_one_line(hub, error, message):
    hub(error_of(error) if isinstance(error, str) else error)
    with pytest.raises(UserError, match=message) as caught:
        lm1b().parts("train")
    assert "\n" not in str(caught.value)
    assert "corpus.folder=" in str(caught.value)


def test_a_network_that_fails_while_rows_come_is_one_line(hub, monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise ConnectionError("cut off")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    names = ["plain_text/test/0000.parquet", "plain_text/train/0000.parquet"]
    hub(SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name, size=7) for name in names]))
    with pytest.raises(UserError, match=r"train/0000\.parquet cannot be read: ConnectionError: cut off"):
        list(lm1b().parts("train")[0].sentences())
