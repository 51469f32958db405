"""Disturbs tiny trainings with killed processes, damaged files, full disks and failed updates: nothing may be lost.

    python scripts/fault_campaign.py --markdown docs/results/faults.md

Trains undisturbed on one and on two processes, then starts runs with the real command line, disturbs each, inspects its
checkpoints, repeats the command to the end and compares with the undisturbed run, bit for bit. Prints a table and every
failure; exits with 1 if a checkpoint was lost, a resume was wrong or a promise was not kept.
"""

import argparse
import json
import platform
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import commit, machine
from faults import cases, small_disk
from faults.corruptions import CORRUPTIONS
from faults.inject.injected import PLACES
from faults.trial import Site, Trial, Work

_COLUMNS = {
    "runs": lambda trial: 1,  # noqa: ARG005
    "times disturbed": lambda trial: trial.disturbed,
    "checkpoints lost": lambda trial: len(trial.lost),
    "wrong resumes": lambda trial: len(trial.wrong),
    "promises broken": lambda trial: len(trial.unexpected),
}


@dataclass(frozen=True)
class Case:
    """One disturbance; the cases of one kind and number of processes share a row of the table."""

    kind: str
    size: int
    """Number of processes."""
    detail: str
    work: Work
    quick: bool = False
    """Whether --quick includes it."""

    @property
    def name(self) -> str:
        """Return the case's unique name."""
        return f"{self.kind}, {self.detail}, {self.size}"


