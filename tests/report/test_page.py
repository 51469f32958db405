"""The page and the files of a report: self-contained, escaped, complete, deterministic."""

import re
from types import SimpleNamespace

import pytest
from html_page import Page

from moe_lm.cli import report as command
from moe_lm.errors import UserError
from moe_lm.report.write import write_report

NO_PRESETS = {}.__getitem__  # the runs' configurations have no model, so no preset is needed


@pytest.fixture(scope="module")
def report(study):
    return write_report(study, NO_PRESETS, ["Nothing below 0.5 & <b>one</b> seed means anything."])


@pytest.fixture(scope="module")
def html(report):
    return (report.folder / "index.html").read_text(encoding="utf-8")


def test_every_file_is_listed_and_whole(report, study):
    assert report.folder == study / "report"
    assert sorted(report.files) == sorted(report.folder.iterdir())
    assert all(path.stat().st_size > 0 for path in report.files)
    names = {path.name for path in report.files}
    assert {"index.html", "table.md", "table.csv", "perplexity.png", "perplexity.svg"} <= names
    assert (report.folder / "table.md").read_text(encoding="utf-8") == report.markdown


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?://|@import|<script|url\((?!#)", html)
    assert page.tags.count("svg") == 9


def test_identifiers_on_the_page_are_unique_and_found(html):
    page = Page(html)
    used = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert len(page.ids) == len(set(page.ids))
    assert used <= set(page.ids)


def test_the_page_follows_the_theme(html):
    assert "prefers-color-scheme:dark" in html
    assert "width=device-width" in html
    assert not re.search(r"(fill|stroke): #(ffffff|1f2328)", html)


def test_the_page_shows_everything(html):
    text = Page(html).text
    assert "Nothing below 0.5 & <b>one</b> seed means anything." in text
    assert "6 finished runs, 1 unfinished" in text
    assert "10.0 M words so far, validation perplexity 25.0" in text
    assert "moe_256 mean (2 seeds)" in text
    assert '"parameters_total": 821400000' in text
    assert "name: moe_1024_h" in text
    assert "All runs: 1 × cpu; moe_lm 0.1.0, torch 2.11.0" in text


def test_runs_made_elsewhere_are_told_apart(make_run, tmp_path):
    make_run("moe_4", experts=0)
    make_run("moe_32", experts=0, device="NVIDIA H200", num_processes=8)
    text = Page(write_report(tmp_path / "study", NO_PRESETS).folder.joinpath("index.html").read_text()).text
    assert "moe_32: 8 × NVIDIA H200" in text
    assert "moe_4: 1 × cpu" in text


def test_odd_names_and_contents_are_escaped(make_run, tmp_path):
    name = "<script>&é‹\"'"
    run = make_run(name, experts=0, device="<img src=x>")
    (run / "config.yaml").write_text("note: </pre><script>alert(1)</script>\n")
    report = write_report(tmp_path / "study", NO_PRESETS, ["<i>&"], "study <b>")
    html = (report.folder / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert name in page.text
    assert "1 finished run; study <b>" in page.text
    assert "</pre><script>alert(1)</script>" in page.text


def test_the_same_runs_give_the_same_bytes(report, study):
    first = {path: path.read_bytes() for path in report.files}
    again = write_report(study, NO_PRESETS, ["Nothing below 0.5 & <b>one</b> seed means anything."])
    assert {path: path.read_bytes() for path in again.files} == first


def test_plots_of_an_earlier_report_do_not_stay(make_run, tmp_path):
    run = make_run("lstm", experts=0, finished=False)
    assert (write_report(tmp_path / "study", NO_PRESETS).folder / "curves.svg").exists()
    (run / "metrics.jsonl").unlink()
    report = write_report(tmp_path / "study", NO_PRESETS)
    assert {path.name for path in report.folder.iterdir()} == {"index.html", "table.md", "table.csv"}


def test_tables_of_an_earlier_report_do_not_stay(make_run, tmp_path):
    run = make_run("moe_4")
    (tmp_path / "study/report").mkdir()
    for name in ("paper.csv", "imitated.csv", "balance.csv", "mine.txt"):
        (tmp_path / "study/report" / name).write_text("old")
    names = {path.name for path in write_report(tmp_path / "study", NO_PRESETS).folder.iterdir()}
    assert run.exists()
    assert {name for name in names if not name.endswith((".png", ".svg"))} == {
        *("index.html", "table.md", "table.csv", "mine.txt")
    }


def test_a_folder_that_cannot_be_written_is_named(make_run, tmp_path):
    make_run("lstm", experts=0, finished=False)
    (tmp_path / "study" / "report").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*study/report \(.+\): make it a folder"):
        write_report(tmp_path / "study", NO_PRESETS)


def test_the_command_prints_the_table_and_where_the_page_is(monkeypatch, capsys):
    """The page compares runs with the packaged presets."""

    def write(folder, presets, notes, study):
        assert presets("moe_32")["model"]["num_experts"] == 32
        return SimpleNamespace(markdown="the table", folder=folder / "report")

    monkeypatch.setattr(command, "write_report", write)
    assert command.main(["runs=some/study"]) == 0
    assert capsys.readouterr().out == "the table\n\nsome/study/report/index.html\n"
