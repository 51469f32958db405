"""Checkpoints: tensors only, complete or absent, restored bit for bit; which are kept."""

import json
import re
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import saved
import torch
from shards import assert_safetensors_or_json, whole
from tiny_training import TRAINING

from moe_lm.checkpoint import checkpoint, saver, sharded_safetensors
from moe_lm.checkpoint.load import find_checkpoint
from moe_lm.cli import machine as make
from moe_lm.errors import UserError
from moe_lm.parallel.context import SINGLE_PROCESS
from moe_lm.parallel.group import Shard
from moe_lm.run import Run

HIERARCHY = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=6", "model.num_groups=3", "model.k=2"]
KINDS = {
    "lazy": (),
    "dense": (saved.DENSE, "softmax=full"),
    "hierarchical_factored": (*HIERARCHY, saved.FACTORED, saved.DENSE),
    "with_buffers": (saved.FACTORED, *saved.LOSS_FREE),
}


@pytest.fixture(scope="module")
def plain() -> dict:
    """The configuration of the tiny training: lazy rows, experts under Adam."""
    return saved.configuration()


def test_every_file_is_safetensors_or_json(trained):
    """The last three checkpoints and the best are kept, with tensors in safetensors and the state in JSON."""
    steps = checkpoint.steps(saved.CHECKPOINTS)
    assert steps[-3:] == [10, 11, 12]
    for step in steps:
        path = checkpoint.path_of(saved.CHECKPOINTS, step)
        assert set(saved.content(path)) == {saved.MODEL, saved.OPTIMIZER, "state.json"}
        assert json.loads((path / "state.json").read_text())["format"] == checkpoint.FORMAT
    assert assert_safetensors_or_json(saved.CHECKPOINTS) == 2 * len(steps)
    assert sorted(p.name for p in saved.CHECKPOINTS.iterdir()) == [f"{step:010d}" for step in steps]
    for path in Path("runs/tiny").rglob("*"):  # no pickle and no archive of one
        assert path.is_dir() or not re.match(rb"PK|\x80[\x02-\x05]", path.read_bytes()), path


def test_the_manifest_names_every_file_with_size_and_checksum(trained):
    files = checkpoint.load_state(saved.LAST)["files"]
    assert list(files) == [saved.MODEL, saved.OPTIMIZER]
    for name, (size, digest) in files.items():
        data = (saved.LAST / name).read_bytes()
        assert (size, digest) == (len(data), blake2b(data, digest_size=16).hexdigest())


@pytest.mark.parametrize(
    ("kind", "file_bytes"),
    [*((kind, 2**30) for kind in KINDS), ("lazy", 700), ("hierarchical_factored", 700)],
)
def test_model_and_optimizer_are_restored_bit_for_bit(tmp_path, monkeypatch, kind, file_bytes):
    """Read by moe-lm, and by joining the files by their headers; 700 bytes a file make several."""
    monkeypatch.setattr(sharded_safetensors, "FILE_BYTES", file_bytes)
    config = saved.configuration(*KINDS[kind])
    model, optimizer = saved.built(config)
    path = saved.save(tmp_path, 7, model, optimizer, {"progress": {"seconds": 0.1 + 0.2}})
    assert (assert_safetensors_or_json(path) > 2) == (file_bytes == 700)
    saved.assert_same_bits(whole(path / "model"), dict(model.state_dict()))
    saved.assert_same_bits(whole(path / "optimizer"), saved.moments(model, optimizer))
    kinds = {key.partition("/")[0] for key in whole(path / "optimizer")}
    assert ("row_mean" in kinds) == (saved.FACTORED in KINDS[kind])
    assert ("last_step" in kinds) == (saved.DENSE not in KINDS[kind])

    other, its_optimizer = saved.built(config, seed=2, steps=3)
    checkpoint.load_model(path, other, {})
    its_optimizer.load(checkpoint.load_optimizer_state(path, other, {}))
    saved.assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))
    saved.assert_same_bits(saved.moments(other, its_optimizer), saved.moments(model, optimizer))
    assert checkpoint.load_state(path)["progress"] == {"seconds": 0.1 + 0.2}


