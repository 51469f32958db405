"""Fixtures: the benchmark in small, as the archive unpacks and as tables."""

import pytest
from benchmark_forms import NAMES, SHARDS, TEST_WORDS, TRAIN

import moe_lm.data.corpus.lm1b


@pytest.fixture
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
