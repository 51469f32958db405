"""The faults: what is done to a run, and what must come of it."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from faults import intact, programs
from faults.child import Child
from faults.trial import BATCH, NUM_WORDS, VALID_EVERY, Trial, Work

STEPS = NUM_WORDS // BATCH
_TIMES_TRIED = 4


def killed_at_random(trial: Trial) -> None:
    """SIGKILL at a random moment of the run's life, once or twice; then the same command to the end."""
    newest = 0
    for _ in range(trial.draw.choice([1, 1, 1, 1, 2])):
        for _ in range(_TIMES_TRIED):
            asynchronous = trial.draw.random() < 0.5
            child = trial.start(
                checkpoint__every_seconds=trial.draw.choice([0, 0, 0.1]), checkpoint__asynchronous=asynchronous
            )
            _wait_for_a_moment(trial, child, newest)
            victim = trial.draw.choice(["everything", "0", "1"]) if trial.size > 1 else "everything"
            trial.at_step(0)
            if hit := _kill(child, victim):
                trial.disturbed += 1
                trial.killed(child)
            newest = trial.look_through(child)
            if hit or trial.disturbed:
                break
            trial.restart()
    trial.expect(trial.disturbed, "no kill came before the end")
    trial.finish(newest)


def _wait_for_a_moment(trial: Trial, child: Child, newest: int) -> None:
    times, phase = trial.site.timelines[trial.size], trial.draw.random()
    if phase < 0.15:
        _sleep(trial, child, trial.draw.uniform(0, times.ready))
    elif phase < 0.9:
        trial.wait_for_step(child, trial.draw.randint(min(newest + 1, STEPS), STEPS))
        _sleep(trial, child, trial.draw.uniform(0, (times.trained - times.ready) / STEPS))
    else:
        child.wait(until=lambda: trial.at_step(STEPS))
        _sleep(trial, child, trial.draw.uniform(0, times.end - times.trained))


def _sleep(trial: Trial, child: Child, seconds: float) -> None:
    until = time.monotonic() + seconds
    child.wait(until=lambda: trial.at_step(0) and time.monotonic() >= until)


def _kill(child: Child, victim: str) -> bool:
    """Kill one process or all; False where the run had ended already."""
    if child.code is not None:
        return False
    if victim == "everything":
        child.kill_all()
        return True
    return child.kill(victim) or child.kill()


def killed_in_a_save(place: str, rank: str) -> Work:
    """SIGKILL exactly where a checkpoint, metrics.jsonl or result.json is half written."""

    def work(trial: Trial) -> None:
        newest, count = 0, trial.draw.randint(2, 12)
        if place == programs.ON_RESUMING:
            child = trial.start()
            trial.wait_for_step(child, 10)
            child.kill_all()
            newest = trial.look_through(child)
        child = trial.start(programs.killed(place, count), rank, checkpoint__asynchronous=trial.draw.random() < 0.5)
        trial.wait_for_step(child, 10**9)
        trial.ended(child, (-signal.SIGKILL, 1))
        trial.disturbed += 1
        newest = trial.look_through(child)
        trial.finish(newest)

    return work


def launcher_killed(trial: Trial) -> None:
    """The launcher alone is killed: its processes end by themselves, and let the run go."""
    for early in (trial.draw.random() < 0.5, False):
        child = trial.start(programs.SLOWLY)
        if early:
            child.wait(until=lambda child=child: "0" in child.parallel().values())
            _sleep(trial, child, trial.draw.uniform(0, trial.site.timelines[trial.size].ready))
        else:
            trial.wait_for_step(child, intact.last_step(trial.run) + 4)
        child.kill()
        trial.disturbed += 1
        trial.killed(child)
        trial.expect(early or "stopped and saved at step" in child.text, f"it did not stop: {child.text[-400:]}")
        newest = trial.look_through(child)
    trial.finish(newest)


