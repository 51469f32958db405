"""Checkpoints: tensors only, complete or absent, every damage found, written asynchronously."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shards import assert_safetensors_or_json, whole
from tiny_training import TRAINING, with_overrides

from moe_lm.checkpoint import checkpoint, saver, sharded_safetensors
from moe_lm.checkpoint.saver import Saver
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.errors import UserError
from moe_lm.ops.sparse_rows import take_rows
from moe_lm.optim import CompositeOptimizer
from moe_lm.parallel.context import SINGLE_PROCESS

CHECKPOINTS = Path("runs/tiny/checkpoints")
LAST = CHECKPOINTS / "0000000012"
MODEL = "model/shard-00001-model-00001-of-00001.safetensors"
OPTIMIZER = "optimizer/shard-00001-model-00001-of-00001.safetensors"
EVALUATE = ("evaluate", "run=runs/tiny")
MORE = ("train", *with_overrides(list(TRAINING), "training.num_words=3000"))
NUM_WORDS = 31
DENSE = "optimizer.vocabulary=dense"
FACTORED = "optimizer.experts=factored"
LOSS_FREE = ("gate@model.layers.middle.gate=loss_free", "balance=[]")
HIERARCHY = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=6", "model.num_groups=3", "model.k=2"]


def configuration(*overrides: str) -> dict:
    return resolved(composed("train", with_overrides(TRAINING, *overrides)))


@pytest.fixture(scope="module")
def plain() -> dict:
    """The configuration of the tiny training: lazy rows, experts under Adam."""
    return configuration()


def built(config: dict, seed: int = 1, steps: int = 2) -> tuple[torch.nn.Module, CompositeOptimizer]:
    """A model whose parameters, buffers and moments are all random numbers."""
    torch.manual_seed(seed)
    model = make.build_model(config, NUM_WORDS)
    optimizer = make.build(config["optimizer"]).build(model)
    for parameter in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(parameter.data)
    for _ in range(steps):
        for parameter in model.parameters():
            if hasattr(parameter, "row_grads"):
                taken = take_rows(parameter, torch.randint(NUM_WORDS, (7,)))
                (taken * torch.randn_like(taken)).sum().backward()
            else:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments(model, optimizer) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{kind}/{names[p]}": x for p, state in optimizer.state.items() for kind, x in state.items()}


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def saver_in(folder: Path, logged: list | None = None, *, keep_last: int = 9, asynchronous: bool = False) -> Saver:
    logged = [] if logged is None else logged
    return Saver(folder, keep_last=keep_last, asynchronous=asynchronous, log=logged.append)


def save(folder: Path, step: int, model, optimizer, state: dict | None = None, keep=frozenset()) -> Path:
    """Write a checkpoint; it must be there."""
    saves = saver_in(folder)
    saves.save(step, model, optimizer, state or {}, set(keep))
    assert saves.finish() is None
    path = checkpoint.path_of(folder, step)
    checkpoint.verify(path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is in the files


def test_every_file_is_safetensors_or_json(trained):
    """The last three checkpoints and the best are kept, with tensors in safetensors and the state in JSON."""
    steps = checkpoint.steps(CHECKPOINTS)
    assert steps[-3:] == [10, 11, 12]
    for step in steps:
        path = checkpoint.path_of(CHECKPOINTS, step)
        assert set(content(path)) == {MODEL, OPTIMIZER, "state.json"}
        assert json.loads((path / "state.json").read_text())["format"] == checkpoint.FORMAT
    assert assert_safetensors_or_json(CHECKPOINTS) == 2 * len(steps)
    assert sorted(p.name for p in CHECKPOINTS.iterdir()) == [f"{step:010d}" for step in steps]


def test_no_file_of_a_run_is_a_pickle_or_an_archive(trained):
    for path in Path("runs/tiny").rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start != b"PK", path
            assert not re.match(rb"\x80[\x02-\x05]", start), path


def test_the_manifest_names_every_file_with_size_and_checksum(trained):
    files = checkpoint.load_state(LAST)["files"]
    assert list(files) == [MODEL, OPTIMIZER]
    for name, (size, digest) in files.items():
        data = (LAST / name).read_bytes()
        assert (size, digest) == (len(data), blake2b(data, digest_size=16).hexdigest())


KINDS = {
    "lazy": (),
    "dense": (DENSE, "softmax=full"),
    "factored": (FACTORED,),
    "hierarchical_factored": (*HIERARCHY, FACTORED, DENSE),
    "with_buffers": LOSS_FREE,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file_bytes", [2**30, 700], ids=["one_file", "many_files"])
def test_model_and_optimizer_are_restored_bit_for_bit(tmp_path, monkeypatch, kind, file_bytes):
    """Read by moe-lm, and by joining the files by their headers."""
    monkeypatch.setattr(sharded_safetensors, "FILE_BYTES", file_bytes)
    overrides = list(KINDS[kind])
    config = (
        configuration(*overrides)
        if kind != "dense"
        else resolved(
            composed("train", [a for a in with_overrides(TRAINING, *overrides) if not a.startswith("softmax.")])
        )
    )
    model, optimizer = built(config)
    path = save(tmp_path, 7, model, optimizer, {"progress": {"seconds": 0.1 + 0.2}})
    assert (assert_safetensors_or_json(path) > 2) == (file_bytes == 700)
    assert_same_bits(whole(path / "model"), dict(model.state_dict()))
    assert_same_bits(whole(path / "optimizer"), moments(model, optimizer))
    kinds = {key.partition("/")[0] for key in whole(path / "optimizer")}
    assert ("row_mean" in kinds) == ("factored" in kind)
    assert ("last_step" in kinds) == (DENSE not in overrides)

    other, its_optimizer = built(config, seed=2, steps=3)
    checkpoint.load_model(path, other, {})
    its_optimizer.load(checkpoint.load_optimizer_state(path, other, {}))
    assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))
    assert_same_bits(moments(other, its_optimizer), moments(model, optimizer))
    assert checkpoint.load_state(path)["progress"] == {"seconds": 0.1 + 0.2}


def test_an_optimizer_before_its_first_step_is_restored(tmp_path, plain):
    model, optimizer = built(plain, steps=0)
    path = save(tmp_path, 0, model, optimizer)
    other, its_optimizer = built(plain, seed=2, steps=0)
    checkpoint.load_model(path, other, {})
    its_optimizer.load(checkpoint.load_optimizer_state(path, other, {}))
    assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))
    assert moments(other, its_optimizer) == {}


def test_a_model_of_another_shape_is_refused(tmp_path, plain):
    path = save(tmp_path, 1, *built(plain))
    larger = make.build_model(plain, NUM_WORDS + 1)
    with pytest.raises(UserError, match=rf"does not fit the model: embedding\.weight_VD is \({NUM_WORDS}, 8\), wanted"):
        checkpoint.load_model(path, larger, {})


# Damage


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit_flipped(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def swapped(path: Path) -> None:
    """Replace the file by that of another checkpoint, which is intact and of the same size."""
    other = path.parents[2] / "0000000010" / path.relative_to(path.parents[1])
    mine, theirs = path.read_bytes(), other.read_bytes()
    assert mine != theirs
    path.write_bytes(theirs)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(OrderedDict(weight=[1.0])))


def an_archive_of_torch(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)


def put_beside(name: str):
    def put(path: Path) -> None:
        file = path.parent / name
        assert not file.exists()
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps([1.0]))

    return put


def link_beside(path: Path) -> None:
    (path.parent / "more").symlink_to(Path.cwd())


def replaced(old: bytes, new: bytes):
    def replace(path: Path) -> None:
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))

    return replace


def written(data: bytes):
    return lambda path: path.write_bytes(data)


def whole_folder_swapped(path: Path) -> None:
    """The checkpoint of another step under this one's name."""
    folder = path.parent
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "0000000010", folder)