def main() -> int:
    """Run the campaign; return the exit code."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        site = Site(folder, options.program.read_text() if options.program else "")
        may_mount = small_disk.may_mount(folder)
        found = [case for case in _cases(options.kills, may_mount) if case.quick or not options.quick]
        chosen = [case for case in found if any(text in case.name for text in options.only)]
        started = time.monotonic()
        site.prepare(sorted({case.size for case in chosen}))
        trials = _run_all(site, chosen, options)
    table, sums = _table(trials)
    table += "" if may_mount else "\n\nNot run: full disks, because this user may not mount a file system."
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table}\n\n{minutes:.0f} minutes")
    for case, trial in trials:
        for kind in ("lost", "wrong", "unexpected"):
            for text in getattr(trial, kind):
                print(f"{kind.upper()} {trial.name} ({case.kind}, {case.detail}): {text}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(_record(trials, options) | {"sums": sums}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(_page(table, minutes))
    return int(bool(sums["checkpoints lost"] or sums["wrong resumes"] or sums["promises broken"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="working folder, which is kept; default: a temporary one")
    parser.add_argument("--kills", type=int, default=50, help="runs killed at random, three tenths on two processes")
    parser.add_argument("--quick", action="store_true", help="run only a few cases of each kind")
    parser.add_argument("--only", nargs="*", default=[""], help="run only cases with one of these texts in their name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--program", type=Path, help="Python file to run first in every disturbed run, to break moe_lm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="file for the table and how it was made")
    return parser.parse_args()


def _cases(kills: int, may_mount: bool) -> Iterator[Case]:
    of_two = kills * 3 // 10
    for size, number_of_kills in ((1, kills - of_two), (2, of_two)):
        one = size == 1
        for _ in range(number_of_kills):
            yield Case("SIGKILL at a random moment", size, "", cases.killed_at_random, True)
        for number, place in enumerate(PLACES):
            rank, quick = (
                str(number % size) if PLACES[place].every_rank else "0",
                one and place == "in the middle of prune",
            )
            work = cases.killed_in_a_save(place, rank)
            yield Case("SIGKILL inside a save", size, f"{place}, rank {rank}", work, quick)
        for number, rank in ((signal.SIGTERM, None), (signal.SIGUSR1, None if one else str(size - 1))):
            detail, quick = f"{number.name} to {rank or 'the command'}", one and number == signal.SIGTERM
            yield Case("SIGTERM, SIGUSR1", size, detail, cases.signalled(number, rank), quick)
        for name in list(CORRUPTIONS)[:: size**3]:
            yield Case("damaged checkpoint", size, name, cases.corrupted(name), one and name == "bit of the model")
        yield Case("all checkpoints damaged", size, "", cases.all_corrupted)
        for kind, count in (("loss", 1), ("gradient", 3), ("explosion", 2))[size - 1 :]:
            yield Case("updates without a loss", size, kind, cases.skipped_updates(kind, count))
        kind = "loss" if one else "gradient"
        yield Case("no update with a loss", size, kind, cases.only_skipped_updates(kind), one)
        yield from _full_disks(size) if may_mount else ()
        for other in (1, 2)[size - 1 :]:
            yield Case("second command on a run", size, f"of {other}", cases.second_command(other))
    for _ in range(2):
        yield Case("launcher killed", 2, "", cases.launcher_killed)
        yield Case("rank killed under torchrun", 2, "", cases.torchrun_restarts)


def _full_disks(size: int) -> Iterator[Case]:
    for when in (cases.WHILE_WRITING, cases.LINES, *((cases.BEFORE_A_SAVE,) if size == 1 else ())):
        for room_again in (False, True):
            kind = "full disk, lines" if when == cases.LINES else "full disk, checkpoints"
            detail = f"{when}, {'room again' if room_again else 'it stays full'}"
            quick = size == 1 and when == cases.WHILE_WRITING and not room_again
            yield Case(kind, size, detail, cases.disk_full(when, room_again=room_again), quick)


def _run_all(site: Site, chosen: list[Case], options: argparse.Namespace) -> list[tuple[Case, Trial]]:
    lock, done = threading.Lock(), []

    def run(numbered: tuple[int, Case]) -> tuple[Case, Trial]:
        number, case = numbered
        trial = Trial(site, f"run-{number:03d}", case.size, random.Random(f"{options.seed}, {number}"))
        try:
            case.work(trial)
        except Exception:  # an error of the campaign itself must not pass for a good run
            trial.unexpected.append(traceback.format_exc())
        finally:
            trial.close()
        with lock:
            done.append(trial)
            failures = [*trial.lost, *trial.wrong, *trial.unexpected]
            state = "; ".join(" ".join(text.split()) for text in failures) or "ok"
            print(f"{len(done)}/{len(chosen)} {trial.name} {case.name}: {state}", flush=True)
        return case, trial

    # Shuffled, so that an interrupted campaign has run some cases of each kind.
    numbered = list(enumerate(chosen, 1))
    random.Random(options.seed).shuffle(numbered)
    with ThreadPoolExecutor(options.jobs) as pool:
        return sorted(pool.map(run, numbered), key=lambda pair: pair[1].name)


def _table(trials: list[tuple[Case, Trial]]) -> tuple[str, dict[str, int]]:
    groups: dict[tuple[str, int], list[Trial]] = {}
    for case, trial in trials:
        groups.setdefault((case.kind, case.size), []).append(trial)
    sums = {name: sum(count(trial) for _, trial in trials) for name, count in _COLUMNS.items()}
    rows = [["fault", "processes", *_COLUMNS, "notes"], ["---", *["---:"] * (1 + len(_COLUMNS)), "---"]]
    for key, group in groups.items():
        slowest = max(trial.seconds_to_end for trial in group)
        note = f"all processes ended within {slowest:.0f} s of a kill" if slowest else ""
        rows.append([*key, *(sum(map(count, group)) for count in _COLUMNS.values()), note])
    rows.append(["**all**", "", *(f"**{number}**" for number in sums.values()), ""])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows), sums


def _record(trials: list[tuple[Case, Trial]], options: argparse.Namespace) -> dict:
    runs = [
        {"fault": case.kind, "detail": case.detail, "processes": case.size, "name": trial.name}
        | {key: getattr(trial, key) for key in ("disturbed", "lost", "wrong", "unexpected", "seconds_to_end")}
        for case, trial in trials
    ]
    return {"runs": runs, "seed": options.seed, "commit": commit(), "torch": torch.__version__}


def _page(table: str, minutes: float) -> str:
    return f"""# Faults, counted

Each row is a kind of fault and a number of processes. Tiny trainings with a checkpoint after nearly every step were
started with the real command line, disturbed and inspected. Then the same command was repeated until they ended, and
they were compared with an undisturbed run. A checkpoint is lost if a complete one is gone that was not due to be
deleted, or is not what was written. A resume is wrong if it starts from a step other than that of the newest intact
checkpoint, or if any bit differs at the end in a tensor, a line of metrics.jsonl or a perplexity. A promise is an exit
code, a message, or an end within a time limit.

{table}

```sh
python scripts/fault_campaign.py {" ".join(sys.argv[1:])}
```

{minutes:.0f} minutes on {platform.platform()}, {machine(torch.device("cpu"))}; Python {platform.python_version()},
torch {torch.__version__}, commit {commit()}.
"""


if __name__ == "__main__":
    sys.exit(main())