def torchrun_restarts(trial: Trial) -> None:
    """A rank is killed under torchrun, once or twice: it starts the processes again, and the run ends by itself."""
    child = trial.start(programs.SLOWLY, torchrun=True)
    for step in sorted(trial.draw.sample(range(3, STEPS - 6), 2)):
        trial.wait_for_step(child, step)
        pids = [pid for pid, rank in child.parallel().items() if rank is not None]
        trial.expect(child.kill(trial.draw.choice("01")), "no process to kill")
        trial.disturbed += 1
        child.wait(until=lambda pids=pids: not set(pids) & set(child.parallel()))
        newest = max(intact.steps(trial.run), default=0)
        child.wait(until=lambda newest=newest: trial.at_step(0) and intact.resumed_at(child.text) >= newest)
    trial.ended(child, (0,))
    trial.compare()


def signalled(number: signal.Signals, to: str | None) -> Work:
    """A signal to what was started, or to one rank: the step ends, all save, exit code 75."""

    def work(trial: Trial) -> None:
        child = trial.start(programs.SLOWLY, checkpoint__every_seconds=1000)
        trial.wait_for_step(child, trial.draw.randint(2, STEPS - 8))
        before = intact.last_step(trial.run)
        trial.expect(child.kill(to, number), "no process to signal")
        trial.disturbed += 1
        trial.ended(child, (75,))
        newest = trial.look_through(child)
        said = re.findall(r"stopped and saved at step (\d+)", child.text)
        trial.expect(said == [str(newest)] and newest >= before, f"saved {newest}, said {said}: {child.text[-400:]}")
        trial.finish(newest)

    return work


def second_process(other_size: int) -> Work:
    """A second command on the same run is refused; after a crash nothing is in the way."""

    def work(trial: Trial) -> None:
        child = trial.start(programs.VERY_SLOWLY)
        trial.wait_for_step(child, 2)
        second = trial.start(num_processes=other_size)
        trial.ended(second, (2,))
        trial.expect("in use by another process" in second.text, f"not refused: {second.text[-400:]}")
        trial.expect(child.code is None, "the first one was over before the second came")
        trial.disturbed += 1
        _kill(child, "everything")
        trial.finish(trial.look_through(child))

    return work


# Corruptions: each is given the newest checkpoint of a run and the one before, and damages the newest.


def _any_file(checkpoint: Path, draw: random.Random, part: str = "*") -> Path:
    return draw.choice(sorted(checkpoint.glob(f"{part}/*.safetensors")))