def test_an_optimizer_before_its_first_step_is_restored(tmp_path, plain):
    path = saved.save(tmp_path, 0, *saved.built(plain, steps=0))
    other, optimizer = saved.built(plain, seed=2, steps=0)
    optimizer.load(checkpoint.load_optimizer_state(path, other, {}))
    assert saved.moments(other, optimizer) == {}


def test_each_process_has_its_own_rows(tmp_path):
    """Rows 2 to 4 of a stored tensor are read by the second of three processes; only these are in its chunks."""
    stored = torch.arange(18.0).view(6, 3)
    sharded_safetensors.write(tmp_path / "part", {"x": stored}, SINGLE_PROCESS.writers.control)
    shard = Shard(SimpleNamespace(rank=1, size=3), (2, 3, 1))
    mine = sharded_safetensors.RowShard(torch.zeros(3, 3), shard)
    sharded_safetensors.read(tmp_path / "part", {"x": mine})
    assert torch.equal(mine.tensor, stored[2:5])
    [item] = mine.__create_write_items__("x", None)
    assert (item.tensor_data.chunk.offsets, item.tensor_data.size) == ((2, 0), (6, 3))


def test_a_model_of_another_shape_is_refused(tmp_path, plain):
    path = saved.save(tmp_path, 1, *saved.built(plain))
    larger = make.build_model(plain, saved.NUM_WORDS + 1)
    with pytest.raises(
        UserError, match=rf"does not fit the model: embedding\.weight_VD is \({saved.NUM_WORDS}, 8\), wanted"
    ):
        checkpoint.load_model(path, larger, {})


def test_half_written_folders_are_ignored_and_removed(tmp_path, plain):
    """Even one of the same step, with a file of a process that is no more."""
    for name in (".0000000009.partial/state.json", ".0000000003.partial/model/shard-00007-model-00001.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "damaged-0000000001").mkdir()
    assert checkpoint.steps(tmp_path) == []
    saved.save(tmp_path, 3, *saved.built(plain))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000003", "damaged-0000000001", "notes"]


def test_pruning_keeps_the_last_and_the_best(tmp_path, plain):
    model, optimizer = saved.built(plain)
    saves = saved.saver_in(tmp_path, keep_last=2)
    for step in range(1, 8):
        saves.save(step, model, optimizer, {}, {3})
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    saves.save(8, model, optimizer, {}, {8})
    assert checkpoint.steps(tmp_path) == [7, 8]
    for step in (7, 8):
        checkpoint.verify(checkpoint.path_of(tmp_path, step))


def test_the_best_is_the_step_that_the_last_state_names(tmp_path, plain):
    pair, run = saved.built(plain), Run(tmp_path)
    for step, best in ((1, None), (2, {"step": 1}), (3, {"step": 2})):
        saved.save(run.checkpoints, step, *pair, {"progress": {"best": best}})
    assert find_checkpoint(run, "best") == checkpoint.path_of(run.checkpoints, 2)
    assert find_checkpoint(run, "last") == checkpoint.path_of(run.checkpoints, 3)
    assert find_checkpoint(run, "1") == checkpoint.path_of(run.checkpoints, 1)


def test_pruning_comes_after_the_new_checkpoint(tmp_path, plain, monkeypatch):
    model, optimizer = saved.built(plain)
    saved.save(tmp_path, 1, model, optimizer)
    prune, found = checkpoint.prune, []

    def watched(folder, keep_last, keep):
        checkpoint.verify(checkpoint.path_of(folder, 2))
        found.append(checkpoint.steps(folder))
        prune(folder, keep_last, keep)

    monkeypatch.setattr(checkpoint, "prune", watched)
    saved.saver_in(tmp_path, keep_last=1).save(2, model, optimizer, {}, set())
    assert found == [[1, 2]]
    assert checkpoint.steps(tmp_path) == [2]


def test_a_crash_while_pruning_leaves_no_half_checkpoint(tmp_path, plain, monkeypatch):
    for step in (1, 2):
        saved.save(tmp_path, step, *saved.built(plain))

    def crash(path):
        (Path(path) / saved.MODEL).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 1, set())
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.prune(tmp_path, 1, set())
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002"]


