"""An export is the run's model, whole, in a folder that the commands and Python open as they open the run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.numpy import load_file
from shards import whole
from tiny_run import PROGRAM, evaluated
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm import load
from moe_lm.checkpoint import export as exports
from moe_lm.cli.config import composed
from moe_lm.construction import build_model

RUN = "run=runs/tiny"


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


@pytest.mark.parametrize("limit", [2**32, 2000])
def test_the_commands_print_the_same_for_an_export_and_its_run(either, moe_lm, tmp_path, limit):
    to = export(moe_lm, tmp_path / "deep" / "exported", f"max_file_bytes={limit}")
    for split in ("valid", "test"):
        figures = json.loads(moe_lm("evaluate", f"run={to}", f"split={split}", "json=true").out)
        assert figures | {"run": "runs/tiny"} == evaluated(moe_lm, f"split={split}")
    assert moe_lm("score", f"run={to}", "text/test.txt").out == moe_lm("score", RUN, "text/test.txt").out
    copy = shutil.copytree("runs/tiny", tmp_path / "copy")
    for command in ("inspect", "audit"):
        ours, theirs = (moe_lm(command, f"run={run}", "json=true") for run in (to, copy))
        assert (ours.code, theirs.code) == (0, 0), ours.err
        assert json.loads(ours.out) == json.loads(theirs.out)
    # Their output lies beside the export, which is unchanged.
    assert (to.parent / "exported-inspect/index.html").is_file()
    assert (to.parent / "exported-audit.json").is_file()
    assert moe_lm("evaluate", f"run={to}").code == 0


def test_the_tensors_are_those_of_the_checkpoint(trained, moe_lm, tmp_path):
    for which, step in (("last", 12), ("11", 11)):
        to = export(moe_lm, tmp_path / which, f"checkpoint={which}")
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


def test_no_file_passes_the_limit_unless_one_tensor_does(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "several", "max_file_bytes=1000")
    files = [[array.nbytes for array in load_file(file).values()] for file in sorted(to.glob("model-*"))]
    assert any(sum(sizes) > 1000 for sizes in files)
    assert all(sum(sizes) <= 1000 or len(sizes) == 1 for sizes in files)


def test_an_export_opens_in_python_without_hydra(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    program = PROGRAM.replace("FOLDER", repr(str(to)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) == evaluated(moe_lm)["perplexity"]


def test_an_export_needs_nothing_of_its_run(own_trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    expected = evaluated(moe_lm)
    shutil.rmtree("runs")
    moved = to.rename(tmp_path / "moved, twice = so")
    figures = json.loads(moe_lm("evaluate", f"run={moved}", "json=true").out)
    assert figures["nats"] == expected["nats"]


def test_export_json_holds_the_figures_of_the_run(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    record, result = json.loads((to / "export.json").read_text()), json.loads(Path("runs/tiny/result.json").read_text())
    kept = ("perplexity", "predicted_words", "unigram_perplexity", "words", "preset", "name", "parameters_total")
    assert {key: record[key] for key in kept} == {key: result[key] for key in kept}
    assert record["operations_per_timestep"] == result["operations_per_timestep"]
    assert record["step"] == result["steps"]
    [data] = [json.loads(path.read_text()) for path in Path("data").glob("*/data.json")]
    assert record["data"] == data["fingerprint"]
    assert record["vocabulary"] == {"kind": "words", "size": 53}
    others = contents(to)
    del others["export.json"]
    assert {name: file["bytes"] for name, file in record["files"].items()} == {n: len(b) for n, b in others.items()}


def test_the_card_has_the_figures_and_its_commands_are_real(either, moe_lm, tmp_path):
    card, result = card_of(export(moe_lm, tmp_path / "exported")), json.loads(Path("runs/tiny/result.json").read_text())
    for split in ("valid", "test"):
        assert f"| {split} | {result['perplexity'][split]:.2f} | {result['predicted_words'][split]:,} |" in card
    assert f"| {result['parameters_total']:,} |" in card
    assert ("not per piece" in card) == (load("runs/tiny").config["vocabulary"].get("size") == 300)
    [block] = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    for line in block.splitlines():
        _, command, *arguments = shlex.split(line)
        composed(command, [a if "=" in a else f"file={a}" for a in arguments])
    [program] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    program = program.replace("'tiny'", repr(str(tmp_path / "exported")))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_of_another_step_are_left_out(trained, moe_lm, tmp_path):
    outcome = moe_lm("export", RUN, f"to={tmp_path / 'ten'}", "checkpoint=10")
    assert "no result.json" in outcome.err
    record = json.loads((tmp_path / "ten/export.json").read_text())
    assert record["step"] == 10
    assert not {"perplexity", "predicted_words"} & record.keys()
    assert "Not measured" in card_of(tmp_path / "ten")


def test_the_best_checkpoint(trained, moe_lm, tmp_path):
    export(moe_lm, tmp_path / "best", "checkpoint=best")
    assert load(tmp_path / "best").step == evaluated(moe_lm, "checkpoint=best")["step"]


def test_equal_exports_have_equal_bytes(trained, moe_lm, tmp_path):
    assert contents(export(moe_lm, tmp_path / "a")) == contents(export(moe_lm, tmp_path / "b"))


def test_file_modes_follow_the_umask(trained, moe_lm, tmp_path):
    before = os.umask(0o022)
    try:
        to = export(moe_lm, tmp_path / "exported")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in to.rglob("*") if path.is_file()} == {0o644}


def test_exporting_the_same_model_again_changes_nothing(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    times = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
    outcome = moe_lm("export", RUN, f"to={to}")
    assert outcome.code == 0
    assert outcome.out == f"{to}: step 12 of runs/tiny is there already\n"
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == times


def test_an_empty_folder_is_filled(trained, moe_lm, tmp_path):
    (tmp_path / "exported").mkdir()
    export(moe_lm, tmp_path / "exported")


def assert_refused(moe_lm, to: Path, *expected: str, overrides: tuple[str, ...] = ()) -> None:
    before = contents(to) if to.is_dir() else to.read_bytes()
    assert_one_line(moe_lm("export", RUN, f"to={to}", *overrides), *expected)
    assert before == (contents(to) if to.is_dir() else to.read_bytes())


def test_a_folder_with_anything_else_is_refused(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported", "checkpoint=11")
    assert_refused(moe_lm, to, "something else than step 12", "to=...")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.hidden").write_text("precious")
    assert_refused(moe_lm, tmp_path / "other", "something else", "empty it")
    (tmp_path / "file").write_text("precious")
    assert_refused(moe_lm, tmp_path / "file", "is a file")
    assert_refused(moe_lm, Path("runs/tiny"), "something else", "empty it")
    (to / "config.yaml").write_text("altered")
    assert_refused(moe_lm, to, "config.yaml was altered", overrides=("checkpoint=11",))


def test_another_run_of_the_same_name_and_step_is_refused(own_trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    shutil.rmtree("runs")
    assert moe_lm("train", *with_overrides(list(TRAINING), "seed=2")).code == 0
    assert_refused(moe_lm, to, "something else than step 12")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("export to=x", "needs run=..."),
        ("export run=runs/tiny", "needs to=..."),
        ("export run=runs/none to=x", "runs/none does not exist"),
        ("export run=text to=x", "text is no run"),
        ("export run=runs/tiny to=x checkpoint=7", "no checkpoint 7"),
        ("export run=runs/tiny to=x max_file_bytes=0", "max_file_bytes=0"),
        ("export run=runs/tiny to=text/test.txt/x", "text/test.txt/x"),
        ("export run=exported to=x", "exported is an export already"),
        ("evaluate run=exported checkpoint=11", "exported is an export of step 12"),
        ("evaluate run=exported checkpoint=best", "omit checkpoint=best"),
        ("score run=exported text/test.txt checkpoint=-1", "omit checkpoint=-1"),
    ],
)
def test_wrong_inputs_end_in_one_line(own_trained, moe_lm, arguments, expected):
    export(moe_lm, Path("exported"))
    assert_one_line(moe_lm(*arguments.split()), expected)
    assert not Path("x").exists()


def test_no_training_writes_into_an_export(own_trained, moe_lm):
    to = export(moe_lm, Path("runs/exported"))
    before = contents(to)
    assert_one_line(moe_lm("train", *with_overrides(list(TRAINING), "name=exported")), "runs/exported is an export")
    assert contents(to) == before


def test_an_exports_own_step_may_be_named(trained, moe_lm, tmp_path):
    to = export(moe_lm, tmp_path / "exported")
    assert moe_lm("evaluate", f"run={to}", "checkpoint=12").out == moe_lm("evaluate", f"run={to}").out


@pytest.mark.parametrize("call", range(1, 9))
def test_a_full_disk_leaves_nothing(trained, moe_lm, tmp_path, monkeypatch, call):
    real, calls = exports.sync, []

    def sync(path):
        calls.append(path)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr("moe_lm.checkpoint.export.sync", sync)
    to = tmp_path / "exports/tiny"
    outcome = moe_lm("export", RUN, f"to={to}")
    if len(calls) < call or calls[-1] == to.parent:  # the last one comes after the folder is in its place
        assert set(contents(to)) == {"export.json", *json.loads((to / "export.json").read_text())["files"]}
        return
    assert_one_line(outcome, "No space left", "exports/tiny")
    assert not contents(tmp_path / "exports").keys() - {".tiny.lock"}


def test_a_killed_export_is_not_there_and_the_next_one_is_whole(trained, moe_lm, tmp_path):
    to = tmp_path / "tiny"
    program = (
        "import os\nfrom moe_lm.checkpoint import export\nfrom moe_lm.__main__ import main\n"
        "export.sync = lambda path: os._exit(9) if path.name == 'README.md' else None\n"
        f"main(['export', 'run=runs/tiny', 'to={to}'])"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert not to.exists()
    assert (tmp_path / ".tiny.partial").exists()
    export(moe_lm, to)
    assert not (tmp_path / ".tiny.partial").exists()
