"""An export is the run's model, whole, in a folder that the commands and Python open as they open the run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.numpy import load_file, save_file
from saved import sign
from shards import whole
from tiny_run import PROGRAM, RUN, change, evaluated
from tiny_training import TRAINING, assert_one_line, call, with_overrides, working_in

from moe_lm import load
from moe_lm.checkpoint import export as exports
from moe_lm.cli.config import composed
from moe_lm.cli.export import main as export_main
from moe_lm.construction import build_model
from moe_lm.errors import UserError


@pytest.fixture(scope="module")
def exported(trained_once, tmp_path_factory) -> Path:
    """An export of the finished run's last step; tests only read it."""
    to = tmp_path_factory.mktemp("exports") / "exported"
    with working_in(trained_once):
        assert call("export", RUN, f"to={to}") == 0
    return to


def export(moe_lm, to: Path, *overrides: str) -> Path:
    outcome = moe_lm("export", RUN, f"to={to}", *overrides)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{to}: step ")
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder: Path) -> dict:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def assert_printed_alike(moe_lm, to: Path) -> None:
    figures = json.loads(moe_lm("evaluate", f"run={to}", "json=true").out)
    assert figures | {"run": "runs/tiny"} == evaluated(moe_lm)
    assert moe_lm("score", f"run={to}", "text/test.txt").out == moe_lm("score", RUN, "text/test.txt").out


def test_the_commands_print_the_same_for_an_export_and_its_run(own_trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "deep" / "exported")
    assert_printed_alike(moe_lm, to)
    for command in ("inspect", "audit"):
        ours, theirs = (moe_lm(command, f"run={run}", "json=true") for run in (to, "runs/tiny"))
        assert (ours.code, theirs.code) == (0, 0), ours.err
        assert json.loads(ours.out) == json.loads(theirs.out)
    written = (to.parent / "exported-inspect/index.html", to.parent / "exported-audit.json")  # beside the export
    assert all(path.is_file() for path in written)
    assert moe_lm("evaluate", f"run={to}").code == 0


def test_subwords_in_several_files_are_read_alike(subwords_once, moe_lm, tmp_path, monkeypatch):
    monkeypatch.chdir(subwords_once)
    to = export(moe_lm, tmp_path / "exported", "max_file_bytes=2000")
    assert len(list(to.glob("model-*"))) > 2
    assert_printed_alike(moe_lm, to)
    assert "not per piece" in card_of(to)


def test_the_tensors_are_those_of_the_checkpoint(trained, exported, moe_lm, tmp_path):
    (tmp_path / "11").mkdir()  # an empty folder is filled
    for to, step in ((exported, 12), (export(moe_lm, tmp_path / "11", "checkpoint=11"), 11)):
        ours, theirs = tensors_of(to), whole(Path(f"runs/tiny/checkpoints/{step:010d}/model"))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name].numpy()).all() for name in ours)


