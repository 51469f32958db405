"""scripts/download_lm1b on a tiny archive by a file:// address: fetched, checked, unpacked, resumed, refused."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_lm1b"
NAME = "1-billion-word-language-modeling-benchmark-r13output"
TEST_SHARD = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
FILES = {
    "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": "a b c\nd\n",
    "training-monolingual.tokenized.shuffled/news.en-00099-of-00100": "e f\n",
    TEST_SHARD: "g h\ni j k\n",
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": "l\n",
    "README": "about\n",
}

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")


@pytest.fixture
def server(tmp_path):
    """The environment that names a tiny archive instead of the real one."""
    for name, text in FILES.items():
        path = tmp_path / "made" / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    archive = tmp_path / "served.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / NAME, NAME)
    return {
        "LM1B_URL": archive.as_uri(),
        "LM1B_SIZE": str(archive.stat().st_size),
        "LM1B_SHA256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "LM1B_UNPACKED_SIZE": "1000",
        "LM1B_SHARDS": "2 training shards, 2 held-out shards, test shard of 2 sentences and 5 words",
        "LM1B_SENTENCES": "3",
    }


def download(folder, environment):
    command = ["bash", str(SCRIPT), str(folder)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def refused(outcome, *expected):
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("download_lm1b: ")
    assert all(words in last for words in expected), last


def test_another_archive_is_told(tmp_path, server):
    """Whose size and checksum are those expected, as of one that the address has now."""
    archive = tmp_path / "served.tar.gz"
    (tmp_path / "other" / "text").mkdir(parents=True)
    (tmp_path / "other" / "text" / "a.txt").write_text("a\n")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "other", "other")
    sums = {"LM1B_SIZE": str(archive.stat().st_size), "LM1B_SHA256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    outcome = download(tmp_path / "lm1b", server | sums)
    refused(outcome, "holds another folder than expected")
    assert "find:" not in outcome.stderr


def test_it_is_fetched_checked_and_unpacked_once(tmp_path, server):
    outcome = download(tmp_path / "lm1b", server)
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / "lm1b" / NAME
    assert outcome.stdout == f"next: moe-lm prepare corpus=lm1b corpus.folder={folder} vocabulary=words\n"
    assert "WARNING" not in outcome.stderr
    assert {name: (folder / name).read_text() for name in FILES} == FILES
    again = download(tmp_path / "lm1b", server | {"LM1B_URL": "file:///nowhere"})
    assert (again.returncode, again.stdout) == (0, outcome.stdout)


def test_a_download_goes_on_where_it_stopped(tmp_path, server):
    served = Path(server["LM1B_URL"].removeprefix("file://"))
    partial = tmp_path / "lm1b" / f"{NAME}.tar.gz"
    partial.parent.mkdir()
    partial.write_bytes(served.read_bytes()[:50])
    inode = partial.stat().st_ino
    served.write_bytes(b"\0" * 50 + served.read_bytes()[50:])  # what is there already is not fetched again
    assert download(tmp_path / "lm1b", server).returncode == 0
    assert partial.stat().st_ino == inode


def test_other_bytes_are_refused_and_nothing_is_unpacked(tmp_path, server):
    refused(download(tmp_path / "lm1b", server | {"LM1B_SHA256": "0" * 64}), "is damaged", "delete it and repeat")
    assert not (tmp_path / "lm1b" / NAME).exists()
    refused(download(tmp_path / "lm1b", server | {"LM1B_SIZE": "9"}), "bytes, not 9", "delete it")
    archive = tmp_path / "lm1b" / f"{NAME}.tar.gz"
    archive.unlink()
    refused(download(tmp_path / "lm1b", server | {"LM1B_URL": (tmp_path / "nothing").as_uri()}), "repeat the command")


def test_other_content_is_refused(tmp_path, server):
    wrong = server | {"LM1B_SHARDS": "99 training shards"}
    refused(download(tmp_path / "lm1b", wrong), "holds 2 training shards, 2 held-out", "expected 99 training shards")
    assert not (tmp_path / "lm1b" / NAME).exists()
    warned = download(tmp_path / "lm1b", server | {"LM1B_SENTENCES": "4"})
    assert warned.returncode == 0
    assert "WARNING: 3 training sentences, published are 4" in warned.stderr


def test_a_small_disk_and_a_bad_folder_are_said_first(tmp_path, server):
    refused(download(tmp_path / "lm1b", server | {"LM1B_UNPACKED_SIZE": "9" * 18}), "MB are free; make room")
    assert not list((tmp_path / "lm1b").iterdir())
    (tmp_path / "file").write_text("")
    refused(download(tmp_path / "file" / "lm1b", server), "cannot make", "give another folder")


@pytest.mark.parametrize("is_fetched", [False, True])
def test_the_room_of_an_interrupted_unpacking_is_counted_on(tmp_path, server, is_fetched):
    left = tmp_path / "lm1b" / f"{NAME}.partial"
    left.mkdir(parents=True)
    if is_fetched:
        shutil.copyfile(server["LM1B_URL"].removeprefix("file://"), tmp_path / "lm1b" / f"{NAME}.tar.gz")
    (tmp_path / "bin").mkdir()
    disk = tmp_path / "bin" / "df"  # has room as soon as what is left is gone
    disk.write_text(f"#!/bin/sh\necho Head\n[ -e '{left}' ] && echo d 9 9 0 9 || echo d 9 9 999999 9\n")
    disk.chmod(0o755)
    outcome = download(tmp_path / "lm1b", server | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert outcome.returncode == 0, outcome.stderr


def test_the_next_command_can_be_pasted(tmp_path, server):
    from moe_lm.cli.config import composed, resolved

    folder = tmp_path / "my text"
    outcome = download(folder, server)
    told, *command = shlex.split(outcome.stdout)
    assert (told, command[:2]) == ("next:", ["moe-lm", "prepare"])
    assert resolved(composed("prepare", command[2:]))["corpus"]["folder"] == str(folder / NAME)


def test_a_missing_tool_is_named(tmp_path, server):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "tar", "awk", "df", "sha256sum"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    refused(download(tmp_path / "lm1b", server | {"PATH": str(tmp_path / "bin")}), "needs curl; install it")
