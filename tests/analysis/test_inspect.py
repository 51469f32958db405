"""moe-lm inspect: its files and its output, words and subwords, flat and hierarchical; what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from html_page import Page
from tiny_training import TRAINING, assert_one_line, call, with_overrides, working_in

RUN = "run=runs/tiny"
PICTURES = {f"middle-{name}.{kind}" for name in ("load", "pairs") for kind in ("png", "svg")}
HIERARCHICAL = (
    "layer@model.layers.middle=hierarchical_moe",
    *("model.num_experts=128", "model.num_groups=8", "model.k=2"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, trained_once):
    """Runs made once each, by kind."""
    made = {}

    def make(kind: str) -> Path:
        overrides = {
            "words": (),
            "subwords": ("vocabulary=subwords", "vocabulary.size=300"),
            "hierarchical": HIERARCHICAL,
            "two": ("model.order=[lower,middle,extra,upper]", "+layer@model.layers.extra=moe"),
            "dense": ("layer@model.layers.middle=feed_forward",),
        }[kind]
        if kind == "words" and kind not in made:  # a copy: the shared one is for reading only
            made[kind] = shutil.copytree(trained_once, tmp_path_factory.mktemp(kind) / "own")
        if kind not in made:
            base = [a for a in TRAINING if not a.startswith("vocabulary.")] if kind == "subwords" else TRAINING
            drop = ("model.num_experts", "model.k") if kind == "dense" else ()
            folder = tmp_path_factory.mktemp(kind)
            (folder / "text").symlink_to(trained_once / "text")
            with working_in(folder):
                arguments = with_overrides([a for a in base if a.split("=")[0] not in drop], *overrides)
                assert call("train", *arguments) == 0
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def run_of(folders, monkeypatch):
    """Change to the folder of a kind of run."""

    def change(kind: str) -> None:
        monkeypatch.chdir(folders(kind))

    return change


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("runs/tiny/inspect").iterdir()}


@pytest.mark.parametrize("kind", ["words", "subwords", "hierarchical", "two"])
def test_the_batch_changes_no_byte(run_of, moe_lm, kind):
    run_of(kind)
    found = []
    for sizes in (["batch.sentences=1"], ["batch.sentences=1000", "batch.words=100000"], ["batch.words=50"]):
        outcome = moe_lm("inspect", RUN, *sizes)
        assert outcome.code == 0, outcome.err
        found.append(files())
    assert found[0] == found[1] == found[2]
    assert {"index.html", "inspect.json", "middle-load.png", "middle-load.svg"} <= found[0].keys()
    assert (found[0].keys() >= PICTURES) == (kind != "hierarchical")
    assert not any(str(Path.cwd()).encode() in data for data in found[0].values())


@pytest.mark.parametrize("kind", ["words", "subwords", "hierarchical", "two"])
def test_the_page_needs_nothing_else(run_of, moe_lm, kind):
    run_of(kind)
    assert moe_lm("inspect", RUN).code == 0
    html = Path("runs/tiny/inspect/index.html").read_text(encoding="utf-8")
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


def test_the_record_is_that_of_the_whole_split(own_trained, moe_lm):
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
def test_contexts_are_the_text(run_of, moe_lm, kind):
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


def test_pieces_are_shown_as_text(run_of, moe_lm):
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


def test_the_console_gets_a_summary_and_the_paths(own_trained, moe_lm):
    out = moe_lm("inspect", RUN).out
    assert "tiny step 12, valid: " in out
    assert re.search(r"\| `middle` +\|\s+4 \|\s+2.00 \|", out)
    assert "`expert 0`" in out
    assert "runs/tiny/inspect/index.html" in out.splitlines()
    assert len(out.splitlines()) < 40


def test_pictures_of_an_earlier_inspection_do_not_stay(own_trained, moe_lm):
    folder = Path("runs/tiny/inspect")
    folder.mkdir()
    for name in ("gone-load.png", "gone-pairs.svg", "mine.txt", "my-load.txt"):
        (folder / name).write_text("old")
    assert moe_lm("inspect", RUN).code == 0
    assert files().keys() == {"index.html", "inspect.json", *PICTURES, "mine.txt", "my-load.txt"}


def test_a_report_of_the_runs_is_not_disturbed(own_trained, moe_lm):
    before = moe_lm("report", "runs=runs").out
    assert moe_lm("inspect", RUN).code == 0
    assert moe_lm("report", "runs=runs").out == before


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
        ([], ("inspect needs run=...",)),
        (["run=runs/none"], ("runs/none does not exist",)),
        ([RUN, "split=dev"], ("split=dev: choose train, valid, test",)),
        ([RUN, "checkpoint=99"], ("has no checkpoint 99",)),
        ([RUN, "contexts=0"], ("contexts=0: must be at least 1",)),
        ([RUN, "words=-1"], ("words=-1: must be at least 1",)),
        ([RUN, "experts=0"], ("experts=0: must be at least 1",)),
        ([RUN, "experts=null"], ("experts=null: needs a whole number",)),
        ([RUN, "max_words=0"], ("max_words=0: must be at least 1",)),
        ([RUN, "max_words=all"], ("max_words=all: needs a whole number",)),
        ([RUN, "contexts=two"], ("contexts=two: needs a whole number",)),
        ([RUN, "json=3"], ("json=3: needs true or false",)),
        ([RUN, "batch.words=0"], ("batch.words=0: must be at least 1",)),
        ([RUN, "machine.device=tpu"], ("machine.device=tpu: choose auto, cpu or cuda",)),
        ([RUN, "context=3"], ("unknown key context", "contexts")),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_values_end_in_one_line(trained, moe_lm, overrides, words):
    outcome = moe_lm("inspect", *overrides)
    assert outcome.code == 2
    assert_one_line(outcome, *words)