def _truncated(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = _any_file(newest, draw)
    os.truncate(file, draw.randrange(1, file.stat().st_size))


def _emptied(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    os.truncate(_any_file(newest, draw), 0)


def _flip(file: Path, draw: random.Random, first: int, last: int) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(first, min(last, len(content)))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _bit_of_a_header(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    _flip(_any_file(newest, draw), draw, 0, 100)


def _bit_of_the_model(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = _any_file(newest, draw, "model")
    _flip(file, draw, file.stat().st_size // 2, file.stat().st_size)


def _bit_of_the_optimizer(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = _any_file(newest, draw, "optimizer")
    _flip(file, draw, file.stat().st_size // 2, file.stat().st_size)


def _digit_of_the_state(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = newest / "state.json"
    text = file.read_text()
    place = draw.choice([match.start() for match in re.finditer(r"\d", text[text.index("progress") :])])
    place += text.index("progress")
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def _state_cut(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = newest / "state.json"
    os.truncate(file, draw.randrange(file.stat().st_size))


def _state_missing(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    (newest / "state.json").unlink()


def _state_of_another(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    shutil.copy(before / "state.json", newest / "state.json")


def _file_missing(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    _any_file(newest, draw).unlink()


def _part_missing(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    shutil.rmtree(newest / draw.choice(["model", "optimizer"]))


def _file_of_another(draw: random.Random, newest: Path, before: Path) -> None:
    file = _any_file(newest, draw)
    shutil.copy(before / file.relative_to(newest), file)


def _files_swapped(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    model = _any_file(newest, draw, "model")
    optimizer = newest / "optimizer" / model.name
    content = model.read_bytes()
    shutil.copy(optimizer, model)
    optimizer.write_bytes(content)


def _file_too_many(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    file = _any_file(newest, draw)
    shutil.copy(file, file.with_name(f"more-{file.name}"))


def _a_pickle(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    _any_file(newest, draw).write_bytes(b"\x80\x04K\x01.")


def _nothing_in_it(draw: random.Random, newest: Path, before: Path) -> None:  # noqa: ARG001
    shutil.rmtree(newest)
    newest.mkdir()


CORRUPTIONS = {
    "file cut": _truncated,
    "file empty": _emptied,
    "bit of a header": _bit_of_a_header,
    "bit of the model": _bit_of_the_model,
    "bit of the optimizer": _bit_of_the_optimizer,
    "digit of the state": _digit_of_the_state,
    "state cut": _state_cut,
    "state missing": _state_missing,
    "state of another": _state_of_another,
    "file missing": _file_missing,
    "part missing": _part_missing,
    "file of another": _file_of_another,
    "files swapped": _files_swapped,
    "file too many": _file_too_many,
    "a pickle": _a_pickle,
    "nothing in it": _nothing_in_it,
}


def corrupted(name: str) -> Work:
    """The newest checkpoint is damaged: that is said, it is kept aside, and the one before is taken."""

    def work(trial: Trial) -> None:
        trial.copy_of_shorter()
        steps = intact.steps(trial.run)
        newest, before = (intact.folder_of(trial.run, step) for step in reversed(steps[-2:]))
        CORRUPTIONS[name](trial.draw, newest, before)
        trial.disturbed += 1
        trial.finish(steps[-2], says=("WARNING: checkpoint", newest.name, f"it is now damaged-{newest.name}"))
        trial.expect((trial.run / "checkpoints" / f"damaged-{newest.name}").is_dir(), "the damaged one is not kept")

    return work


def all_corrupted(trial: Trial) -> None:
    """No checkpoint is intact: refused in one line, and nothing is deleted."""
    trial.copy_of_shorter()
    folders = [intact.folder_of(trial.run, step) for step in intact.steps(trial.run)]
    for folder in folders:
        CORRUPTIONS[trial.draw.choice(list(CORRUPTIONS)[:5])](trial.draw, folder, folder)
    trial.disturbed += 1
    child = trial.start()
    trial.ended(child, (2,))
    last = child.text.splitlines()[-1]
    trial.expect(last.startswith("moe-lm: no checkpoint in "), f"not refused: {last}")
    kept = sorted(path.name for path in (trial.run / "checkpoints").iterdir())
    trial.expect(kept == [f"damaged-{folder.name}" for folder in folders], f"kept: {kept}")
    trial.ended(trial.start(), (2,))  # repeated, it does not begin anew either


def faulty_updates(kind: str, count: int) -> Work:
    """Some updates have no loss to learn from: left out and counted; killed on the way, the run ends no otherwise."""

    def work(trial: Trial) -> None:
        first = trial.draw.randint(3, STEPS - 6)
        ranks = "0,1" if kind == "explosion" else str(trial.size - 1)
        program = programs.faulty(kind, first, first + count)
        child = trial.start(program, ranks)
        trial.ended(child, (0,))
        trial.disturbed += count
        trial.look_through()
        skipped = sum(line.get("skipped", 0) for line in intact.metrics(trial.run))
        trial.expect(skipped == count, f"{skipped} counted of {count}: {child.text[-400:]}")
        warnings = child.text.count("was left out")
        trial.expect(warnings == count, f"{warnings} warnings of {count}")
        undisturbed = intact.outcome(trial.run)
        trial.restart()
        child = trial.start(programs.SLOWLY + program, ranks)
        trial.wait_for_step(child, first + trial.draw.randint(0, count))
        _kill(child, "everything")
        newest = trial.look_through(child)
        child = trial.start(program, ranks)
        trial.ended(child, (0,))
        if intact.resumed_at(child.text) != newest:
            trial.wrong.append(f"resumed at step {intact.resumed_at(child.text)}, not at {newest}")
        trial.compare(undisturbed)

    return work


def only_faulty_updates(kind: str) -> Work:
    """No update has a loss to learn from any more: the run stops, and names the last good checkpoint."""

    def work(trial: Trial) -> None:
        ranks = "0,1" if kind == "explosion" else str(trial.size - 1)
        settings = {"training__max_skipped": 3, "checkpoint__every_seconds": 1000}
        # Without a validation between, which would save a checkpoint after updates that were left out.
        firsts = [n for n in range(VALID_EVERY + 1, STEPS - 6) if (n + 1) % VALID_EVERY and (n + 2) % VALID_EVERY]
        first = trial.draw.choice(firsts)
        child = trial.start(programs.faulty(kind, first, 10**9), ranks, **settings)
        trial.ended(child, (2,))
        trial.disturbed += 3
        newest = trial.look_through(child)
        last = child.text.splitlines()[-1]
        found = re.search(r"the last good checkpoint is that of step (\d+):", last)
        trial.expect(found and int(found[1]) == newest and newest <= first, f"newest is {newest}: {last}")
        trial.expect(last.startswith("moe-lm: 3 updates in a row"), last)
        trial.finish(newest)

    return work


def disk_full_in_a_save(*, unaware: bool, room_again: bool) -> Work:
    """The disk fills up while checkpoints are written, by some hundred bytes or all of one."""

    def work(trial: Trial) -> None:
        with _small_disk(trial) as disk:
            program = programs.SLOWLY + (programs.UNAWARE_OF_DISK if unaware else "")
            child = trial.start(program)
            trial.wait_for_step(child, trial.draw.randint(3, STEPS // 2))
            _fill(disk, trial.draw.randrange(60_000) if unaware else 0)
            trial.disturbed += 1
            said = "cannot write checkpoint"
            child.wait(until=lambda: trial.at_step(0) and said in child.text)
            if room_again:
                (disk / "ballast").unlink()
                trial.ended(child, (0,))
            else:
                trial.ended(child, (2,))
                trial.expect(child.text.splitlines()[-1].startswith("moe-lm: cannot write "), child.text[-400:])
            trial.expect(said in child.text, f"it does not say so: {child.text[-400:]}")
            newest = trial.look_through(child)
            (disk / "ballast").unlink(missing_ok=True)
            if room_again:
                trial.compare()
            else:
                trial.finish(newest)

    return work


def disk_full_for_lines(*, room_again: bool) -> Work:
    """The disk fills up while no checkpoint is due: lines of metrics.jsonl have no room."""

    def work(trial: Trial) -> None:
        with _small_disk(trial) as disk:
            child = trial.start(programs.SLOWLY, checkpoint__every_seconds=1000)
            trial.wait_for_step(child, trial.draw.choice([7, 8, 9]))
            child.wait(until=lambda: bool(intact.steps(trial.run)))
            _fill(disk, 0)
            trial.disturbed += 1
            said = "its lines wait in memory"
            child.wait(until=lambda: said in child.text)
            trial.expect(said in child.text, f"it does not say so: {child.text[-400:]}")
            newest = 0
            if room_again:
                (disk / "ballast").unlink()
                trial.ended(child, (0,))
                trial.compare()
            else:
                trial.ended(child, (2,))
                newest = trial.look_through(child)
                (disk / "ballast").unlink()
                trial.finish(newest)

    return work


@contextlib.contextmanager
def _small_disk(trial: Trial) -> Iterator[Path]:
    """A file system of a few MiB in memory, on which the run lies."""
    disk = trial.site.folder / f"disk-{trial.name}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "faults", disk], check=True)
    try:
        trial.arguments["runs"] = f"disk-{trial.name}"
        trial.run = disk / trial.name
        yield disk
        trial.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    place = folder / "disk-tried"
    place.mkdir(exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "faults", place], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0 and subprocess.run(["umount", place], capture_output=True).returncode == 0


def _fill(disk: Path, room: int) -> None:
    """Leave a file system so many bytes."""
    with (disk / "ballast").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    size = (disk / "ballast").stat().st_size
    os.truncate(disk / "ballast", max(0, size - room))
