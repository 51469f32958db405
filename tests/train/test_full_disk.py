"""metrics.jsonl on a disk that fills up: whole lines only, none lost once there is room again."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_lm.atomic_io import GrowingFile
from moe_lm.errors import UserError
from moe_lm.run import Run
from moe_lm.train.metrics import MetricsLog

LINES = [{"step": i, "nats_per_word": i / 7} for i in range(1, 9)]
TEXT = [json.dumps(line) + "\n" for line in LINES]


class Disk:
    """Replaces os.write and os.truncate: the disk is full after `room` bytes; None: it has room."""

    def __init__(self, monkeypatch, reason):
        self.room, self.stuck = None, False
        write, truncate = os.write, os.truncate

        def limited(descriptor, data):
            if self.room is None:
                return write(descriptor, data)
            if self.room == 0:
                raise OSError(reason, os.strerror(reason))
            taken = write(descriptor, data[: self.room])
            self.room -= taken
            return taken

        def cut(path, size):
            if self.stuck:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            truncate(path, size)

        monkeypatch.setattr(os, "write", limited)
        monkeypatch.setattr(os, "truncate", cut)


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def disk(request, monkeypatch):
    return Disk(monkeypatch, request.param)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_lines_wait_for_room(run, disk, capfd):
    """Half a line is taken back; the lines come in their order; each change is logged once."""
    run.append_metrics(LINES[0])
    disk.room = 10
    for line in LINES[1:4]:
        run.append_metrics(line)
        assert run.metrics_file.read_text() == TEXT[0]
    logged = capfd.readouterr().err.splitlines()
    assert len(logged) == 1
    assert logged[0].startswith(f"WARNING: cannot write {run.metrics_file} (")
    disk.room = None
    run.append_metrics(LINES[4])
    assert run.metrics_file.read_text() == "".join(TEXT[:5])
    assert capfd.readouterr().err.splitlines() == [
        f"{run.metrics_file} can be written again: 3 waiting lines are in it"
    ]
    run.append_metrics(LINES[5])
    run.finish_metrics()
    assert run.metrics_file.read_text() == "".join(TEXT[:6])
    assert capfd.readouterr().err == ""


def test_half_a_line_that_stays_is_cut_before_the_next(run, disk):
    """The disk takes half a line and then refuses to cut it off too."""
    run.append_metrics(LINES[0])
    disk.room, disk.stuck = 10, True
    run.append_metrics(LINES[1])
    assert run.metrics_file.read_text() == TEXT[0] + TEXT[1][:10]
    disk.room = None
    run.append_metrics(LINES[2])
    assert run.metrics_file.read_text() == "".join(TEXT[:3])


def test_file_that_went_away_is_not_filled_up(run, disk):
    """Somebody makes room by deleting the file: a new one begins with the lines that waited."""
    run.append_metrics(LINES[0])
    disk.room = 10
    run.append_metrics(LINES[1])
    run.metrics_file.unlink()
    disk.room = None
    run.append_metrics(LINES[2])
    assert run.metrics_file.read_text() == "".join(TEXT[1:3])


def test_close_may_be_what_fails(run, monkeypatch):
    """A network file system may report a full disk only at close."""
    run.append_metrics(LINES[0])
    close = os.close

    def full(descriptor):
        close(descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", full)
        run.append_metrics(LINES[1])
    assert run.metrics_file.read_text() == TEXT[0]
    run.finish_metrics()
    assert run.metrics_file.read_text() == "".join(TEXT[:2])


def test_lines_still_waiting_at_the_end_are_an_error(run, disk):
    """The end of a training tries once more, then the error names the file and the reason."""
    log = MetricsLog(run, {"logging": {"wandb": False}}, writes=True)
    disk.room = 0
    log.write(LINES[0])
    with pytest.raises(UserError, match=f"cannot write {run.metrics_file} .*its last 1 lines are lost"):
        log.close()
    disk.room = None
    log.close()
    assert run.metrics_file.read_text() == TEXT[0]


def test_folder_that_cannot_be_written(tmp_path):
    """Opening the file may fail too."""
    file = GrowingFile(tmp_path / "none/metrics.jsonl")
    file.append("one")
    (tmp_path / "none").mkdir()
    file.append("two")
    assert file.path.read_text() == "one\ntwo\n"


def test_training_goes_on(workspace, trained_once, moe_lm, training, disk):
    """With room at the end the files equal an undisturbed run's but for times; without, one line says so."""
    write, disk.room = os.write, 300

    def later(descriptor, data):
        if len(data) > 1000:  # as many lines have waited
            disk.room = None
        return write(descriptor, data)

    os.write = later  # undone with the disk's own
    outcome = moe_lm("train", *training)
    assert outcome.code == 0, outcome.err
    assert "can be written again" in outcome.err
    assert figures(Path("runs/tiny")) == figures(trained_once / "runs/tiny")
    disk.room, os.write = 300, write
    outcome = moe_lm("train", *training, "name=other")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("moe-lm: cannot write runs/other/metrics.jsonl (")


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


PROGRAM = textwrap.dedent("""
    import json, resource, sys
    from pathlib import Path
    from moe_lm.run import Run

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run, lines = Run(Path(sys.argv[1])), json.loads(sys.argv[2])
    limit(int(sys.argv[3]))
    for line in lines[:-1]:
        run.append_metrics(line)
    print(run.metrics_file.read_text(), end="--\\n")
    limit(resource.RLIM_INFINITY)
    run.append_metrics(lines[-1])
    print(run.metrics_file.read_text(), end="")
""")


@pytest.mark.parametrize("room", [0, 1, len(TEXT[0]), len("".join(TEXT[:3])) - 1, len("".join(TEXT[:3])) + 1])
def test_real_limit(tmp_path, room):
    """The kernel itself ends the file in the middle of a line (Python ignores SIGXFSZ)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(LINES), str(room)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    during, after = done.stdout.split("--\n")
    fitting = [text for i, text in enumerate(TEXT) if len("".join(TEXT[: i + 1])) <= room]
    assert during == "".join(fitting)
    assert after == "".join(TEXT)
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 2