NO_MATCH = "does not match its checksum"
DAMAGE = {
    "model_truncated": (MODEL, truncated, NO_MATCH),
    "model_bit": (MODEL, one_bit_flipped, NO_MATCH),
    "model_emptied": (MODEL, emptied, NO_MATCH),
    "model_missing": (MODEL, missing, f"{MODEL} is missing"),
    "model_swapped": (MODEL, swapped, NO_MATCH),
    "model_pickle": (MODEL, a_pickle, NO_MATCH),
    "model_archive": (MODEL, an_archive_of_torch, NO_MATCH),
    "extra": (MODEL, put_beside("more.safetensors"), "model/more.safetensors does not belong there"),
    "extra_hidden": (MODEL, put_beside(".metadata"), "model/.metadata does not belong there"),
    "extra_outside": ("state.json", put_beside("__0_0.distcp"), "__0_0.distcp does not belong there"),
    "extra_folder": ("state.json", put_beside("more/weights.pt"), "more"),
    "extra_link": ("state.json", link_beside, "more does not belong there"),
    "state_truncated": ("state.json", truncated, "is damaged"),
    "state_bit": ("state.json", replaced(b'"step": 12,\n  "num', b'"step": 13,\n  "num'), f"state.json {NO_MATCH}"),
    "state_checksum": ("state.json", replaced(b'"checksum": "', b'"checksum": "0'), f"state.json {NO_MATCH}"),
    "state_no_object": ("state.json", written(b"[]"), "is damaged"),
    "state_empty_object": ("state.json", written(b"{}"), "is damaged"),
    "state_no_utf8": ("state.json", written(b"\xff{}"), "is damaged"),
    "state_missing": ("state.json", missing, "state.json"),
    "format_bit": ("state.json", replaced(b'"format": 3', b'"format": 7'), f"state.json {NO_MATCH}"),
    "folder_swapped": ("state.json", whole_folder_swapped, "is that of step 10"),
}
OPTIMIZER_DAMAGE = {
    "optimizer_truncated": (OPTIMIZER, truncated, NO_MATCH),
    "optimizer_bit": (OPTIMIZER, one_bit_flipped, NO_MATCH),
    "optimizer_missing": (OPTIMIZER, missing, f"{OPTIMIZER} is missing"),
    "optimizer_swapped": (OPTIMIZER, swapped, NO_MATCH),
    "optimizer_pickle": (OPTIMIZER, a_pickle, NO_MATCH),
}
BOTH = DAMAGE | OPTIMIZER_DAMAGE


