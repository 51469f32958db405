"""How a checkpoint is written: in the background, in one piece, and on a disk that is full."""

import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import saved
import torch
from shards import whole

from moe_lm.checkpoint import checkpoint, saver, sharded_safetensors
from moe_lm.errors import UserError


@pytest.fixture(scope="module")
def pair() -> tuple:
    """A model and its optimizer: lazy rows, experts under Adam. No test changes them."""
    return saved.built(saved.configuration())


@contextmanager
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


@pytest.mark.parametrize("overrides", [(), (saved.FACTORED, saved.DENSE, *saved.LOSS_FREE)], ids=["lazy", "factored"])
def test_changes_after_save_do_not_reach_the_file(tmp_path, monkeypatch, overrides):
    model, optimizer = saved.built(saved.configuration(*overrides))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    its = {name: x.clone() for name, x in saved.moments(model, optimizer).items()}
    saves, state = saved.saver_in(tmp_path, asynchronous=True), {"progress": {"step": 5}}
    with held_back(monkeypatch) as gate:
        saves.save(5, model, optimizer, state, set())
        with torch.no_grad():  # as the next update does
            for tensor in [*model.state_dict().values(), *saved.moments(model, optimizer).values()]:
                tensor.add_(1)
        assert checkpoint.steps(tmp_path) == []
        gate.set()
        assert saves.finish() is None
    path = checkpoint.path_of(tmp_path, 5)
    saved.assert_same_bits(whole(path / "model"), before)
    saved.assert_same_bits(whole(path / "optimizer"), its)
    assert not torch.equal(model.embedding.weight_VD, before["embedding.weight_VD"])


def test_a_later_save_waits_for_the_one_before(tmp_path, pair, monkeypatch):
    saves = saved.saver_in(tmp_path, asynchronous=True)
    with held_back(monkeypatch) as gate:
        saves.save(5, *pair, {}, set())
        second = threading.Thread(target=lambda: saves.save(6, *pair, {}, set(), wait=True))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()
        assert [path.name for path in tmp_path.iterdir()] == [".0000000005.partial"]
        gate.set()
        second.join(60)
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert saves.finish() is None


@pytest.mark.parametrize(("asynchronous", "wait"), [(False, False), (True, True)])
def test_a_synchronous_save_is_complete_when_it_returns(tmp_path, pair, monkeypatch, asynchronous, wait):
    write, copied = sharded_safetensors.write, []
    monkeypatch.setattr(sharded_safetensors, "write", lambda *arguments: time.sleep(0.1) or write(*arguments))
    monkeypatch.setattr(sharded_safetensors, "copy_to_cpu", copied.append)
    saves = saved.saver_in(tmp_path, asynchronous=asynchronous)
    saves.save(5, *pair, {}, set(), wait=wait)
    checkpoint.verify(checkpoint.path_of(tmp_path, 5))
    assert copied == []


@pytest.mark.parametrize(("free", "fits"), [(None, True), (2**40, True), (1000, False)])
def test_without_memory_for_a_copy_the_save_is_synchronous(tmp_path, pair, monkeypatch, free, fits):
    monkeypatch.setattr(saver, "free_memory", lambda: free)
    copied, copies = sharded_safetensors.copy_to_cpu, []
    monkeypatch.setattr(sharded_safetensors, "copy_to_cpu", lambda tensors: copies.append(1) or copied(tensors))
    logged = []
    saves = saved.saver_in(tmp_path, logged, asynchronous=True)
    for step in (5, 6):
        saves.save(step, *pair, {}, set())
        if not fits:
            checkpoint.verify(checkpoint.path_of(tmp_path, step))
    assert saves.finish() is None
    assert len(copies) == (4 if fits else 0)
    assert logged == (
        [] if fits else ["memory has no room for a copy of the model: training waits while a checkpoint is written"]
    )


def test_the_copies_of_all_processes_of_a_machine_must_fit(tmp_path, pair, monkeypatch):
    """Four processes that see the same free memory do not each take all of it."""
    model, optimizer = pair
    parts = {
        "model": checkpoint.model_tensors(model, {}),
        "optimizer": checkpoint.optimizer_tensors(model, optimizer.state, {}),
    }
    one = 2 * sum(map(sharded_safetensors.local_bytes, parts.values()))  # the copy, and a file of it
    monkeypatch.setattr(saver, "free_memory", lambda: 2 * one)
    saves = saved.saver_in(tmp_path, asynchronous=True)
    assert saves._fits_in_memory(parts)
    any_ = SimpleNamespace(any=lambda *flags: list(flags), is_first=True)
    saves._parallel = SimpleNamespace(each=lambda mine: [mine] * 4, **vars(any_))
    assert not saves._fits_in_memory(parts)
    elsewhere = ("another machine", 2**40)
    saves._parallel = SimpleNamespace(each=lambda mine: [mine, elsewhere], **vars(any_))
    assert saves._fits_in_memory(parts)


