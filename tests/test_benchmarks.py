"""The benchmarks run, at tiny sizes, and what they write can be read; how fast anything is they say elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = ["--threads", "1", "--square", "64"]
TINY = ["--overrides", "model.width=16", "model.expert_hidden=16"]


def ran(script: str, *arguments: str) -> dict:
    """What a benchmark wrote."""
    command = [sys.executable, SCRIPTS / f"benchmark_{script}.py", *arguments, "--json", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(Path("found.json").read_text())


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_layer():
    found = ran("layer", "--experts", "4", "8", "--width=16", "--hidden=16", "--tokens=64", "--rounds=2", *SMALL)
    assert set(found["layers"]["8"]) == {"dense", "moe", "balanced", "products", "grouped", "moe_plain"}
    for row in found["layers"]["8"].values():
        assert 0 < row["least_ratio"] <= row["ratio"] <= row["largest_ratio"]
    assert found["commit"] != "unknown"
    assert found["threads"] == 1


@pytest.mark.parametrize("model", ["moe_4", "moe_256_h", "moe_1_wide"])
def test_the_parts_of_a_step_add_up(model):
    experts = {"moe_256_h": ["model.num_experts=8", "model.num_groups=4"]}.get(model, [])
    sizes = ["--words", "200", "--vocabulary", "300", "--steps", "3", "--profile"]
    found = ran("step", "--model", model, *sizes, *SMALL, *TINY, *experts)
    parts = found["parts"]
    assert sum(parts.values()) == pytest.approx(found["seconds"])
    expected = {"batch", "embedding", "LSTM", "between", "softmax", "losses", "optimizer", "LSTM, backward"}
    if model != "moe_1_wide":
        expected |= {"gate", "dispatch", "experts", "combine"}
        expected |= {f"{part}, backward" for part in ("gate", "dispatch", "experts", "combine")}
    assert expected <= parts.keys()
    assert 0 < found["profile"]["shares"]["matrix products"] < 1


def test_machine():
    found = ran("machine", "--rows=4", "--width=8", "--hidden=8", "--matrices=3", "--copy-mib=1", *SMALL)
    assert all(rate > 0 for name, rate in found.items() if name.endswith("per_second"))


def test_training_data_and_evaluation():
    sizes = ["--width=16", "--hidden=16", "--words=100", "--vocabulary=200", "--sampled=20", "--rounds=2"]
    found = ran("training", *sizes, "--experts", "4", "--threads=1")
    assert found["rows"]["moe_1_wide"]["of_dense"] == 1
    found = ran("data", "--words=20000", "--files=2", "--vocabulary=500", "--batch-words=2000", "--micro-words=500")
    assert min(found["words_per_second"].values()) > 0
    found = ran("evaluation", "--tokens=300", "--vocabulary=500", *SMALL, *TINY)
    assert found["words_per_second"] > 0


WRONG = [
    ("layer", "--experts", "0"),
    ("layer", "--layers", "nonesuch"),
    ("layer", "--peers", "nowhere"),
    ("layer", "--device", "nonesuch"),
    ("layer", "--json", "nowhere/found.json"),
    ("layer", "--json", "."),
    ("layer", "--json", "/proc/found.json"),
    ("layer", "--room", "-1"),
    ("layer", "--experts", "1000000000", *SMALL),
    ("layer", "--experts", "4", "--width=16", "--hidden=16", "--tokens=64", *SMALL, "--layers", "davidmrau"),
    ("step", "--model", "nonesuch"),
    ("step", "--overrides", "model.widht=16", *SMALL),
    ("step", "--words", "100", "--vocabulary", "300", *SMALL, *TINY, "optimizer.learning_rate=1e30"),
    ("training", "--words=100", "--vocabulary=200", "--sampled=20", "--overrides", "optimizer.learning_rate=1e30"),
    ("training", "--experts", "2", "--width=16", "--hidden=16", "--words=100"),
    ("data", "--words", "0"),
    ("evaluation", "--vocabulary", "2"),
    ("evaluation", "--tokens", "10", "--vocabulary=20", *SMALL, *TINY),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_is_told_in_a_line(arguments):
    """Before anything is measured, but where that is what is wrong."""
    script, *options = arguments
    command = [sys.executable, SCRIPTS / f"benchmark_{script}.py", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"benchmark_{script}.py: ")


@pytest.mark.parametrize("content", ["", "class MoE:\n    def __init__(self, only):\n        pass\n"])
def test_a_copy_that_cannot_be_used_is_left_out(tmp_path, content):
    """Others' layers of no or another version cost ours nothing."""
    (tmp_path / "peers" / "davidmrau").mkdir(parents=True)
    (tmp_path / "peers" / "davidmrau" / "moe.py").write_text(content)
    sizes = ["--experts=4", "--width=16", "--hidden=16", "--tokens=64", "--rounds=2", *SMALL]
    found = ran("layer", *sizes, "--layers", "moe", "davidmrau", "--peers", "peers")
    assert set(found["layers"]["4"]) == {"dense", "moe"}
