"""The built wheel stands alone: configs travel in it, it trains in an empty folder, and Python opens the run."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_lm
from moe_lm.cli import result

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_trains_in_an_empty_folder(tmp_path):
    """pip builds and unpacks the wheel elsewhere; the command runs from that copy, not from this repository."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True)
    [wheel] = wheels.glob("moe_lm-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the number {i} follows the number {i - 1}\n" for i in range(200)))
    command = [sys.executable, "-m", "moe_lm", "train", "corpus=text", "name=tiny", "model=moe_4"]
    command += [f"corpus.train={text}", f"corpus.valid=[{text}.valid]", f"corpus.test=[{text}.test]"]
    for split in ("valid", "test"):
        Path(f"{text}.{split}").write_text("the number 3 follows the number 2\n")
    command += ["model.width=8", "model.expert_hidden=8", "batch.words=200", "training.num_words=400"]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = [sys.executable, "-c", "import moe_lm; print(moe_lm.__file__)"]
    found = subprocess.run(where, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.startswith(str(site))
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (empty / "runs/tiny/result.json").is_file()
    program = "import moe_lm; print(moe_lm.load('runs/tiny').perplexity(['the number 3 follows the number 2']))"
    opened = subprocess.run([sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    result = json.loads((empty / "runs/tiny/result.json").read_text())
    assert abs(float(opened.stdout) / result["perplexity"]["test"] - 1) < 1e-6


def test_versions_of_a_tree_that_is_not_installed(monkeypatch):
    """A result says its version also where moe-lm lies as files beside the packages: a GPU lent for half an hour."""

    def of_installed(name):
        if name == "moe-lm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(result, "version", of_installed)
    found = result.versions("torch")
    assert (found["moe-lm"], found["torch"]) == (moe_lm.__version__, "1")
