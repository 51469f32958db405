"""What killed processes, damaged files, full disks and faulty updates leave of tiny trainings: nothing may be lost.

    python scripts/fault_campaign.py --markdown docs/results/faults.md

Trains undisturbed on one and on two processes, then starts runs with the real command line, does something to each,
looks through its checkpoints, repeats the command to the end and compares with the undisturbed run, bit for bit. Prints
a table, and every failure; ends with 1 where a checkpoint was lost, a resume was wrong or a promise was not kept.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from faults import cases, programs
from faults.trial import Site, Trial, Work

_COLUMNS = ("fault", "processes", "runs", "times disturbed", "checkpoints lost", "wrong resumes", "promises broken")


@dataclass(frozen=True)
class Case:
    """Something to do to a run; those of one kind and number of processes are a line of the table."""

    kind: str
    size: int
    detail: str
    work: Work
    quick: bool = False
    """Whether it is part of a short campaign."""

    @property
    def line(self) -> str:
        """What names it."""
        return f"{self.kind}, {self.detail}, {self.size}"


def main() -> int:
    """Run the campaign; return the exit code."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        site = Site(folder, options.program.read_text() if options.program else "")
        options.mounts = cases.may_mount(folder)
        chosen = [case for case in _cases(options) if any(text in case.line for text in options.only)]
        started = time.monotonic()
        site.prepare(sorted({case.size for case in chosen}))
        trials = _run_all(site, chosen, options)
    table, sums = _table(trials)
    if not options.mounts:
        table += "\n\nNot run: a full disk, because this user may not mount one."
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
    parser.add_argument("--folder", type=Path, help="to work in, kept afterwards; a temporary one if none is named")
    parser.add_argument(
        "--kills", type=int, default=50, help="runs killed at random moments, three tenths on two processes"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--only", nargs="*", default=[""], help="cases with one of these texts in their line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--program", type=Path, help="Python text run first in every disturbed run: breaks the product")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the table with what it was made by")
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> list[Case]:
    found = []
    of_two = options.kills * 3 // 10
    for size, kills in ((1, options.kills - of_two), (2, of_two)):
        found += [Case("SIGKILL at a random moment", size, "", cases.killed_at_random, True) for _ in range(kills)]
        for number, place in enumerate(programs.PLACES):
            rank = str(number % size) if place in programs.ON_EVERY_RANK else "0"
            quick = size == 1 and place == "in the middle of prune"
            work = cases.killed_in_a_save(place, rank)
            found.append(Case("SIGKILL inside a save", size, f"{place}, rank {rank}", work, quick))
        for number, to in ((signal.SIGTERM, None), (signal.SIGUSR1, None if size == 1 else str(size - 1))):
            work, quick = cases.signalled(number, to), size == 1 and number == signal.SIGTERM
            found.append(Case("SIGTERM, SIGUSR1", size, f"{number.name} to {to or 'what was started'}", work, quick))
        for name in list(cases.CORRUPTIONS)[:: size**3]:
            quick = size == 1 and name == "bit of the model"
            found.append(Case("damaged checkpoint", size, name, cases.corrupted(name), quick))
        found.append(Case("all checkpoints damaged", size, "", cases.all_corrupted))
        for kind, count in (("loss", 1), ("gradient", 3), ("explosion", 2))[size - 1 :]:
            found.append(Case("updates without a loss", size, kind, cases.faulty_updates(kind, count)))
        kind = "loss" if size == 1 else "gradient"
        found.append(Case("no update with a loss", size, kind, cases.only_faulty_updates(kind), size == 1))
        if options.mounts:
            found += _by_disk(size)
        for other in (1, 2)[size - 1 :]:
            found.append(Case("second command on a run", size, f"of {other}", cases.second_process(other)))
    found += [Case("launcher killed", 2, "", cases.launcher_killed) for _ in range(2)]
    found += [Case("rank killed under torchrun", 2, "", cases.torchrun_restarts) for _ in range(2)]
    return [case for case in found if case.quick or not options.quick]


