"""Plants one fault after another in a copy of the source, and records which test finds it.

    python scripts/planted_faults.py --out now.json
    python scripts/planted_faults.py --checkout ../before --then --out then.json    # of commit 5ce4160
    python scripts/planted_faults.py --table then.json now.json > docs/results/planted_faults.md

The faults are in planted_faults.yaml. The tests of a fault's area run until the first fails; where none does, all tests
run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import yaml

FAULTS = Path(__file__).with_suffix(".yaml")
TESTS = {
    "gates": "gate balance loss layer model kernels ops",
    "losses": "loss balance softmax ops/test_cross_entropy.py kernels/test_cross_entropy.py training train gate",
    "batching": "data vocabulary training train",
    "optimizer": "optim optimizer test_schedule.py test_rows.py train training ops kernels",
    "model": "model layer test_model.py ops mixture kernels train training",
    "checkpoint": "checkpoint storage test_resume.py train training test_wrong_inputs.py "
    "analysis/test_evaluate_score.py evaluation/test_evaluate_score.py",
    "distributed": "parallel/test_parallelize.py parallel/test_launch.py parallel/test_one_update_on_many.py "
    "parallel/test_bytes_sent.py parallel/test_resume_on_other_numbers.py distributed/test_launch.py "
    "distributed/test_one_update_on_many.py distributed/test_bytes_sent.py distributed/test_resume_on_other_numbers.py",
    "evaluation": "analysis evaluation inspection costs",
}
"""Tests of each area, in this version and in 5ce4160; names that a checkout lacks are left out."""
TIMEOUT = 1800
"""Seconds after which a fault counts as found, because the tests hang."""


def main() -> None:
    """Run the faults, or print the table of two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=FAULTS.parents[1], help="source tree (default: this one)")
    parser.add_argument("--then", action="store_true", help="the checkout is of commit 5ce4160")
    parser.add_argument("--only", default="", help="run the faults whose area or description contains this text")
    parser.add_argument("--quick", action="store_true", help="leave out all tests where those of the area find nothing")
    parser.add_argument("--processes", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="JSON file that gets the results; those already there are kept")
    parser.add_argument("--table", type=Path, nargs=2, metavar="JSON", help="print the table of two result files")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would tests
    if options.table:
        print(table(*(json.loads(path.read_text()) for path in options.table)))
    else:
        run(options)


def faults(then: bool) -> list[dict]:
    """Return the faults, each with its area; with `then` as they are in 5ce4160, without those that it lacks."""
    by_area = yaml.safe_load(FAULTS.read_text())
    found = [{"area": area, **fault} for area, some in by_area.items() for fault in some]
    if not then:
        return found
    return [{**fault, **fault.get("then", {})} for fault in found if fault.get("then", {}) is not None]


def run(options: argparse.Namespace) -> None:
    """Run the faults that have no result yet, each in a copy of the checkout; write the results after each."""
    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    chosen = [fault for fault in faults(options.then) if fault["fault"] not in results]
    chosen = [fault for fault in chosen if options.only in f"{fault['area']} {fault['fault']}"]
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(names, cwd=options.checkout, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.processes):
            copies.put(copied(options.checkout, files, Path(folder) / str(number)))
        for fault, found in zip(chosen, pool.map(lambda f: found_by(f, copies, options), chosen), strict=True):
            print(f"{fault['area']}: {fault['fault']}: {found or 'NOT FOUND'}", flush=True)
            results[fault["fault"]] = found
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


def copied(checkout: Path, files: list[str], copy: Path) -> Path:
    """Copy the files of a checkout."""
    for name in files:
        if (checkout / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / name, copy / name)
    return copy


def found_by(fault: dict, copies: SimpleQueue, options: argparse.Namespace) -> str | None:
    """Return the first test that fails with the fault, None if all pass."""
    copy = copies.get()
    file = copy / fault["file"]
    text = file.read_text()
    try:
        if text.count(fault["line"]) != 1:
            raise SystemExit(f"{fault['fault']}: {fault['file']} does not have this text once: {fault['line']}")
        file.write_text(text.replace(fault["line"], fault["broken"]))
        area = [copy / "tests" / name for name in TESTS[fault["area"]].split()]
        files = [file for path in area for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
        tests = [str(file.relative_to(copy)) for file in files if file.exists()]
        # The tests that are named after the file come first, because they find most faults within seconds.
        words = set(Path(fault["file"]).stem.split("_"))
        likely = [test for test in tests if words & set(Path(test).stem.split("_"))]
        stages = (likely, [test for test in tests if test not in likely], [] if options.quick else ["tests"])
        select = [] if options.then else ["-m", "not slow"]  # that commit has no slow tests
        return next((found for stage in stages if stage and (found := first_failure(copy, [*select, *stage]))), None)
    finally:
        file.write_text(text)
        copies.put(copy)


def first_failure(copy: Path, arguments: list[str]) -> str | None:
    """Run pytest with these arguments until a test fails; return the test's name."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-rfE", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "the tests hang"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def table(then: dict[str, str | None], now: dict[str, str | None]) -> str:
    """Return the Markdown table of two runs, a row for each fault."""
    rows = ["| area | fault | found at 5ce4160 by | found now by |", "| --- | --- | --- | --- |"]
    known = {fault["fault"] for fault in faults(then=True)}
    for fault in faults(then=False):
        name = fault["fault"]
        before = _cell(then, name) if name in known else "no such line"
        rows.append(f"| {fault['area']} | {name} | {before} | {_cell(now, name)} |")
    return "\n".join(rows)


def _cell(results: dict[str, str | None], name: str) -> str:
    if name not in results:
        return "not run"
    found = results[name]
    return "**not found**" if found is None else f"`{found.removeprefix('tests/')}`" if "::" in found else found


if __name__ == "__main__":
    main()
