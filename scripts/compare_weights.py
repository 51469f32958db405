"""Compares what two checkouts of this project train, to prove that a refactoring leaves every bit as it was.

    python scripts/compare_weights.py ../before . --cases 'gshard|wide' --processes 1

Short trainings run on a CPU through the command line of each checkout, one after the other in one Python process, in a
temporary folder. A case is equal if the last checkpoint's weights, the optimizer's state in it and the perplexities
of result.json agree exactly; a training that fails, in either checkout, makes its case different. The exit code is 1 if
any case differs. Names of tensors, files and modules do not count, and both checkouts get the keys of 5ce4160.

NUMBA_DISABLE_JIT=1 is set for both. It switches off the compiled loops that 5ce4160 runs on large tensors: in the last
bits, their results differ from those of torch's operators. The cases `wide` and `many_experts` are large enough for
these loops.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from safetensors import deserialize

_TINY = shlex.split(
    "model=moe_4 model.width=8 model.expert_hidden=8 model.num_experts=6 model.k=2 model.dropout=0.1 corpus=text "
    "corpus.train=[text/train.txt] corpus.valid=[text/valid.txt] corpus.test=[text/test.txt] vocabulary.min_count=1 "
    "softmax.num_sampled=16 batch.words=200 batch.micro_words=100 training.num_words=1000 training.log_every=3 "
    "training.valid_every=3 valid.max_sentences=10 schedule.warmup_steps=5 optimizer.learning_rate=0.01 "
    "checkpoint.keep_last=1 machine.device=cpu machine.threads=1"
)
"""Five updates of two micro-batches each, with noise and dropout."""
_GATES = {
    "noisy_top_k": "balance=[importance,load]",
    "strictly_balanced": "balance=[batchwise]",
    "top_k": "balance=[switch,z_loss]",
    "gshard": "balance=[gshard]",
    "switch": "balance=[switch,importance] model.k=1",
    "expert_choice": "balance=[z_loss]",
    "expert_choice_max_3": "balance=[z_loss]",
    "loss_free": "balance=[switch]",
    "sinkhorn": "balance=[]",
}
_MIDDLE = "model.layers.middle"
_HIERARCHY = f"layer@{_MIDDLE}=hierarchical_moe model.num_experts=16 model.num_groups=4"
_FULL = "softmax=full softmax.num_sampled=-"
_LARGE = "batch.words=1200 batch.micro_words=600 training.num_words=3600 model.num_experts=4 model.k=4"
_MORE = {
    1: {
        "sinkhorn_of_one": f"gate@{_MIDDLE}.gate=sinkhorn balance=[] model.k=1",
        "factored": "optimizer.experts=factored",
        "factored_hierarchical": f"optimizer.experts=factored {_HIERARCHY}",
        "dense_vocabulary": "optimizer.vocabulary=dense",
        "recompute": "machine.recompute=true",
        "feed_forward": f"layer@{_MIDDLE}=feed_forward model.num_experts=- model.k=- balance=[]",
        "feed_forward_deep": f"layer@{_MIDDLE}=feed_forward_deep model.num_experts=- model.k=- balance=[]",
        "projected_lstm": "layer@model.layers.lower=lstm_projected model.lstm_units=12",
        "subwords": "vocabulary=subwords vocabulary.size=280 vocabulary.min_count=-",
        "one_micro_batch": "batch.micro_words=200",
        "many_micro_batches": "batch.micro_words=30",
        "inexact_balance": "balance.exact=false batch.micro_words=50",
        "bfloat16": "machine.precision=bfloat16",
        "two_threads": f"machine.threads=2 model.width=256 model.expert_hidden=1024 {_LARGE}",
        "wide": f"model.width=128 model.expert_hidden=128 {_LARGE}",
        "many_experts": f"{_LARGE} model.num_experts=512",
    },
    2: {
        "divided_vocabulary": "machine.divide_vocabulary=true",
        "divided_vocabulary_full": f"machine.divide_vocabulary=true {_FULL}",
        "copied_experts": "machine.expert_processes=1",
        "factored_hierarchical": f"optimizer.experts=factored {_HIERARCHY}",
    },
}
"""Further cases, by the number of processes; a key whose value is `-` is omitted."""
_PROGRAM = """
import json, os, signal, sys, traceback
from pathlib import Path
import moe_lm
from moe_lm.__main__ import main
assert Path(moe_lm.__file__).resolve().is_relative_to(sys.argv[1]), moe_lm.__file__
handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
for name, arguments in json.load(sys.stdin).items():
    log = os.open(f"{name}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2), os.close(log)
    try:
        main(["train", *arguments, f"name={name}"])
    except (Exception, SystemExit):
        traceback.print_exc()
    for number in handlers: signal.signal(number, handlers[number])
"""
"""Trains all cases; the output of each goes to a file of its own."""


def main() -> int:
    """Train every case in both checkouts, compare, and return the exit code."""
    options = _options()
    cases = {name: case for name, case in _cases(options.processes) if re.search(options.cases, name)}
    found, different = [], 0
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        for number, checkout in enumerate((options.before, options.after)):
            found.append(_trained(checkout.resolve(), Path(temporary) / str(number), cases))
            print(f"{checkout}: {len(cases)} trainings", flush=True)
    for name in cases:
        parts = _differing(found[0][name], found[1][name])
        different += bool(parts)
        print(f"DIFFERENT  {name}: {parts}" if parts else f"equal      {name:<42} {found[0][name]['weights'][:16]}")
    print(f"{len(cases)} cases: {len(cases) - different} equal, {different} different")
    return int(different > 0 or not cases)


def hashes(run: Path) -> dict[str, str]:
    """Return hashes of what must be equal in a finished run; raises `OSError` or `ValueError` if it is not finished."""
    last = max((run / "checkpoints").glob("[0-9]*"))
    perplexity = json.dumps(json.loads((run / "result.json").read_text())["perplexity"], sort_keys=True)
    return {"weights": _hash(last / "model"), "optimizer": _hash(last / "optimizer"), "perplexity": perplexity}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the other checkout")
    parser.add_argument("--cases", default="", metavar="PATTERN", help="regular expression to find in the cases' names")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="numbers of processes")
    return parser.parse_args()


def _cases(processes: list[int]) -> Iterator[tuple[str, list[str]]]:
    """Yield names and overrides; with two processes, which start slowly, only one softmax per gate and layer."""
    for size in sorted(set(processes)):
        for number, (gate, layer, softmax) in enumerate(product(_GATES, ("flat", "hierarchical"), ("sampled", "full"))):
            if size == 1 or number % 8 in (0, 3, 5, 6):
                changes = f"{_gate(gate, layer)} {_FULL if softmax == 'full' else ''}"
                yield f"{gate}-{layer}-{softmax}-{size}", _overrides(changes, size)
        for name, changes in _MORE[size].items():
            yield f"{name}-{size}", _overrides(changes, size)


def _gate(gate: str, layer: str) -> str:
    """Return the overrides of a gate in a flat mixture, or at both levels of a hierarchical one."""
    changes = f"{_HIERARCHY if layer == 'hierarchical' else ''} {_GATES[gate]}"
    for level in ("gate",) if layer == "flat" else ("primary_gate", "gate"):
        changes += f" gate@{_MIDDLE}.{level}={gate.removesuffix('_max_3')}"
        changes += f" {_MIDDLE}.{level}.max_experts=3" if gate.endswith("_max_3") else ""
    return changes


def _overrides(changes: str, size: int) -> list[str]:
    """Return all overrides; of several for one key, only the last."""
    given = dict(text.split("=") for text in [*_TINY, *shlex.split(changes), f"num_processes={size}"])
    return [f"{key}={value}" for key, value in given.items() if value != "-"]


def _trained(checkout: Path, folder: Path, cases: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """Train all cases with one checkout in a new folder; return the hashes of each, or the last line of its log."""
    _write_text(folder / "text")
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", _PROGRAM, checkout], cwd=folder, env=env, input=json.dumps(cases), text=True)
    found = {}
    for name in cases:
        try:
            found[name] = hashes(folder / "runs" / name)
        except (OSError, ValueError):
            log = folder / f"{name}.log"
            found[name] = {"failed": log.read_text().strip().rpartition("\n")[2] if log.exists() else "not begun"}
    return found


def _differing(before: dict[str, str], after: dict[str, str]) -> str:
    """Return which parts differ, or why there is nothing to compare; empty where all are equal."""
    failed = [f"{which} failed: {x['failed']}" for which, x in (("BEFORE", before), ("AFTER", after)) if "failed" in x]
    return "; ".join(failed) or ", ".join(key for key in before if before[key] != after[key])


def _hash(folder: Path) -> str:
    """Return a hash of a folder's tensors, whatever their order and files; each shard counts as a tensor."""
    tensors = [tensor for file in folder.glob("*.safetensors") for _, tensor in deserialize(file.read_bytes())]
    if not tensors:
        raise ValueError(f"{folder} holds no tensor")
    texts = [f"{x['dtype']} {list(x['shape'])} {hashlib.sha256(x['data']).hexdigest()}" for x in tensors]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def _write_text(folder: Path) -> None:
    """Write sentences of at most 15 words, drawn from a vocabulary of 50, some of them frequent."""
    folder.mkdir(parents=True)
    draw = random.Random(1)
    for split, count in {"train": 300, "valid": 40, "test": 40}.items():
        sizes = [draw.randint(1, 15) for _ in range(count)]
        sentences = [" ".join(f"w{draw.randrange(draw.randint(1, 50))}" for _ in range(size)) for size in sizes]
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")


if __name__ == "__main__":
    sys.exit(main())