def damage(name: str, path: Path = LAST) -> str:
    """Damage a checkpoint; return a text that the warning must contain."""
    file, change, expected = BOTH[name]
    before = content(path)
    change(path / file)
    assert content(path) != before or (path / "more").exists()
    return expected


@pytest.mark.parametrize("name", [*DAMAGE, "optimizer_missing"])
def test_damage_is_named_by_evaluate_and_nothing_is_touched(own_trained, moe_lm, name):
    expected = damage(name)
    left = content(CHECKPOINTS)
    outcome = moe_lm(*EVALUATE)
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith(f"moe-lm: checkpoint {LAST} is damaged (")
    assert expected in line
    assert outcome.out == ""
    assert content(CHECKPOINTS) == left


@pytest.mark.parametrize("name", BOTH)
def test_damage_leads_to_the_checkpoint_before_it(own_trained, name):
    """The damaged checkpoint is renamed, not deleted, with one warning, and the one before it is loaded."""
    expected, logged = damage(name), []
    left = content(LAST)
    assert checkpoint.newest(CHECKPOINTS, SINGLE_PROCESS, logged.append) == checkpoint.path_of(CHECKPOINTS, 11)
    [line] = logged
    assert line.startswith(f"WARNING: checkpoint {LAST} is damaged (")
    assert line.endswith("; it is now damaged-0000000012, and the one before it is taken")
    assert expected in line
    assert "\n" not in line
    assert content(CHECKPOINTS / "damaged-0000000012") == left
    assert checkpoint.steps(CHECKPOINTS)[-1] == 11


