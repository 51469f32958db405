"""Made-up run directories, written as training writes them."""

import json
from pathlib import Path

import pytest
import yaml

RESULT = {
    "preset": "moe_4",
    "model": {"width": 512},
    "seed": 1,
    "operations_per_timestep": 8_400_000,
    "parameters_without_embedding_and_softmax": 8_400_000,
    "parameters_total": 821_400_000,
    "steps": 100,
    "words": 10_000_000,
    "flops": 1.234e15,
    "seconds": 1000.0,
    "words_per_second": 10_000.0,
    "device": "cpu",
    "num_processes": 1,
    "perplexity": {"valid": 46.0, "test": 45.0},
    "predicted_words": {"valid": 900, "test": 1000},
    "versions": {"torch": "2.11.0", "moe_lm": "0.1.0"},
}


def write_run(
    folder: Path, name: str, experts: int = 4, finished: bool = True, settings: dict | None = None, **changes
) -> Path:
    """Write one run directory; `changes` go into result.json, `settings` into config.yaml.

    `experts=0` makes a dense model.
    """
    run = folder / name
    run.mkdir(parents=True)
    settings = f"name: {name}\nseed: 1\n" + (yaml.safe_dump(settings, sort_keys=False) if settings else "")
    (run / "config.yaml").write_text(settings, encoding="utf-8")
    lines = []
    for step in range(1, 21):
        words = {"step": step, "words": step * 500_000}
        line = words | {"nats_per_word": 7 - step / 10, "words_per_second": 1e4}
        if experts:
            line |= {"cv_importance": 1 / step, "cv_load": 2 / step, "max_over_mean_load": 1 + 1 / step}
            line |= {"max_over_mean_tokens": 1 + 2 / step}
        lines.append(line)
        if step % 5 == 0:
            lines.append(words | {"split": "valid", "perplexity": 500 / step, "nats": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    if finished:
        result = RESULT | {"name": name} | changes
        (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return run


@pytest.fixture
def make_run(tmp_path):
    """Write a run into tmp_path/study; see `write_run`."""

    def make(name: str, **options) -> Path:
        return write_run(tmp_path / "study", name, **options)

    return make


@pytest.fixture(scope="session")
def crowd(tmp_path_factory) -> Path:
    """Six models with long names, at the same cost and within half a point of perplexity."""
    folder = tmp_path_factory.mktemp("runs") / "ablation"
    for n in range(6):
        name = f"moe_256,balance.importance.weight=0.{n},balance.load.weight=0.{n}"
        write_run(folder, name, perplexity={"test": 35.5 + n / 10, "valid": 36.0})
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A sweep at equal operations: two dense models, three MoE models (one with two seeds), one unfinished."""
    folder = tmp_path_factory.mktemp("runs") / "capacity"
    sizes = {"lstm_4x512": (0, 8.4, 46.0), "moe_1_wide": (0, 8.4, 46.1), "moe_4": (4, 8.4, 45.0)}
    sizes |= {"moe_32": (32, 37.8, 39.7), "moe_256": (256, 272.9, 35.7)}
    for name, (experts, millions, test) in sizes.items():
        figures = {
            "preset": name,
            "operations_per_timestep": 8.4e6 + experts * 1e3,
            "parameters_without_embedding_and_softmax": millions * 1e6,
            "flops": 1e15 + experts * 1e12,
        }
        write_run(folder, name, experts, perplexity={"valid": test + 1, "test": test}, **figures)
    same = {**figures, "perplexity": {"valid": 36.3, "test": 35.3}}
    write_run(folder, "moe_256,seed=2", 256, seed=2, **same)
    write_run(folder, "moe_1024_h", 1024, finished=False)
    return folder