def test_a_background_failure_is_logged_at_the_next_save(tmp_path, pair, monkeypatch):
    logged = []
    saves = saved.saver_in(tmp_path, logged, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(sharded_safetensors, "write", Mock(side_effect=OSError(28, "No space left on device")))
        saves.save(5, *pair, {}, set())
        saves._thread.join()
    assert logged == []
    saves.save(6, *pair, {}, set())
    place = checkpoint.path_of(tmp_path, 5)
    line = f"cannot write checkpoint {place}: No space left on device"
    assert logged == [f"WARNING: {line}; earlier checkpoints are untouched"]
    assert saves.finish() is None
    assert len(logged) == 1
    assert checkpoint.steps(tmp_path) == [6]


@pytest.mark.parametrize(
    ("where", "error"), [("checksum", MemoryError()), ("state_text", ValueError("unexpected"))], ids=repr
)
def test_any_error_in_the_background_is_reported(tmp_path, pair, monkeypatch, error, where):
    """A dead thread must not look like one that has finished."""
    logged = []
    saves = saved.saver_in(tmp_path, logged, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, Mock(side_effect=error))
        saves.save(5, *pair, {}, set())
        assert (str(error) or type(error).__name__) in saves.finish()
    assert len(logged) == 1


def test_a_checkpoint_of_other_data_is_not_resumed(tmp_path, pair):
    saved.save(tmp_path, 1, *pair, {"data": "these"})
    assert saved.saver_in(tmp_path).load_newest(*pair, "these")["step"] == 1
    with pytest.raises(UserError, match="the data have changed"):
        saved.saver_in(tmp_path).load_newest(*pair, "others")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts or resizes a file system of the given KiB on runs/tiny/checkpoints."""
    folder = tmp_path / saved.CHECKPOINTS
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


@contextmanager
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
def test_a_truncated_write_leaves_the_earlier_checkpoint(tmp_path, pair, asynchronous):
    saved.save(tmp_path, 1, *pair)
    before, logged = saved.content(tmp_path), []
    saves = saved.saver_in(tmp_path, logged, asynchronous=asynchronous)
    with files_no_larger_than(3000):
        saves.save(2, *pair, {}, set())
        error = saves.finish()
    assert "File too large" in error
    assert error.startswith(f"cannot write checkpoint {checkpoint.path_of(tmp_path, 2)}: ")
    assert logged == [f"WARNING: {error}; earlier checkpoints are untouched"]
    assert saved.content(tmp_path) == before
    saves.save(2, *pair, {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_disk_that_is_too_full_is_not_written_to(small_disk, pair):
    folder, logged = small_disk(4096), []
    saved.save(folder, 1, *pair)
    small_disk(shutil.disk_usage(folder).used // 1024 + 12)
    before = saved.content(folder)
    saves = saved.saver_in(folder, logged)
    saves.save(2, *pair, {}, set())
    error = saves.finish()
    assert "it needs 1 MiB and the disk has 0" in error
    assert "\n" not in error
    assert len(logged) == 1
    assert saved.content(folder) == before
    assert [path.name for path in folder.iterdir()] == ["0000000001"]
    small_disk(4096)
    saves.save(2, *pair, {}, set())
    assert saves.finish() is None
    assert checkpoint.steps(folder) == [1, 2]


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path, pair):
    (tmp_path / "file").write_text("no folder")
    logged = []
    saves = saved.saver_in(tmp_path / "file" / "checkpoints", logged)
    saves.save(1, *pair, {}, set())
    assert "Not a directory" in saves.finish()
    assert len(logged) == 1


def test_a_folder_that_may_only_be_read_is_a_failure(small_disk, pair):
    folder = small_disk(4096)
    saved.save(folder, 1, *pair)
    small_disk(4096, "ro")
    before, logged = saved.content(folder), []
    saves = saved.saver_in(folder, logged)
    saves.save(2, *pair, {}, set())
    assert "Read-only file system" in saves.finish()
    assert len(logged) == 1
    assert saved.content(folder) == before
