"""The faults: what is done to a run, and what must follow."""

import re
import signal
import time

from faults import intact
from faults.child import Child
from faults.corruptions import CORRUPTIONS, corrupt
from faults.inject import injected
from faults.small_disk import fill, small_disk
from faults.trial import BATCH, NUM_WORDS, VALID_EVERY, Trial, Work

STEPS = NUM_WORDS // BATCH
_ATTEMPTS = 4
_SLOW, _VERY_SLOW = "slow(0.03)\n", "slow(3)\n"


def killed_at_random(trial: Trial) -> None:
    """SIGKILL at a random moment of the run's life, once or twice; then the same command runs to the end."""
    newest = 0
    for _ in range(trial.draw.choice([1, 1, 1, 1, 2])):
        for _ in range(_ATTEMPTS):
            asynchronous, every = trial.draw.random() < 0.5, trial.draw.choice([0, 0, 0.1])
            child = trial.start(checkpoint__every_seconds=every, checkpoint__asynchronous=asynchronous)
            _wait_for_a_moment(trial, child, newest)
            victim = trial.draw.choice([None, "0", "1"]) if trial.size > 1 else None
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
        trial.wait_for_step(child, STEPS)
        _sleep(trial, child, trial.draw.uniform(0, times.end - times.trained))


def _sleep(trial: Trial, child: Child, seconds: float) -> None:
    until = time.monotonic() + seconds
    child.wait(until=lambda: trial.at_step(0) and time.monotonic() >= until)


def _kill(child: Child, rank: str | None = None) -> bool:
    """Kill one process, or all; return False where the run had ended already."""
    if child.code is not None:
        return False
    if rank is not None:
        return child.kill(rank) or child.kill()
    child.kill_all()
    return True


def killed_in_a_save(place: str, rank: str) -> Work:
    """SIGKILL exactly where a checkpoint, metrics.jsonl or result.json is half written."""

    def work(trial: Trial) -> None:
        count = trial.draw.randint(2, 12)
        if place == injected.ON_RESUMING:
            child = trial.start()
            trial.wait_for_step(child, 10)
            child.kill_all()
            trial.look_through(child)
        asynchronous = trial.draw.random() < 0.5
        child = trial.start(f"kill({place!r}, {count})", rank, checkpoint__asynchronous=asynchronous)
        trial.wait_for_step(child, 10**9)
        trial.ended(child, (-signal.SIGKILL, 1))
        trial.disturbed += 1
        trial.finish(trial.look_through(child))

    return work


def launcher_killed(trial: Trial) -> None:
    """The launcher alone is killed: its processes end by themselves and release the run."""
    for early in (trial.draw.random() < 0.5, False):
        child = trial.start(_SLOW)
        if early:
            child.wait(until=lambda child=child: "0" in child.processes().values())
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
    """A rank is killed under torchrun, twice: torchrun restarts the processes, and the run ends by itself."""
    child = trial.start(_SLOW, torchrun=True)
    for step in sorted(trial.draw.sample(range(3, STEPS - 6), 2)):
        trial.wait_for_step(child, step)
        pids = {pid for pid, rank in child.processes().items() if rank is not None}
        trial.expect(child.kill(trial.draw.choice("01")), "no process to kill")
        trial.disturbed += 1
        child.wait(until=lambda pids=pids: not pids & set(child.processes()))
        newest = max(intact.steps(trial.run), default=0)
        child.wait(until=lambda newest=newest: trial.at_step(0) and intact.resumed_at(child.text) >= newest)
    trial.ended(child, (0,))
    trial.compare()


def signalled(number: signal.Signals, rank: str | None) -> Work:
    """A signal to the command or to one rank: the step ends, all processes save, and the exit code is 75."""

    def work(trial: Trial) -> None:
        child = trial.start(_SLOW, checkpoint__every_seconds=1000)
        trial.wait_for_step(child, trial.draw.randint(2, STEPS - 8))
        before = intact.last_step(trial.run)
        trial.expect(child.kill(rank, number), "no process to signal")
        trial.disturbed += 1
        trial.ended(child, (75,))
        newest = trial.look_through(child)
        logged = re.findall(r"stopped and saved at step (\d+)", child.text)
        right = logged == [str(newest)] and newest >= before
        trial.expect(right, f"saved {newest}, logged {logged}: {child.text[-400:]}")
        trial.finish(newest)

    return work


def second_command(other_size: int) -> Work:
    """A second command on the same run is refused; after a crash nothing is in the way."""

    def work(trial: Trial) -> None:
        child = trial.start(_VERY_SLOW)
        trial.wait_for_step(child, 2)
        second = trial.start(num_processes=other_size)
        trial.ended(second, (2,))
        trial.expect("in use by another process" in second.text, f"not refused: {second.text[-400:]}")
        trial.expect(child.code is None, "the first one was over before the second came")
        trial.disturbed += 1
        _kill(child)
        trial.finish(trial.look_through(child))

    return work