def test_failing_to_delete_an_old_checkpoint_is_only_logged(tmp_path, plain, monkeypatch):
    logged = []
    saves = saved.saver_in(tmp_path, logged, asynchronous=True)
    monkeypatch.setattr(checkpoint, "prune", Mock(side_effect=OSError(16, "Device or resource busy")))
    saves.save(5, *saved.built(plain), {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(tmp_path) == [5]
    assert len(logged) == 1
    assert "cannot delete old checkpoints" in logged[0]


def test_a_checkpoint_counts_only_after_every_file_is_synced(tmp_path, plain, monkeypatch):
    """Each file and folder is synced under the temporary name, then the folder that has the new name."""
    path, synced, sync = checkpoint.path_of(tmp_path, 4), [], checkpoint.sync

    def watched(file):
        synced.append((Path(file), path.exists()))
        sync(file)

    monkeypatch.setattr(checkpoint, "sync", watched)
    saved.save(tmp_path, 4, *saved.built(plain))
    partial = checkpoint.partial_path(path)
    inside = {partial, *(partial / file.relative_to(path) for file in path.rglob("*"))}
    assert {file for file, there in synced if not there} == inside
    assert [file for file, there in synced if there] == [tmp_path]


def test_a_failed_sync_leaves_no_checkpoint(tmp_path, plain, monkeypatch):
    model, optimizer = saved.built(plain)
    saved.save(tmp_path, 1, model, optimizer)
    before, logged = saved.content(tmp_path), []

    monkeypatch.setattr(checkpoint, "sync", Mock(side_effect=OSError(5, "Input/output error")))
    saves = saved.saver_in(tmp_path, logged)
    saves.save(2, model, optimizer, {}, set())
    assert saved.content(tmp_path) == before
    assert "Input/output error" in saves.finish()
    assert logged[0].startswith(f"WARNING: cannot write checkpoint {checkpoint.path_of(tmp_path, 2)}: ")


def test_the_same_step_is_not_written_twice(tmp_path, plain):
    path = saved.save(tmp_path, 5, *saved.built(plain))
    before = saved.content(path)
    saved.save(tmp_path, 5, *saved.built(plain, seed=2))
    assert saved.content(path) == before


def test_training_goes_on_over_a_full_disk_and_ends_in_one_line(workspace, trained_once, moe_lm, monkeypatch):
    """With room again, the same command ends as an undisturbed run."""
    free, asked = saver.free_disk, []
    with monkeypatch.context() as patch:
        patch.setattr(
            saver, "free_disk", lambda folder: asked.append(folder) or (free(folder) if len(asked) < 5 else 0)
        )
        outcome = moe_lm("train", *TRAINING)
    *before, last = outcome.err.splitlines()
    assert sum(line.startswith("WARNING: cannot write checkpoint ") for line in before) > 3
    assert last.startswith("moe-lm: cannot write checkpoint ")
    assert last.endswith(": earlier checkpoints are untouched; make room and repeat the command")
    steps = checkpoint.steps(saved.CHECKPOINTS)
    assert steps == [2, 3, 4]
    for step in steps:
        checkpoint.verify(checkpoint.path_of(saved.CHECKPOINTS, step))
    assert json.loads(Path("runs/tiny/metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
    again = moe_lm("train", *TRAINING)
    assert (outcome.code, again.code) == (2, 0)
    assert "resumed at step 4" in again.err
    for part in checkpoint.PARTS:
        saved.assert_same_bits(whole(saved.LAST / part), whole(trained_once / saved.LAST / part))
