"""moe-lm inspect: its files and its output, words and subwords, flat and hierarchical; what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from html_page import Page
from tiny_run import RUN
from tiny_training import TRAINING, assert_one_line, call, with_overrides, working_in

from moe_lm.cli import inspect
from moe_lm.errors import UserError
from moe_lm.report.runs import read_runs

PICTURES = {f"middle-{name}.{kind}" for name in ("load", "pairs") for kind in ("png", "svg")}
HIERARCHICAL = (
    "layer@model.layers.middle=hierarchical_moe",
    *("model.num_experts=128", "model.num_groups=8", "model.k=2"),
)


OVERRIDES = {
    "hierarchical": HIERARCHICAL,
    "two": ("model.order=[lower,middle,extra,upper]", "+layer@model.layers.extra=moe"),
    "dense": ("layer@model.layers.middle=feed_forward",),
}
"""Overrides of each kind of run that this module trains, for two steps."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request):
    """Runs made once each, by kind."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "own"
            if kind in OVERRIDES:
                train(folder, kind)
            else:  # a copy: the shared one is for reading only
                source = request.getfixturevalue("trained_once" if kind == "words" else "subwords_once")
                shutil.copytree(source, folder)
            made[kind] = folder
        return made[kind]

    def train(folder: Path, kind: str) -> None:
        folder.mkdir()
        for name in ("text", "data"):
            (folder / name).symlink_to(request.getfixturevalue("trained_once") / name)
        drop = ("model.num_experts", "model.k") if kind == "dense" else ()
        base = [argument for argument in TRAINING if argument.split("=")[0] not in drop]
        with working_in(folder):
            assert call("train", *with_overrides(base, *OVERRIDES[kind], "training.num_words=300")) == 0

    return make


@pytest.fixture
def run_of(folders, monkeypatch):
    """Change to the folder of a kind of run."""

    def change(kind: str) -> None:
        monkeypatch.chdir(folders(kind))

    return change


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("runs/tiny/inspect").iterdir()}


@pytest.fixture
def undrawn(monkeypatch):
    """Nothing is written, as drawing takes the most time."""
    monkeypatch.setattr(inspect, "write_inspection", lambda folder, inspection, experts: ())


@pytest.mark.parametrize("kind", ["words", "subwords", "hierarchical", "two"])
def test_the_page_needs_nothing_else(run_of, moe_lm, kind):
    run_of(kind)
    outcome = moe_lm("inspect", RUN, "batch.sentences=1000", "batch.words=100000")
    assert outcome.code == 0, outcome.err
    found = files()
    assert {"index.html", "inspect.json", "middle-load.png", "middle-load.svg"} <= found.keys()
    assert (found.keys() >= PICTURES) == (kind != "hierarchical")
    assert not any(str(Path.cwd()).encode() in data for data in found.values())
    html = found["index.html"].decode()
    page = Page(html)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"@import|<script|url\((?!#)|https?://", html)
    used = {link[1:] for link in page.links if link.startswith("#")}
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme:dark" in html
    assert ("Groups of middle" in page.text) == (kind == "hierarchical")
    assert ("Layer extra" in page.text) == (kind == "two")
    assert ("is a piece that continues a word" in page.text) == (kind == "subwords")


@pytest.mark.parametrize("kind", ["words", "hierarchical"])
def test_the_batch_changes_no_byte(run_of, moe_lm, kind):
    run_of(kind)
    found = []
    for size in ("batch.sentences=1", "batch.words=100000"):
        assert moe_lm("inspect", RUN, size).code == 0
        found.append(files())
    assert found[0] == found[1]


def test_the_record_is_that_of_the_whole_split(run_of, moe_lm):
    run_of("words")
    record = json.loads(moe_lm("inspect", RUN, "json=true").out)
    lines = Path("text/valid.txt").read_text().splitlines()
    assert record == json.loads(Path("runs/tiny/inspect/inspect.json").read_text())
    assert (record["run"], record["step"], record["split"], record["sentences"]) == ("tiny", 12, "valid", len(lines))
    assert record["words"] == record["tokens"] == sum(len(line.split()) + 1 for line in lines)
    [layer] = record["layers"]
    assert layer["assignments"] == 2 * record["tokens"]
    assert sum(expert["load"] for expert in layer["experts"]) == layer["assignments"]
    assert sum(expert["importance_share"] for expert in layer["experts"]) == pytest.approx(1, abs=1e-5)
    assert all(len(expert["contexts"]) == 8 for expert in layer["experts"])


@pytest.mark.parametrize("kind", ["words", "subwords"])
def test_contexts_are_the_text(run_of, undrawn, moe_lm, kind):
    run_of(kind)
    lines = Path("text/test.txt").read_text().splitlines()
    record = json.loads(moe_lm("inspect", RUN, "split=test", "json=true", "contexts=20").out)
    places = [place for expert in record["layers"][0]["experts"] for place in expert["contexts"]]
    assert len({(place["sentence"], place["position"]) for place in places}) > 20
    for place in places:
        words = ("" if place["word"] == "<S>" else place["word"]).join((place["before"], place["after"]))
        assert words.replace("… ", "").replace(" …", "").strip() in lines[place["sentence"]]
        assert (place["word"] == "<S>") == (place["position"] == 0)
        if kind == "words" and place["position"]:
            assert lines[place["sentence"]].split()[place["position"] - 1] == place["word"]


def test_pieces_are_shown_as_text(run_of, undrawn, moe_lm):
    run_of("subwords")
    record = json.loads(moe_lm("inspect", RUN, "json=true", "words=30").out)
    words = {word["word"] for expert in record["layers"][0]["experts"] for word in expert["words"]}
    assert any(word.startswith("·") for word in words)
    assert any(re.fullmatch(r"w\d*", word) for word in words)
    assert not any("▁" in word for word in words - {"▁"})
    assert record["tokens"] > record["words"]


def test_how_much_is_told_can_be_chosen(own_trained, moe_lm):
    arguments = ("contexts=2", "words=3", "experts=1", "max_words=30", "split=train", "checkpoint=11")
    record = json.loads(moe_lm("inspect", RUN, *arguments, "json=true").out)
    experts = record["layers"][0]["experts"]
    assert len(experts) == 4
    assert max(len(expert["contexts"]) for expert in experts) == 2
    assert max(len(expert["words"]) for expert in experts) == 3
    assert (record["split"], record["step"]) == ("train", 11)
    read = [len(line.split()) + 1 for line in Path("text/train.txt").read_text().splitlines()[: record["sentences"]]]
    assert record["words"] == sum(read) >= 30 > sum(read[:-1])
    assert Page(Path("runs/tiny/inspect/index.html").read_text()).tags.count("details") == 1


def test_the_console_gets_a_summary_and_pictures_of_an_earlier_inspection_do_not_stay(own_trained, moe_lm):
    """Only what an inspection wrote is taken away, and the folder is no run to a report."""
    folder, runs = Path("runs/tiny/inspect"), read_runs(Path("runs"))
    folder.mkdir()
    for name in ("gone-load.png", "gone-pairs.svg", "mine.txt", "my-load.txt"):
        (folder / name).write_text("old")
    out = moe_lm("inspect", RUN).out
    assert files().keys() == {"index.html", "inspect.json", *PICTURES, "mine.txt", "my-load.txt"}
    assert read_runs(Path("runs")) == runs
    assert "tiny step 12, valid: " in out
    assert re.search(r"\| `middle` +\|\s+4 \|\s+2.00 \|", out)
    assert "`expert 0`" in out
    assert "runs/tiny/inspect/index.html" in out.splitlines()
    assert len(out.splitlines()) < 40


def test_a_dense_model_is_refused(run_of, moe_lm):
    run_of("dense")
    outcome = moe_lm("inspect", RUN)
    assert outcome.code == 2
    assert_one_line(outcome, "runs/tiny is a dense model", "no layer of it has a gate")
    assert not Path("runs/tiny/inspect").exists()


def test_a_folder_in_the_way_is_refused(own_trained, moe_lm):
    Path("runs/tiny/inspect").write_text("in the way")
    outcome = moe_lm("inspect", RUN)
    assert outcome.code == 2
    assert_one_line(outcome, "cannot write runs/tiny/inspect")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "inspect needs run=..."),
        ([RUN, "split=dev"], "split=dev: choose train, valid, test"),
        ([RUN, "contexts=0"], "contexts=0: must be at least 1"),
        ([RUN, "words=-1"], "words=-1: must be at least 1"),
        ([RUN, "experts=0"], "experts=0: must be at least 1"),
        ([RUN, "max_words=0"], "max_words=0: must be at least 1"),
        ([RUN, "max_words=all"], "max_words=all: needs a whole number"),
        ([RUN, "batch.words=0"], "batch.words=0: must be at least 1"),
        ([RUN, "checkpoint=99"], "has no checkpoint 99"),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_values_are_refused(trained, set_threads, overrides, words):
    with pytest.raises(UserError, match=words):
        inspect.main(overrides)
