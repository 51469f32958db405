"""Every damage of a checkpoint is found and named, no pickle is opened, and the checkpoint before it is taken."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import saved
import torch
from saved import CHECKPOINTS, EVALUATE, LAST, MODEL, MORE, OPTIMIZER
from shards import whole
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm.checkpoint import checkpoint
from moe_lm.errors import UserError
from moe_lm.parallel.context import SINGLE_PROCESS


@pytest.fixture
def checkpoints(trained_once, tmp_path, monkeypatch) -> Path:
    """The working directory holds copies of the finished run's checkpoints and nothing else."""
    shutil.copytree(trained_once / CHECKPOINTS, tmp_path / CHECKPOINTS)
    monkeypatch.chdir(tmp_path)
    return CHECKPOINTS


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit_flipped(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def swapped(path: Path) -> None:
    """Replace the file by that of another checkpoint, which is intact and of the same size."""
    other = path.parents[2] / "0000000010" / path.relative_to(path.parents[1])
    mine, theirs = path.read_bytes(), other.read_bytes()
    assert mine != theirs
    path.write_bytes(theirs)


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
    "model_emptied": (MODEL, written(b""), NO_MATCH),
    "model_missing": (MODEL, Path.unlink, f"{MODEL} is missing"),
    "model_swapped": (MODEL, swapped, NO_MATCH),
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
    "state_missing": ("state.json", Path.unlink, "state.json"),
    "format_bit": ("state.json", replaced(b'"format": 3', b'"format": 7'), f"state.json {NO_MATCH}"),
    "folder_swapped": ("state.json", whole_folder_swapped, "is that of step 10"),
    "optimizer_truncated": (OPTIMIZER, truncated, NO_MATCH),
    "optimizer_bit": (OPTIMIZER, one_bit_flipped, NO_MATCH),
    "optimizer_missing": (OPTIMIZER, Path.unlink, f"{OPTIMIZER} is missing"),
    "optimizer_swapped": (OPTIMIZER, swapped, NO_MATCH),
}


def damage(name: str, path: Path = LAST) -> str:
    """Damage a checkpoint; return a text that the warning must contain."""
    file, change, expected = DAMAGE[name]
    before = saved.content(path)
    change(path / file)
    assert saved.content(path) != before or (path / "more").exists()
    return expected


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_leads_to_the_checkpoint_before_it(checkpoints, name):
    """Verifying touches nothing; resuming renames the checkpoint, with one warning, and takes the one before it."""
    expected, logged = damage(name), []
    every, left = saved.content(CHECKPOINTS), saved.content(LAST)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.verify(LAST, ("optimizer",) if name.startswith("optimizer") else ("model",))
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"checkpoint {LAST} is damaged (")
    assert expected in line
    assert saved.content(CHECKPOINTS) == every
    assert checkpoint.newest(CHECKPOINTS, SINGLE_PROCESS, logged.append) == checkpoint.path_of(CHECKPOINTS, 11)
    assert logged == [f"WARNING: {line}; it is now damaged-0000000012, and the one before it is taken"]
    assert saved.content(CHECKPOINTS / "damaged-0000000012") == left
    assert checkpoint.steps(CHECKPOINTS)[-1] == 11


@pytest.mark.parametrize("name", ["model_bit", "state_truncated", "optimizer_missing"])
def test_damage_is_named_by_evaluate_and_nothing_is_touched(own_trained, moe_lm, name):
    expected = damage(name)
    left = saved.content(CHECKPOINTS)
    outcome = moe_lm(*EVALUATE)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"moe-lm: checkpoint {LAST} is damaged (")
    assert_one_line(outcome, expected)
    assert saved.content(CHECKPOINTS) == left


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
        saved.assert_same_bits(ours, theirs)
    assert moe_lm(*EVALUATE).code == 0


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(checkpoints):
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


def test_another_format_is_refused_and_left_alone(own_trained, moe_lm):
    (LAST / "state.json").write_text(json.dumps({"format": 2, "checksum": "00", "state": {}}))
    left = saved.content(CHECKPOINTS)
    line = f"{LAST} has format 2, this version of moe-lm reads 3: train the model again"
    with pytest.raises(UserError, match=re.escape(line)):
        checkpoint.verify(LAST, ("model",))
    outcome = moe_lm(*MORE)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == f"moe-lm: {line}"
    assert saved.content(CHECKPOINTS) == left


def forge(path: Path) -> None:
    """Make the manifest of a checkpoint fit its files."""
    state = checkpoint.load_state(path)
    names = [file for file in path.rglob("*") if file.is_file() and file.name != "state.json"]
    sums = {str(f.relative_to(path)): [f.stat().st_size, checkpoint.checksum(f)] for f in names}
    (path / "state.json").write_text(checkpoint.state_text(state | {"files": sums}))


class Canary:
    """Opened as a pickle, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def put_pickle(name: str, kind: str) -> None:
    """Write a pickle, or torch's archive of one, into the last checkpoint, whose manifest fits it."""
    if kind == "pickle":
        (LAST / name).write_bytes(pickle.dumps(Canary()))
    else:
        with (LAST / name).open("wb") as stream:
            torch.save(Canary(), stream)
    forge(LAST)


@pytest.mark.parametrize(
    "name",
    [
        MODEL,
        OPTIMIZER,
        "model/more.safetensors",
        "optimizer/.metadata",
        "model/x.pt",
        "x.pkl",
        "x.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_pickle_with_a_manifest_that_fits_is_refused(checkpoints, name, kind):
    put_pickle(name, kind)
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(Path(name).name)):
        checkpoint.verify(LAST)
    if name != OPTIMIZER:  # which evaluating does not read
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.verify(LAST, ("model",))
    assert checkpoint.newest(CHECKPOINTS, SINGLE_PROCESS, lambda line: None) == checkpoint.path_of(CHECKPOINTS, 11)
    assert not Path("canary").exists()


def test_no_command_opens_a_pickle(own_trained, moe_lm):
    put_pickle(MODEL, "pickle")
    outcome = moe_lm(*EVALUATE)
    assert outcome.code == 2
    assert_one_line(outcome, Path(MODEL).name)
    outcome = moe_lm(*MORE)
    assert "WARNING" in outcome.err
    assert "resumed at step 11" in outcome.err
    assert not Path("canary").exists()


def test_loading_verifies_the_checksums(tmp_path):
    """`load_model` and `load_optimizer_state` verify their own part."""
    plain = saved.configuration()
    path = saved.save(tmp_path, 3, *saved.built(plain))
    model, optimizer = saved.built(plain, seed=2)
    one_bit_flipped(path / MODEL)
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_model(path, model, {})
    optimizer.load(checkpoint.load_optimizer_state(path, model, {}))
    one_bit_flipped(path / OPTIMIZER)
    with pytest.raises(checkpoint.CheckpointError):
        optimizer.load(checkpoint.load_optimizer_state(path, model, {}))