def corrupted(name: str) -> Work:
    """The newest checkpoint is damaged: the command logs it, sets it aside, and resumes from the one before."""

    def work(trial: Trial) -> None:
        trial.copy_of_shorter()
        steps = intact.steps(trial.run)
        newest, before = (intact.folder_of(trial.run, step) for step in reversed(steps[-2:]))
        corrupt(name, trial.draw, newest, before)
        trial.disturbed += 1
        trial.finish(steps[-2], logs=("WARNING: checkpoint", newest.name, f"it is now damaged-{newest.name}"))
        trial.expect((trial.run / "checkpoints" / f"damaged-{newest.name}").is_dir(), "the damaged one is not kept")

    return work


def all_corrupted(trial: Trial) -> None:
    """No checkpoint is intact: the command is refused in one line, and nothing is deleted."""
    trial.copy_of_shorter()
    folders = [intact.folder_of(trial.run, step) for step in intact.steps(trial.run)]
    for folder in folders:
        corrupt(trial.draw.choice(list(CORRUPTIONS)[:5]), trial.draw, folder, folder)
    trial.disturbed += 1
    child = trial.start()
    trial.ended(child, (2,))
    trial.expect(child.last_line.startswith("moe-lm: no checkpoint in "), f"not refused: {child.last_line}")
    kept = sorted(path.name for path in (trial.run / "checkpoints").iterdir())
    trial.expect(kept == [f"damaged-{folder.name}" for folder in folders], f"kept: {kept}")
    trial.ended(trial.start(), (2,))  # repeated, it does not start again from nothing either


def _ranks_of(kind: str, size: int) -> str:
    return "0,1" if kind == "explosion" else str(size - 1)


def skipped_updates(kind: str, count: int) -> Work:
    """Some updates are skipped and counted; killed on the way, the run ends with the same result."""

    def work(trial: Trial) -> None:
        first = trial.draw.randint(3, STEPS - 6)
        program, ranks = f"spoil({kind!r}, {first}, {first + count})", _ranks_of(kind, trial.size)
        child = trial.start(program, ranks)
        trial.ended(child, (0,))
        trial.disturbed += count
        trial.look_through()
        skipped = sum(line.get("skipped", 0) for line in intact.metrics(trial.run))
        trial.expect(skipped == count, f"{skipped} counted of {count}: {child.text[-400:]}")
        warnings = child.text.count("WARNING: step ")
        trial.expect(warnings == count, f"{warnings} warnings of {count}")
        undisturbed = intact.outcome(trial.run)
        trial.restart()
        child = trial.start(_SLOW + program, ranks)
        trial.wait_for_step(child, first + trial.draw.randint(0, count))
        _kill(child)
        newest = trial.look_through(child)
        child = trial.start(program, ranks)
        trial.ended(child, (0,))
        if (at := intact.resumed_at(child.text)) != newest:
            trial.wrong.append(f"resumed at step {at}, not at {newest}")
        trial.compare(undisturbed)

    return work


def only_skipped_updates(kind: str) -> Work:
    """From some step on every update is skipped: the run stops and names the last good checkpoint."""

    def work(trial: Trial) -> None:
        # No validation comes in between, as it would save a checkpoint after skipped updates.
        firsts = [n for n in range(VALID_EVERY + 1, STEPS - 6) if (n + 1) % VALID_EVERY and (n + 2) % VALID_EVERY]
        first, settings = trial.draw.choice(firsts), {"training__max_skipped_steps": 3}
        program, ranks = f"spoil({kind!r}, {first}, {10**9})", _ranks_of(kind, trial.size)
        child = trial.start(program, ranks, checkpoint__every_seconds=1000, **settings)
        trial.ended(child, (2,))
        trial.disturbed += 3
        newest, last = trial.look_through(child), child.last_line
        found = re.search(r"the last good checkpoint is that of step (\d+)", last)
        trial.expect(found and int(found[1]) == newest and newest <= first, f"newest is {newest}: {last}")
        trial.expect(last.startswith("moe-lm: 3 updates in a row"), last)
        trial.finish(newest)

    return work


WHILE_WRITING, BEFORE_A_SAVE, LINES = "while a file is written", "before a save", "lines"


def disk_full(when: str, *, room_again: bool) -> Work:
    """The disk fills up while a checkpoint is written, just before, or while only metrics.jsonl grows."""
    settings = {"checkpoint__every_seconds": 1000} if when == LINES else {}
    message = "its lines wait in memory" if when == LINES else "cannot write checkpoint"

    def work(trial: Trial) -> None:
        with small_disk(trial) as disk:
            child = trial.start(_SLOW + ("unaware_of_full_disk()" if when == WHILE_WRITING else ""), **settings)
            trial.wait_for_step(child, trial.draw.randint(7, 9) if when == LINES else trial.draw.randint(3, STEPS // 2))
            child.wait(until=lambda: when != LINES or bool(intact.steps(trial.run)))
            fill(disk, trial.draw.randrange(60_000) if when == WHILE_WRITING else 0)
            trial.disturbed += 1
            child.wait(until=lambda: trial.at_step(0) and message in child.text)
            trial.expect(message in child.text, f"it does not log this: {child.text[-400:]}")
            if room_again:
                (disk / "ballast").unlink()
            trial.ended(child, (0,) if room_again else (2,))
            if not room_again:
                trial.expect(child.last_line.startswith("moe-lm: cannot write "), child.text[-400:])
            newest = trial.look_through(child)
            (disk / "ballast").unlink(missing_ok=True)
            trial.compare() if room_again else trial.finish(newest)

    return work