def test_a_run_with_a_damaged_checkpoint_ends_like_an_intact_run(own_trained, moe_lm, tmp_path):
    shutil.copytree("runs/tiny", "runs/sound")
    sound = ("train", *with_overrides(list(TRAINING), "training.num_words=3000", "name=sound"))
    assert moe_lm(*sound).code == 0
    damage("model_bit")
    damage("optimizer_missing", CHECKPOINTS / "0000000011")
    outcome = moe_lm(*MORE)
    assert outcome.code == 0
    warnings = [line for line in outcome.err.splitlines() if line.startswith("WARNING")]
    assert [re.findall(r"damaged-\d+", line) for line in warnings] == [["damaged-0000000012"], ["damaged-0000000011"]]
    assert "runs/tiny: resumed at step 10, " in outcome.err
    ends = []
    for name in ("tiny", "sound"):
        steps = checkpoint.steps(Path("runs", name, "checkpoints"))
        last = checkpoint.path_of(Path("runs", name, "checkpoints"), steps[-1])
        ends.append((steps[-1], whole(last / "model"), whole(last / "optimizer")))
    assert ends[0][0] == ends[1][0] > 12
    for ours, theirs in zip(ends[0][1:], ends[1][1:], strict=True):
        assert_same_bits(ours, theirs)
    assert (CHECKPOINTS / "damaged-0000000012").is_dir()
    assert moe_lm(*EVALUATE).code == 0


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(own_trained):
    for number in (1, 2, 3):
        damage("model_bit")
        checkpoint.newest(CHECKPOINTS, SINGLE_PROCESS, lambda line: None)
        shutil.copytree(checkpoint.path_of(CHECKPOINTS, 11), LAST)
        (LAST / "number").write_text(str(number))
        damage_names = sorted(path.name for path in CHECKPOINTS.glob("damaged-*"))
        assert len(damage_names) == number
    assert damage_names == ["damaged-0000000012", "damaged-0000000012-2", "damaged-0000000012-3"]


def test_without_an_intact_checkpoint_training_is_refused_every_time(own_trained, moe_lm):
    """Training never restarts silently: the metrics and the damaged checkpoints stay."""
    steps = checkpoint.steps(CHECKPOINTS)
    for step in steps:
        damage("model_truncated", checkpoint.path_of(CHECKPOINTS, step))
    metrics = Path("runs/tiny/metrics.jsonl").read_bytes()
    for warnings in (len(steps), 0):
        outcome = moe_lm(*MORE)
        assert outcome.code == 2
        lines = outcome.err.splitlines()
        assert sum(line.startswith("WARNING") for line in lines) == warnings
        assert lines[-1].startswith(f"moe-lm: no checkpoint in {CHECKPOINTS} is intact")
        assert "delete runs/tiny or choose another name=..." in lines[-1]
        assert sum(line.startswith("moe-lm:") for line in lines) == 1
        assert sorted(p.name for p in CHECKPOINTS.iterdir()) == [f"damaged-{step:010d}" for step in steps]
        assert Path("runs/tiny/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("command", [EVALUATE, MORE])
def test_another_format_is_refused_and_left_alone(own_trained, moe_lm, command):
    (LAST / "state.json").write_text(json.dumps({"format": 2, "checksum": "00", "state": {}}))
    left = content(CHECKPOINTS)
    outcome = moe_lm(*command)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"moe-lm: {LAST} has format 2, this version of moe-lm reads 3: train the model again"
    )
    assert content(CHECKPOINTS) == left


def forged(path: Path, **more: bytes) -> None:
    """Forge a checkpoint: other files under a manifest that fits them."""
    for name, data in more.items():
        (path / name).write_bytes(data)
    state = checkpoint.load_state(path)
    names = [file for file in path.rglob("*") if file.is_file() and file.name != "state.json"]
    sums = {str(f.relative_to(path)): [f.stat().st_size, checkpoint.checksum(f)] for f in names}
    (path / "state.json").write_text(checkpoint.state_text(state | {"files": sums}))


