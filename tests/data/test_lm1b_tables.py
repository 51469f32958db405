"""The benchmark as tables, here or on the hub: the same sentences give the same arrays as the archive."""

from types import SimpleNamespace

import pytest
from benchmark_forms import NAMES, TEST_WORDS, TRAIN, arrays, lm1b, make
from training_text import sentences

from moe_lm.errors import UserError

HUB = "billion-word-benchmark/lm1b"
pytestmark = pytest.mark.usefixtures("reference_counts")


def test_what_does_not_apply_to_tables_here_is_refused(tables):
    root = tables("parquet")
    with pytest.raises(UserError, match=r"corpus\.revision=other does not apply to .*tables, a folder here"):
        lm1b(path=root, revision="other").inputs()
    with pytest.raises(UserError, match=r"tables holds no folder other; give another corpus\.subset"):
        lm1b(path=root, subset="other").inputs()
    assert lm1b(path=root.parent, subset="tables").inputs() == lm1b(path=root).inputs()


KINDS = [("parquet", True), ("arrow", True), ("arrow-file", True), ("txt", True), ("parquet", False)]


@pytest.mark.parametrize(("kind", "streaming"), KINDS)
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
