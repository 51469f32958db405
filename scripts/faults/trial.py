"""One disturbed run: started, disturbed, inspected, repeated to its end, compared with an undisturbed one."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from faults import intact
from faults.child import LONGEST, Child, train

_WORDS = [f"w{i}" for i in range(50)]
NUM_WORDS, SHORTER = 6000, 3600
BATCH = 200
VALID_EVERY = 7
KEEP_LAST = 3
_SOON = 120
"""Seconds within which a run must end after one of its processes was killed, on a busy machine."""

_ARGUMENTS = dict(
    pair.split("=")
    for pair in (
        "model=moe_4 model.width=8 model.expert_hidden=8 model.num_experts=4 model.k=2 corpus=text "
        "corpus.train=[text/train.txt] corpus.valid=[text/valid.txt] corpus.test=[text/test.txt] "
        "vocabulary.min_count=1 softmax.num_sampled=16 "
        f"batch.words={BATCH} batch.micro_words={BATCH // 2} training.num_words={NUM_WORDS} training.log_every=1 "
        f"training.valid_every={VALID_EVERY} valid.max_sentences=10 schedule.warmup_steps=5 "
        "optimizer.learning_rate=0.01 checkpoint.every_seconds=0 "
        f"checkpoint.keep_last={KEEP_LAST} machine.device=cpu machine.threads=1"
    ).split()
)


class Timeline(NamedTuple):
    """Seconds from the start of an undisturbed run to its first step, its last step, and its end."""

    ready: float
    trained: float
    end: float


@dataclass
class Site:
    """The folder of a campaign and the outcomes of its undisturbed runs, by number of processes."""

    folder: Path
    program: str = ""
    """Runs first in every process of the disturbed runs, to break moe_lm and so test the campaign."""
    outcomes: dict[int, dict] = field(default_factory=dict)
    timelines: dict[int, Timeline] = field(default_factory=dict)

    def prepare(self, sizes: list[int]) -> None:
        """Write the corpus, and train undisturbed with each number of processes: a whole run and a shorter one."""
        _write_corpus(self.folder / "text")
        with ThreadPoolExecutor(len(sizes)) as pool:
            list(pool.map(self._train_undisturbed, sizes))

    def _train_undisturbed(self, size: int) -> None:
        whole, shorter = (
            Trial(Site(self.folder), f"{name}-{size}", size, random.Random(0), {"training.num_words": num_words})
            for name, num_words in (("undisturbed", NUM_WORDS), ("shorter", SHORTER))
        )
        child, started, moments = whole.start(), time.monotonic(), []
        for step in (1, NUM_WORDS // BATCH):
            whole.wait_for_step(child, step)
            moments.append(time.monotonic() - started)
        child.wait()
        self.timelines[size] = Timeline(*moments, time.monotonic() - started)
        other = shorter.start()
        other.wait()
        if (child.code, other.code) != (0, 0):
            raise SystemExit(f"an undisturbed run failed:\n{child.text}{other.text}")
        self.outcomes[size] = intact.outcome(whole.run)


class Trial:
    """A run with its own name; its lists `lost`, `wrong` and `unexpected` collect the failures."""

    def __init__(self, site: Site, name: str, size: int, draw: random.Random, settings: dict | None = None):
        self.site, self.name, self.size, self.draw = site, name, size, draw
        self.arguments = _ARGUMENTS | {"num_processes": size, "name": name} | (settings or {})
        self.run = site.folder / str(self.arguments.get("runs", "runs")) / name
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self.unexpected: list[str] = []
        self.disturbed = 0
        self.seconds_to_end = 0.0
        self._seen: set[int] = set()
        self._children: list[Child] = []

    def start(self, program: str = "", ranks: str = "0,1", torchrun: bool = False, **settings: object) -> Child:
        """Start the run's command; `program` runs first in processes of these ranks, and `a__b=1` sets the key a.b."""
        log = self.site.folder / "logs" / f"{self.name}-{len(self._children)}.txt"
        arguments = self.arguments | {key.replace("__", "."): value for key, value in settings.items()}
        program, ranks = f"{self.site.program}\n{program}".strip(), ranks if program else "0,1"
        child = train(arguments, self.site.folder, log, program=program, ranks=ranks, torchrun=torchrun)
        self._children.append(child)
        return child

    def at_step(self, step: int) -> bool:
        """Note which checkpoints exist, and return whether metrics.jsonl has reached this step."""
        self._seen |= set(intact.steps(self.run))
        return intact.last_step(self.run) >= step

    def wait_for_step(self, child: Child, step: int) -> None:
        """Wait until metrics.jsonl reaches a step, or the run ends."""
        child.wait(until=lambda: self.at_step(step))

    def expect(self, fulfilled: object, otherwise: str) -> None:
        """Note a failure unless a promise was kept."""
        if not fulfilled:
            self.unexpected.append(otherwise)

    def ended(self, child: Child, codes: tuple[int, ...], seconds: float = LONGEST) -> None:
        """Wait for the end of all processes, expected within these seconds and with one of these exit codes."""
        if not child.wait(seconds, until=lambda: self.at_step(10**9)):
            self.unexpected.append(f"it did not end within {seconds:.0f} s")
            child.end()
        self.expect(child.code in codes, f"exit code {child.code}, not {codes}: {child.text[-400:]}")
        self.expect("Traceback" not in child.text, f"a traceback: {child.text[-1500:]}")

    def killed(self, child: Child) -> None:
        """Expect that, after a kill, the other processes end soon and not with success."""
        started = time.monotonic()
        self.ended(child, (-signal.SIGKILL, 1), seconds=_SOON)
        self.seconds_to_end = max(self.seconds_to_end, time.monotonic() - started)

    def look_through(self, child: Child | None = None) -> int:
        """End all processes and check that no complete checkpoint is gone or damaged; return the newest step."""
        if child is not None:
            child.end()
        there = intact.steps(self.run)
        for step in there:
            if fault := intact.fault_of(intact.folder_of(self.run, step)):
                self.lost.append(f"step {step}: {fault}")
        kept = sorted(self._seen | set(there))[-KEEP_LAST:]
        newest = intact.folder_of(self.run, there[-1]) if there else None
        if newest is not None and intact.fault_of(newest) is None and (best := intact.best_of(newest)):
            kept.append(best)
        self.lost += [f"step {step} is gone" for step in sorted(set(kept) - set(there))]
        self._seen |= set(there)
        return there[-1] if there else 0

    def finish(self, newest: int, logs: tuple[str, ...] = ()) -> None:
        """Repeat the command: it must resume from this step and end with the undisturbed run's outcome."""
        finished = intact.words_of_result(self.run) >= NUM_WORDS
        child = self.start()
        self.ended(child, (0,))
        text = child.text
        if not finished and (at := intact.resumed_at(text)) != newest:
            self.wrong.append(f"resumed at step {at}, not at {newest}")
        for words in logs:
            self.expect(words in text, f"it does not log {words!r}: {text[-600:]}")
        self.compare()

    def compare(self, reference: dict | None = None) -> None:
        """Compare the finished run with the undisturbed one."""
        self.look_through()
        reference = self.site.outcomes[self.size] if reference is None else reference
        try:
            found = intact.outcome(self.run)
        except (OSError, ValueError, LookupError) as error:
            self.wrong.append(f"the run left no result ({error!r})")
            return
        self.wrong += [f"{part} differ" for part in reference if found[part] != reference[part]]
        left = [path.name for path in (self.run / "checkpoints").glob(".*")]
        self.expect(not left, f"left behind: {left}")

    def restart(self) -> None:
        """Delete the run, to start again from nothing."""
        shutil.rmtree(self.run, ignore_errors=True)
        self._seen = set()

    def copy_of_shorter(self) -> None:
        """Begin with a copy of the finished, shorter run."""
        shutil.copytree(self.site.folder / "runs" / f"shorter-{self.size}", self.run)

    def close(self) -> None:
        """End all processes, and delete the run unless something failed."""
        for child in self._children:
            child.end()
        if not (self.lost or self.wrong or self.unexpected):
            shutil.rmtree(self.run, ignore_errors=True)


Work = Callable[[Trial], None]
"""Disturbs a run and checks what follows."""


def _write_corpus(folder: Path) -> None:
    """Write sentences in which each word is followed by one of four."""
    draw = random.Random(1)
    followers = {word: draw.sample(_WORDS, 4) for word in _WORDS}
    folder.mkdir(parents=True)
    for split, count in {"train": 300, "valid": 40, "test": 40}.items():
        sentences = []
        for _ in range(count):
            words = [draw.choice(_WORDS)]
            while len(words) < 20 and draw.random() > 0.12:
                words.append(draw.choice(followers[words[-1]]))
            sentences.append(" ".join(words))
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")