class Canary:
    """Opened as a pickle, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize(
    "name",
    [MODEL, OPTIMIZER, "model/more.safetensors", "optimizer/.metadata", "model/x.pt", "x.pkl", "x.safetensors"],
)
@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_pickle_with_a_manifest_that_fits_is_refused_and_never_opened(own_trained, moe_lm, name, kind):
    if kind == "pickle":
        (LAST / name).write_bytes(pickle.dumps(Canary()))
    else:
        with (LAST / name).open("wb") as stream:
            torch.save(Canary(), stream)
    forged(LAST)
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(Path(name).name)):
        checkpoint.verify(LAST)
    if name != OPTIMIZER:
        outcome = moe_lm(*EVALUATE)
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
    outcome = moe_lm(*MORE)
    assert "WARNING" in outcome.err
    assert "resumed at step 11" in outcome.err
    assert not Path("canary").exists()


def test_loading_verifies_the_checksums(own_trained, plain):
    """`load_model` and `load_optimizer_state` verify their own part."""
    path = save(Path("own"), 3, *built(plain))
    model, optimizer = built(plain, seed=2)
    one_bit_flipped(path / MODEL)
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_model(path, model, {})
    optimizer.load(checkpoint.load_optimizer_state(path, model, {}))
    one_bit_flipped(path / OPTIMIZER)
    with pytest.raises(checkpoint.CheckpointError):
        optimizer.load(checkpoint.load_optimizer_state(path, model, {}))


# What is kept


def test_half_written_folders_are_ignored_and_removed(tmp_path, plain):
    leftover = tmp_path / ".0000000009.partial"
    leftover.mkdir()
    (leftover / "state.json").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "damaged-0000000001").mkdir()
    assert checkpoint.steps(tmp_path) == []
    save(tmp_path, 3, *built(plain))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000003", "damaged-0000000001", "notes"]


def test_a_half_written_folder_of_the_same_step_is_replaced(tmp_path, plain):
    leftover = tmp_path / ".0000000003.partial" / "model"
    leftover.mkdir(parents=True)
    (leftover / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"of a process that is no more")
    save(tmp_path, 3, *built(plain))


def test_pruning_keeps_the_last_and_the_best(tmp_path, plain):
    model, optimizer = built(plain)
    saves = saver_in(tmp_path, keep_last=2)
    for step in range(1, 8):
        saves.save(step, model, optimizer, {}, {3})
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    saves.save(8, model, optimizer, {}, {8})
    assert checkpoint.steps(tmp_path) == [7, 8]
    for step in (7, 8):
        checkpoint.verify(checkpoint.path_of(tmp_path, step))


def test_pruning_comes_after_the_new_checkpoint(tmp_path, plain, monkeypatch):
    model, optimizer = built(plain)
    save(tmp_path, 1, model, optimizer)
    prune, found = checkpoint.prune, []

    def watched(folder, keep_last, keep):
        checkpoint.verify(checkpoint.path_of(folder, 2))
        found.append(checkpoint.steps(folder))
        prune(folder, keep_last, keep)

    monkeypatch.setattr(checkpoint, "prune", watched)
    saver_in(tmp_path, keep_last=1).save(2, model, optimizer, {}, set())
    assert found == [[1, 2]]
    assert checkpoint.steps(tmp_path) == [2]


def test_a_crash_while_pruning_leaves_no_half_checkpoint(tmp_path, plain, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, *built(plain))

    def crash(path):
        (Path(path) / MODEL).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 1, set())
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.prune(tmp_path, 1, set())
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002"]


# How it is written


def test_a_checkpoint_counts_only_after_every_file_is_synced(tmp_path, plain, monkeypatch):
    """Each file and folder is synced under the temporary name, then the folder that has the new name."""
    path, synced, sync = checkpoint.path_of(tmp_path, 4), [], checkpoint.sync

    def watched(file):
        synced.append((Path(file), path.exists()))
        sync(file)

    monkeypatch.setattr(checkpoint, "sync", watched)
    save(tmp_path, 4, *built(plain))
    partial = checkpoint.partial_path(path)
    inside = {partial, *(partial / file.relative_to(path) for file in path.rglob("*"))}
    assert {file for file, there in synced if not there} == inside
    assert [file for file, there in synced if there] == [tmp_path]


def test_a_failed_sync_leaves_no_checkpoint(tmp_path, plain, monkeypatch):
    model, optimizer = built(plain)
    save(tmp_path, 1, model, optimizer)
    before, logged = content(tmp_path), []

    def broken(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "sync", broken)
    saves = saver_in(tmp_path, logged)
    saves.save(2, model, optimizer, {}, set())
    assert content(tmp_path) == before
    assert "Input/output error" in saves.finish()
    assert logged[0].startswith(f"WARNING: cannot write checkpoint {checkpoint.path_of(tmp_path, 2)}: ")


@contextlib.contextmanager
def held_back(monkeypatch):
    """Let no tensor be written until the event is set."""
    gate, write = threading.Event(), sharded_safetensors.write

    def waiting(*arguments):
        assert gate.wait(60)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sharded_safetensors, "write", waiting)
        try:
            yield gate
        finally:
            gate.set()


def change_all(model, optimizer) -> None:
    """Change every tensor in place, as the next update does."""
    with torch.no_grad():
        for tensor in [*model.state_dict().values(), *moments(model, optimizer).values()]:
            tensor.add_(1)


@pytest.mark.parametrize("overrides", [(), (FACTORED, DENSE, *LOSS_FREE)], ids=["lazy", "factored"])
def test_changes_after_save_do_not_reach_the_file(tmp_path, monkeypatch, overrides):
    model, optimizer = built(configuration(*overrides))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    its = {name: x.clone() for name, x in moments(model, optimizer).items()}
    saves, state = saver_in(tmp_path, asynchronous=True), {"progress": {"step": 5}}
    with held_back(monkeypatch) as gate:
        saves.save(5, model, optimizer, state, set())
        change_all(model, optimizer)
        assert checkpoint.steps(tmp_path) == []
        gate.set()
        assert saves.finish() is None
    path = checkpoint.path_of(tmp_path, 5)
    assert_same_bits(whole(path / "model"), before)
    assert_same_bits(whole(path / "optimizer"), its)
    assert not torch.equal(model.embedding.weight_VD, before["embedding.weight_VD"])


def test_a_later_save_waits_for_the_one_before(tmp_path, plain, monkeypatch):
    model, optimizer = built(plain)
    saves = saver_in(tmp_path, asynchronous=True)
    with held_back(monkeypatch) as gate:
        saves.save(5, model, optimizer, {}, set())
        second = threading.Thread(target=lambda: saves.save(6, model, optimizer, {}, set(), wait=True))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()
        assert [path.name for path in tmp_path.iterdir()] == [".0000000005.partial"]
        gate.set()
        second.join(60)
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert saves.finish() is None


@pytest.mark.parametrize(("asynchronous", "wait"), [(False, False), (True, True)])
def test_a_synchronous_save_is_complete_when_it_returns(tmp_path, plain, monkeypatch, asynchronous, wait):
    write, copied = sharded_safetensors.write, []

    def slow(*arguments):
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(sharded_safetensors, "write", slow)
    monkeypatch.setattr(sharded_safetensors, "copy_to_cpu", copied.append)
    saves = saver_in(tmp_path, asynchronous=asynchronous)
    saves.save(5, *built(plain), {}, set(), wait=wait)
    checkpoint.verify(checkpoint.path_of(tmp_path, 5))
    assert copied == []


def test_the_same_step_is_not_written_twice(tmp_path, plain):
    path = save(tmp_path, 5, *built(plain))
    before = content(path)
    save(tmp_path, 5, *built(plain, seed=2))
    assert content(path) == before


@pytest.mark.parametrize(("free", "fits"), [(None, True), (2**40, True), (1000, False)])
def test_without_memory_for_a_copy_the_save_is_synchronous(tmp_path, plain, monkeypatch, free, fits):
    monkeypatch.setattr(saver, "free_memory", lambda: free)
    copied, copies = sharded_safetensors.copy_to_cpu, []
    monkeypatch.setattr(sharded_safetensors, "copy_to_cpu", lambda tensors: copies.append(1) or copied(tensors))
    model, optimizer = built(plain)
    logged = []
    saves = saver_in(tmp_path, logged, asynchronous=True)
    for step in (5, 6):
        saves.save(step, model, optimizer, {}, set())
        if not fits:
            checkpoint.verify(checkpoint.path_of(tmp_path, step))
    assert saves.finish() is None
    assert len(copies) == (4 if fits else 0)
    assert logged == (
        [] if fits else ["memory has no room for a copy of the model: training waits while a checkpoint is written"]
    )


def test_the_copies_of_all_processes_of_a_machine_must_fit(tmp_path, plain, monkeypatch):
    """Four processes that see the same free memory do not each take all of it."""
    model, optimizer = built(plain)
    parts = {
        "model": checkpoint.model_tensors(model, {}),
        "optimizer": checkpoint.optimizer_tensors(model, optimizer.state, {}),
    }
    one = 2 * sum(map(sharded_safetensors.local_bytes, parts.values()))  # the copy, and a file of it
    monkeypatch.setattr(saver, "free_memory", lambda: 2 * one)
    saves = saver_in(tmp_path, asynchronous=True)
    assert saves._fits_in_memory(parts)
    any_ = SimpleNamespace(any=lambda *flags: list(flags), is_first=True)
    saves._parallel = SimpleNamespace(each=lambda mine: [mine] * 4, **vars(any_))
    assert not saves._fits_in_memory(parts)
    elsewhere = ("another machine", 2**40)
    saves._parallel = SimpleNamespace(each=lambda mine: [mine, elsewhere], **vars(any_))
    assert saves._fits_in_memory(parts)


def test_a_background_failure_is_logged_at_the_next_save(tmp_path, plain, monkeypatch):
    model, optimizer = built(plain)
    logged = []
    saves = saver_in(tmp_path, logged, asynchronous=True)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharded_safetensors, "write", full)
        saves.save(5, model, optimizer, {}, set())
        saves._thread.join()
    assert logged == []
    saves.save(6, model, optimizer, {}, set())
    place = checkpoint.path_of(tmp_path, 5)
    line = f"cannot write checkpoint {place}: No space left on device"
    assert logged == [f"WARNING: {line}; earlier checkpoints are untouched"]
    assert saves.finish() is None
    assert len(logged) == 1
    assert checkpoint.steps(tmp_path) == [6]


@pytest.mark.parametrize("error", [MemoryError(), ValueError("unexpected")], ids=repr)
@pytest.mark.parametrize("where", ["checksum", "state_text"])
def test_any_error_in_the_background_is_reported(tmp_path, plain, monkeypatch, error, where):
    """A dead thread must not look like one that has finished."""

    def fail(*arguments):
        raise error

    logged = []
    saves = saver_in(tmp_path, logged, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, fail)
        saves.save(5, *built(plain), {}, set())
        assert (str(error) or type(error).__name__) in saves.finish()
    assert len(logged) == 1


def test_failing_to_delete_an_old_checkpoint_is_only_logged(tmp_path, plain, monkeypatch):
    def fail(*arguments):
        raise OSError(16, "Device or resource busy")

    logged = []
    saves = saver_in(tmp_path, logged, asynchronous=True)
    monkeypatch.setattr(checkpoint, "prune", fail)
    saves.save(5, *built(plain), {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(tmp_path) == [5]
    assert len(logged) == 1
    assert "cannot delete old checkpoints" in logged[0]


# A disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts or resizes a file system of the given KiB on runs/tiny/checkpoints."""
    folder = tmp_path / CHECKPOINTS
    mounted = []

    def resize(kib: int, *more: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        options = ",".join([f"size={kib}k", *more, *(["remount"] if mounted else [])])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("no file system can be mounted here")
    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def files_no_larger_than(num_bytes: int):
    """Let the system refuse to write in the middle of a file, which needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_truncated_write_leaves_the_earlier_checkpoint(tmp_path, plain, asynchronous):
    model, optimizer = built(plain)
    save(tmp_path, 1, model, optimizer)
    before, logged = content(tmp_path), []
    saves = saver_in(tmp_path, logged, asynchronous=asynchronous)
    with files_no_larger_than(3000):
        saves.save(2, model, optimizer, {}, set())
        error = saves.finish()
    assert "File too large" in error
    assert error.startswith(f"cannot write checkpoint {checkpoint.path_of(tmp_path, 2)}: ")
    assert logged == [f"WARNING: {error}; earlier checkpoints are untouched"]
    assert content(tmp_path) == before
    saves.save(2, model, optimizer, {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("checked", [True, False], ids=["checked_first", "while_writing"])
def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk, plain, monkeypatch, checked):
    """Free space is checked first; if others take it meanwhile, the write fails."""
    model, optimizer = built(plain)
    folder = small_disk(4096)
    save(folder, 1, model, optimizer)
    used = shutil.disk_usage(folder).used // 1024
    small_disk(used + 12)
    before, logged = content(folder), []
    if not checked:
        monkeypatch.setattr(saver, "free_disk", lambda folder: 2**40)
    saves = saver_in(folder, logged)
    saves.save(2, model, optimizer, {}, set())
    error = saves.finish()
    assert ("it needs 1 MiB and the disk has 0" if checked else "No space left on device") in error
    assert "\n" not in error
    assert len(logged) == 1
    assert content(folder) == before
    assert [path.name for path in folder.iterdir()] == ["0000000001"]
    small_disk(4096)
    saves.save(2, model, optimizer, {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(folder) == [1, 2]


def test_training_goes_on_over_a_full_disk_and_ends_in_one_line(workspace, small_disk, moe_lm):
    folder = small_disk(1100)  # 1 MiB must be free: room for two checkpoints or so
    outcome = moe_lm("train", *TRAINING)
    assert outcome.code == 2
    *before, last = outcome.err.splitlines()
    warnings = [line for line in before if line.startswith("WARNING: cannot write checkpoint ")]
    assert len(warnings) > 3
    assert last.startswith("moe-lm: cannot write checkpoint ")
    assert last.endswith(": earlier checkpoints are untouched; make room and repeat the command")
    assert "Traceback" not in outcome.err
    steps = checkpoint.steps(folder)
    assert steps
    assert steps[-1] < 12
    for step in steps:
        checkpoint.verify(checkpoint.path_of(folder, step))
    trained_to = json.loads(Path("runs/tiny/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert trained_to == 12
    small_disk(8192)
    again = moe_lm("train", *TRAINING)
    assert again.code == 0
    assert f"resumed at step {steps[-1]}" in again.err


def test_training_over_a_disk_that_is_full_for_a_while_is_undisturbed(workspace, trained_once, moe_lm, monkeypatch):
    free, asked = saver.free_disk, []

    def full_for_a_while(folder):
        asked.append(folder)
        return 0 if 3 <= len(asked) <= 5 else free(folder)

    monkeypatch.setattr(saver, "free_disk", full_for_a_while)
    outcome = moe_lm("train", *TRAINING)
    assert outcome.code == 0
    assert sum("WARNING: cannot write checkpoint" in line for line in outcome.err.splitlines()) == 3
    for part in checkpoint.PARTS:
        assert_same_bits(whole(LAST / part), whole(trained_once / LAST / part))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path, plain, asynchronous):
    (tmp_path / "file").write_text("no folder")
    logged = []
    saves = saver_in(tmp_path / "file" / "checkpoints", logged, asynchronous=asynchronous)
    saves.save(1, *built(plain), {}, set())
    assert "Not a directory" in saves.finish()
    assert len(logged) == 1


def test_a_folder_that_may_only_be_read_is_a_failure(small_disk, plain):
    model, optimizer = built(plain)
    folder = small_disk(4096)
    save(folder, 1, model, optimizer)
    small_disk(4096, "ro")
    before, logged = content(folder), []
    saves = saver_in(folder, logged)
    saves.save(2, model, optimizer, {}, set())
    assert "Read-only file system" in saves.finish()
    assert len(logged) == 1
    assert content(folder) == before