def _by_disk(size: int) -> list[Case]:
    found = []
    for room_again in (False, True):
        after = "room again" if room_again else "it stays full"
        for unaware in (True, False) if size == 1 else (True,):
            work = cases.disk_full_in_a_save(unaware=unaware, room_again=room_again)
            when = "while a file is written" if unaware else "before a save"
            quick = size == 1 and unaware and not room_again
            found.append(Case("full disk, checkpoints", size, f"{when}, {after}", work, quick))
        work = cases.disk_full_for_lines(room_again=room_again)
        found.append(Case("full disk, lines", size, after, work))
    return found


def _run_all(site: Site, chosen: list[Case], options: argparse.Namespace) -> list[tuple[Case, Trial]]:
    told, done = threading.Lock(), []

    def run(numbered: tuple[int, Case]) -> tuple[Case, Trial]:
        number, case = numbered
        trial = Trial(site, f"run-{number:03d}", case.size, random.Random(f"{options.seed}, {number}"))
        try:
            case.work(trial)
        except Exception:  # a fault of the campaign itself must not pass for a good run
            trial.unexpected.append(traceback.format_exc())
        finally:
            trial.close()
        with told:
            done.append(trial)
            bad = [*trial.lost, *trial.wrong, *trial.unexpected]
            state = "; ".join(" ".join(text.split()) for text in bad) or "ok"
            print(f"{len(done)}/{len(chosen)} {trial.name} {case.line}: {state}", flush=True)
        return case, trial

    # Kinds mixed: a campaign broken off has seen some of each.
    numbered = list(enumerate(chosen, 1))
    random.Random(options.seed).shuffle(numbered)
    with ThreadPoolExecutor(options.run_parallel) as pool:
        return sorted(pool.map(run, numbered), key=lambda pair: pair[1].name)


def _table(trials: list[tuple[Case, Trial]]) -> tuple[str, dict[str, int]]:
    groups: dict[tuple[str, int], list[Trial]] = {}
    for case, trial in trials:
        groups.setdefault((case.kind, case.size), []).append(trial)
    rows = []
    for (kind, size), group in groups.items():
        row = [kind, size, len(group), sum(trial.disturbed for trial in group)]
        row += [sum(len(getattr(trial, what)) for trial in group) for what in ("lost", "wrong", "unexpected")]
        slowest = max(trial.seconds_to_end for trial in group)
        rows.append([*row, f"all processes over {slowest:.0f} s after a kill, at most" if slowest else ""])
    sums = dict(zip(_COLUMNS[2:], (sum(row[i] for row in rows) for i in range(2, len(_COLUMNS))), strict=True))
    lines = ["| " + " | ".join([*_COLUMNS, "notes"]) + " |", "|---" + "|---:" * (len(_COLUMNS) - 1) + "|---|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.append("| **all** | | " + " | ".join(f"**{number}**" for number in sums.values()) + " | |")
    return "\n".join(lines), sums


def _record(trials: list[tuple[Case, Trial]], options: argparse.Namespace) -> dict:
    runs = [
        {"fault": case.kind, "detail": case.detail, "processes": case.size, "name": trial.name}
        | {key: getattr(trial, key) for key in ("disturbed", "lost", "wrong", "unexpected", "seconds_to_end")}
        for case, trial in trials
    ]
    return {"runs": runs, "seed": options.seed, "commit": _commit(), "torch": torch.__version__}


def _page(table: str, minutes: float) -> str:
    command = " ".join(["python", "scripts/fault_campaign.py", *sys.argv[1:]])
    return f"""# Faults, counted

Each line is a kind of fault and a number of processes: tiny trainings with a checkpoint after nearly every step were
started by the real command line, disturbed, looked through, repeated by the same command to their end, and compared
with an undisturbed run. A checkpoint is lost where one that was complete is gone (and was not due to be deleted) or is
not what was written; a resume is wrong where it starts from another step than the newest intact checkpoint or ends with
another bit in a tensor, a line of metrics.jsonl or a perplexity; a promise is an exit code, a message, an end in time.

{table}

```sh
{command}
```

{minutes:.0f} minutes on {_machine()}; Python {platform.python_version()}, torch {torch.__version__},
commit {_commit()}.
"""


def _machine() -> str:
    models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{platform.platform()}, {models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    here = Path(__file__).parent
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
