"""Checkpoints: tensors only, whole or not there, and every damage named."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from tiny_training import TRAINING, with_overrides
from torch import nn

from moe_lm import checkpoint
from moe_lm.mistake import Mistake
from moe_lm.optimizer import Together

CHECKPOINT = Path("runs/tiny/checkpoints/0000000012")
EVALUATE = ("evaluate", "run=runs/tiny")
MORE = ("train", *with_overrides(list(TRAINING), "training.num_words=3000"))


def small() -> tuple[nn.Module, Together]:
    """A model and an Adam that has made a step."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    optimizer = Together([torch.optim.Adam(model.parameters(), fused=True)])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_safetensors_or_json(trained):
    files = [path for path in Path("runs/tiny/checkpoints").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for path in files:
        if path.suffix == ".json":
            assert json.loads(path.read_text())["format"] == checkpoint.FORMAT
            continue
        with safe_open(path, "pt") as tensors:
            assert all(isinstance(tensors.get_tensor(name), torch.Tensor) for name in tensors.keys())  # noqa: SIM118


def test_no_file_of_a_run_is_a_pickle_or_an_archive(trained):
    for path in Path("runs/tiny").rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start != b"PK", path
            assert not re.match(rb"\x80[\x02-\x05]", start), path


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path):
    model, optimizer = small()
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"progress": {"seconds": 0.1 + 0.2}})
    other, its_optimizer = small()
    nn.init.zeros_(other.weight)
    checkpoint.load_model(path, other)
    checkpoint.load_optimizer(path, other, its_optimizer)
    assert torch.equal(other.weight, model.weight)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for kind, value in optimizer.state[mine].items():
            assert torch.equal(its_optimizer.state[theirs][kind], value)
    assert checkpoint.load_state(path)["progress"] == {"seconds": 0.1 + 0.2}


DAMAGE = [
    ("model.safetensors", lambda data: data[:-1], "model.safetensors does not match its checksum"),
    ("model.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "does not match its checksum"),
    ("model.safetensors", lambda data: b"", "does not match its checksum"),
    ("model.safetensors", None, "model.safetensors"),
    ("state.json", lambda data: data[:-5], "is damaged"),
    ("state.json", lambda data: data.replace(b'"step": 12', b'"step": 13'), "state.json does not match its checksum"),
    ("state.json", lambda data: b"{}", "is damaged"),
    ("state.json", lambda data: b"[]", "is damaged"),
    ("state.json", lambda data: b"\xff" + data, "is damaged"),
    ("state.json", lambda data: data.replace(b'"format": 2', b'"format": 99'), "format"),
    ("state.json", None, "state.json"),
]
OPTIMIZER_DAMAGE = [
    ("optimizer.safetensors", lambda data: data[: len(data) // 2], "optimizer.safetensors does not match its checksum"),
    ("optimizer.safetensors", None, "optimizer.safetensors"),
]


@pytest.mark.parametrize(
    ("command", "file", "change", "expected"),
    [(EVALUATE, *row) for row in DAMAGE] + [(MORE, *row) for row in (*DAMAGE[::4], *OPTIMIZER_DAMAGE)],
)
def test_damage_is_named_and_nothing_is_touched(own_trained, moe_lm, command, file, change, expected):
    path = CHECKPOINT / file
    if change is None:
        path.unlink()
    else:
        before = path.read_bytes()
        assert change(before) != before
        path.write_bytes(change(before))
    left = content(Path("runs/tiny/checkpoints"))
    outcome = moe_lm(*command)
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("moe-lm: ")]
    assert expected in line
    assert str(CHECKPOINT) in line
    assert "delete that folder" in line
    assert "Traceback" not in outcome.err
    assert content(Path("runs/tiny/checkpoints")) == left


def test_what_the_message_says_mends_it(own_trained, moe_lm):
    for path in CHECKPOINT.iterdir():
        path.unlink()
    CHECKPOINT.rmdir()
    assert "resumed at step 11" in moe_lm(*MORE).err


def test_half_written_folders_are_ignored_and_removed(tmp_path):
    model, optimizer = small()
    leftover = tmp_path / ".0000000009.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == []
    checkpoint.save(tmp_path, 3, model, optimizer, {})
    checkpoint.prune(tmp_path, 1, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000003", "notes"]


def test_pruning_keeps_the_last_and_the_best(tmp_path):
    model, optimizer = small()
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    checkpoint.prune(tmp_path, 2, {3})
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    checkpoint.prune(tmp_path, 2, {7})
    assert checkpoint.steps(tmp_path) == [6, 7]


def test_a_crash_while_pruning_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    model, optimizer = small()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer, {})

    def crash(path):
        (Path(path) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, 1, set())
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.prune(tmp_path, 1, set())
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002"]


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def disk_full_in_safetensors() -> SafetensorError:
    return SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [disk_full, disk_full_in_safetensors])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error, part):
    model, optimizer = small()
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    before, write = content(tmp_path), checkpoint.save_file

    def fill(tensors, path):
        if path.name == f"{part}.safetensors":
            path.write_bytes(b"half")
            raise error()
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(Mistake, match=r"cannot write checkpoint .*No space left on device.*untouched"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert content(tmp_path) == before
    assert checkpoint.steps(tmp_path) == [1]


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Mistake, match="cannot write checkpoint"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, *small(), {})


def test_a_full_disk_in_training_is_one_line_and_mends_by_repeating(workspace, moe_lm, monkeypatch):
    write = checkpoint.save_file

    def fill(tensors, path):
        if "0000000004" in str(path):
            raise disk_full()
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fill)
        outcome = moe_lm("train", *TRAINING)
    assert outcome.code == 2
    assert "No space left on device" in outcome.err.splitlines()[-1]
    assert checkpoint.steps(Path("runs/tiny/checkpoints")) == [1, 2, 3]
    assert "resumed at step 3" in moe_lm("train", *TRAINING).err
