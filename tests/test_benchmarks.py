"""The benchmarks run at tiny sizes, and what they write can be read; how fast anything is they say elsewhere."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = ["--threads", "1", "--square", "64"]
TINY = ["--overrides", "model.width=16", "model.expert_hidden=16"]


def run(script: str, *arguments: str) -> None:
    """Run a benchmark in this process, as `python scripts/benchmark_SCRIPT.py` would."""
    with pytest.MonkeyPatch.context() as patch:
        path = SCRIPTS / f"benchmark_{script}.py"
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(SCRIPTS)
        runpy.run_path(str(path), run_name="__main__")


def found_by(script: str, *arguments: str) -> dict:
    """Return what a benchmark wrote."""
    run(script, *arguments, "--json", "found.json")
    return json.loads(Path("found.json").read_text())


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch, set_threads):
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_layer():
    sizes = ["--width=16", "--hidden=16", "--tokens=64", "--rounds=2", *SMALL]
    found = found_by("layer", "--experts", "4", "8", *sizes)
    assert set(found["layers"]["8"]) == {"dense", "moe", "balanced", "products", "grouped", "moe_plain"}
    for row in found["layers"]["8"].values():
        assert 0 < row["least_ratio"] <= row["ratio"] <= row["largest_ratio"]
    assert found["commit"] != "unknown"
    assert found["threads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["moe_4", "moe_256_h", "moe_1_wide"])
def test_the_parts_of_a_step_add_up(model):
    experts = {"moe_256_h": ["model.num_experts=8", "model.num_groups=4"]}.get(model, [])
    sizes = ["--words", "200", "--vocabulary", "300", "--steps", "3", "--profile"]
    found = found_by("step", "--model", model, *sizes, *SMALL, *TINY, *experts)
    parts = found["parts"]
    assert sum(parts.values()) == pytest.approx(found["seconds"])
    expected = {"batch", "embedding", "LSTM", "between", "softmax", "losses", "optimizer", "LSTM, backward"}
    if model != "moe_1_wide":
        expected |= {"gate", "dispatch", "experts", "combine"}
        expected |= {f"{part}, backward" for part in ("gate", "dispatch", "experts", "combine")}
    assert expected <= parts.keys()
    assert 0 < found["profile"]["shares"]["matrix products"] < 1


@pytest.mark.slow
def test_gates():
    found = found_by("gates", "--width=16", "--hidden=16", "--experts=8", "--tokens=64", "--rounds=2")
    assert {"noisy_top_k", "expert_choice"} <= found["rows"].keys()
    assert all(row["share"] > 0 for row in found["rows"].values())


@pytest.mark.slow
def test_training_data_and_evaluation():
    sizes = ["--width=16", "--hidden=16", "--words=100", "--vocabulary=200", "--sampled=20", "--rounds=2"]
    found = found_by("training", *sizes, "--experts", "4", "--threads=1")
    assert found["rows"]["moe_1_wide"]["of_dense"] == 1
    found = found_by(
        "data", "--words=20000", "--files=2", "--vocabulary=500", "--batch-words=2000", "--micro-words=500"
    )
    assert min(found["words_per_second"].values()) > 0
    found = found_by("evaluation", "--tokens=300", "--vocabulary=500", *SMALL, *TINY)
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
    (
        "training",
        *["--width=16", "--hidden=16", "--experts=4", "--words=100", "--vocabulary=200", "--sampled=20"],
        "--overrides",
        "optimizer.learning_rate=1e30",
    ),
    ("training", "--experts", "2", "--width=16", "--hidden=16", "--words=100"),
    ("data", "--words", "0"),
    ("evaluation", "--vocabulary", "2"),
    ("evaluation", "--tokens", "10", "--vocabulary=20", *SMALL, *TINY),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_option_gives_one_line(arguments, capfd):
    """It is found before anything is measured, unless the measurement itself shows it."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"benchmark_{arguments[0]}.py: ")


@pytest.mark.parametrize("content", ["", "class MoE:\n    def __init__(self, only):\n        pass\n"])
def test_an_unusable_peer_is_left_out(tmp_path, content):
    """An empty module or one of another version does not stop the other measurements."""
    (tmp_path / "peers" / "davidmrau").mkdir(parents=True)
    (tmp_path / "peers" / "davidmrau" / "moe.py").write_text(content)
    sizes = ["--experts=4", "--width=16", "--hidden=16", "--tokens=64", "--rounds=2", *SMALL]
    found = found_by("layer", *sizes, "--layers", "moe", "davidmrau", "--peers", "peers")
    sys.modules.pop("moe", None)
    assert set(found["layers"]["4"]) == {"dense", "moe"}


@pytest.mark.parametrize("recipe", ["paper", "small_batch"])
def test_a_step_passes_through_at_most_twelve_files(recipe, capsys):
    """From the batch to the loss, and from the loss to the changed weights, as scripts/trace_step.py counts them."""
    with pytest.MonkeyPatch.context() as patch:
        path = SCRIPTS / "trace_step.py"
        patch.setattr(sys, "argv", [str(path), f"recipe={recipe}", "batch.words=120"])
        patch.syspath_prepend(SCRIPTS)
        runpy.run_path(str(path), run_name="__main__")
    counts = [int(n) for n in re.findall(r": (\d+) files", capsys.readouterr().out)]
    assert len(counts) == 2
    assert max(counts) <= 12