def test_several_files_are_read_by_hugging_faces_own_reader(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "several", "max_file_bytes=2000")
    names = sorted(path.name for path in to.glob("model-*"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    index = json.loads((to / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in names for name in load_file(to / file)}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors_of(to).values())
    lm = load(to)
    other = build_model(lm.config, lm.vocabulary.size)
    load_torch_model(other, to, safe=True, strict=True)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_no_file_passes_the_limit_unless_one_tensor_does(trained, tmp_path):
    exports.save_weights(tmp_path, load("runs/tiny").model, 1000)
    files = [[array.nbytes for array in load_file(file).values()] for file in sorted(tmp_path.glob("model-*"))]
    assert any(sum(sizes) > 1000 for sizes in files)
    assert all(sum(sizes) <= 1000 or len(sizes) == 1 for sizes in files)


def test_an_export_opens_in_python_without_hydra(trained, exported, moe_lm):
    program = PROGRAM.replace("FOLDER", repr(str(exported)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) == evaluated(moe_lm)["perplexity"]


def test_an_export_needs_nothing_of_its_run(own_trained, exported, moe_lm, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved, twice = so")
    expected = evaluated(moe_lm)
    shutil.rmtree("runs")
    figures = json.loads(moe_lm("evaluate", f"run={moved}", "json=true").out)
    assert figures["nats"] == expected["nats"]


def test_export_json_holds_the_figures_of_the_run(trained, exported):
    record = json.loads((exported / "export.json").read_text())
    result = json.loads(Path("runs/tiny/result.json").read_text())
    kept = ("perplexity", "predicted_words", "unigram_perplexity", "words", "preset", "name", "parameters_total")
    assert {key: record[key] for key in kept} == {key: result[key] for key in kept}
    assert record["operations_per_timestep"] == result["operations_per_timestep"]
    assert record["step"] == result["steps"] == load(exported, checkpoint="12").step
    [data] = [json.loads(path.read_text()) for path in Path("data").glob("*/data.json")]
    assert record["data"] == data["fingerprint"]
    assert record["vocabulary"] == {"kind": "words", "size": 53}
    others = contents(exported)
    del others["export.json"]
    assert {name: file["bytes"] for name, file in record["files"].items()} == {n: len(b) for n, b in others.items()}


def test_the_card_has_the_figures_and_its_commands_are_real(trained, exported):
    card, result = card_of(exported), json.loads(Path("runs/tiny/result.json").read_text())
    for split in ("valid", "test"):
        assert f"| {split} | {result['perplexity'][split]:.2f} | {result['predicted_words'][split]:,} |" in card
    assert f"| {result['parameters_total']:,} |" in card
    assert "not per piece" not in card
    [block] = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    for line in block.splitlines():
        _, command, *arguments = shlex.split(line)
        composed(command, [a if "=" in a else f"file={a}" for a in arguments])
    [program] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "'tiny'" in program
    exec(program.replace("'tiny'", repr(str(exported))), {})


def test_figures_of_another_step_are_left_out(trained, moe_lm, tmp_path):
    outcome = moe_lm("export", RUN, f"to={tmp_path / 'ten'}", "checkpoint=10")
    assert "no result.json" in outcome.err
    record = json.loads((tmp_path / "ten/export.json").read_text())
    assert record["step"] == 10
    assert not {"perplexity", "predicted_words"} & record.keys()
    assert "Not measured" in card_of(tmp_path / "ten")


def test_equal_exports_have_equal_bytes_in_files_that_follow_the_umask(trained, exported, moe_lm, tmp_path):
    before = os.umask(0o022)
    try:
        to = export(moe_lm, tmp_path / "again")
    finally:
        os.umask(before)
    assert contents(to) == contents(exported)
    assert {path.stat().st_mode & 0o777 for path in to.rglob("*") if path.is_file()} == {0o644}


def test_exporting_the_same_model_again_changes_nothing(trained, exported, moe_lm):
    to = exported
    times = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
    outcome = moe_lm("export", RUN, f"to={to}")
    assert outcome.code == 0
    assert outcome.out == f"{to}: step 12 of runs/tiny is there already\n"
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == times


def assert_refused(to: Path, expected: str, *overrides: str) -> None:
    before = contents(to) if to.is_dir() else to.read_bytes()
    with pytest.raises(UserError, match=expected) as caught:
        export_main([RUN, f"to={to}", *overrides])
    assert len(str(caught.value).splitlines()) == 1
    assert before == (contents(to) if to.is_dir() else to.read_bytes())


def test_a_folder_with_anything_else_is_refused(trained, exported, tmp_path):
    assert_refused(exported, r"something else than step 11 .*to=\.\.\.", "checkpoint=11")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.hidden").write_text("precious")
    assert_refused(tmp_path / "other", "something else .*empty it")
    (tmp_path / "file").write_text("precious")
    assert_refused(tmp_path / "file", "is a file")
    assert_refused(Path("runs/tiny"), "something else .*empty it")
    altered = shutil.copytree(exported, tmp_path / "altered")
    (altered / "config.yaml").write_text("altered")
    assert_refused(altered, r"config\.yaml was altered")


def test_another_run_of_the_same_name_and_step_is_refused(own_trained, exported, tmp_path):
    """Another seed, or the same configuration with other weights."""
    weights = shutil.copytree(exported, tmp_path / "other") / "model.safetensors"
    tensors = load_file(weights)
    tensors["softmax.bias_V"][3] += 1
    save_file(tensors, weights)
    sign(tmp_path / "other")
    assert_refused(tmp_path / "other", "something else than step 12")
    change("seed", value=2)
    assert_refused(exported, "something else than step 12")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("export run=runs/tiny", "needs to=..."),
        ("export run=runs/none to=x", "runs/none does not exist"),
        ("export run=runs/tiny to=x checkpoint=7", "no checkpoint 7"),
        ("export run=runs/tiny to=x max_file_bytes=0", "max_file_bytes=0"),
        ("export run=runs/tiny to=text/test.txt/x", "text/test.txt/x"),
        ("export run=EXPORTED to=x", "exported is an export already"),
        ("evaluate run=EXPORTED checkpoint=11", "exported is an export of step 12"),
        ("evaluate run=EXPORTED checkpoint=best", "omit checkpoint=best"),
        ("score run=EXPORTED text/test.txt checkpoint=-1", "omit checkpoint=-1"),
    ],
)
def test_wrong_inputs_are_refused(trained, exported, set_threads, arguments, expected):
    name, *arguments = arguments.replace("EXPORTED", str(exported)).split()
    with pytest.raises(UserError) as caught:
        import_module(f"moe_lm.cli.{name}").main(arguments)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("x").exists()


def test_no_training_writes_into_an_export(own_trained, exported, moe_lm):
    to = shutil.copytree(exported, "runs/exported")
    before = contents(exported)
    assert_one_line(moe_lm("train", *with_overrides(list(TRAINING), "name=exported")), "runs/exported is an export")
    assert contents(Path(to)) == before


def save_two(folder: Path) -> None:
    """What an export's files are made by, for tests of how they get into their place."""
    (folder / "vocabulary").mkdir()
    for name in ("README.md", "vocabulary/vocabulary.txt"):
        (folder / name).write_text(name)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """Whichever file or folder cannot be flushed; the last one flushed is the folder's parent, after the renaming."""
    real, calls = exports.sync, []

    def sync(path):
        calls.append(path)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(exports, "sync", sync)
    for fails in range(1, 6):
        calls.clear()
        to = tmp_path / f"{fails}/tiny"
        with pytest.raises(UserError, match=rf"cannot write {to}: .*No space left on device"):
            exports.write(to, {}, save_two)
        assert not contents(to.parent).keys() - {".tiny.lock"}, calls
    fails, to, calls[:] = 7, tmp_path / "whole", []
    exports.write(to, {}, save_two)
    assert calls[-1] == tmp_path
    assert len(calls) == 6
    assert set(contents(to)) == {"export.json", *json.loads((to / "export.json").read_text())["files"]}


def test_a_full_disk_is_told_in_one_line(trained, moe_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "sync", Mock(side_effect=OSError(28, "No space left on device")))
    assert_one_line(moe_lm("export", RUN, f"to={tmp_path / 'tiny'}"), "No space left", "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_killed_export_is_not_there_and_the_next_one_is_whole(trained, moe_lm, tmp_path):
    to = tmp_path / "tiny"
    program = (
        "import os, pathlib\nfrom moe_lm.checkpoint import export\n"
        "export.sync = lambda path: os._exit(9) if path.name == 'README.md' else None\n"
        f"export.write(pathlib.Path({str(to)!r}), {{}}, lambda folder: (folder / 'README.md').write_text('half'))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert not to.exists()
    assert (tmp_path / ".tiny.partial").exists()
    export(moe_lm, to)
    assert not (tmp_path / ".tiny.partial").exists()
