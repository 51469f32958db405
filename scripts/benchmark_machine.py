"""The two ceilings of a machine, and what an expert's product reaches between them.

    python scripts/benchmark_machine.py --threads 1

Prints products of large square matrices, a copy in memory (bytes read and written), and the product of an expert's rows
with its matrix: one matrix again and again, in the cache, and many in turn, each read from memory. With --json writes
them.
"""

import argparse

import torch
from measuring import new_file, positive, product_ceiling, run, seconds_of, write_record

from moe_lm.cli.machine import device, keep_memory

_ROUNDS = 5


def main() -> None:
    """Measure, each the best of some rounds."""
    options = _options()
    on = device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_memory()
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    found = {
        "product_flops_per_second": product_ceiling(on, dtype, options.square),
        "copy_bytes_per_second": _copy(options.copy_mib << 20, on),
        "expert_in_cache_flops_per_second": _expert(options, 1, on, dtype),
        "expert_from_memory_flops_per_second": _expert(options, options.matrices, on, dtype),
    }
    for name, rate in found.items():
        print(f"{name:<38} {rate / 1e9:10,.1f} G")
    sizes = {key: value for key, value in vars(options).items() if key != "json"}
    write_record(options.json, on, found | {"options": sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=128, help="of an expert")
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--matrices", type=positive, default=256)
    parser.add_argument("--square", type=positive, default=2048)
    parser.add_argument("--copy-mib", type=positive, default=512)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


def _copy(num_bytes: int, on: torch.device) -> float:
    source = torch.ones(num_bytes // 4, device=on)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best(lambda: target.copy_(source), on)


def _expert(options: argparse.Namespace, different: int, on: torch.device, dtype: torch.dtype) -> float:
    w_EDH = torch.randn(different, options.width, options.hidden, device=on, dtype=dtype)
    x, h = (torch.ones(options.rows, size, device=on, dtype=dtype) for size in (options.width, options.hidden))
    matrices = [w_EDH[i % different] for i in range(options.matrices)]

    def work() -> None:
        for w in matrices:
            torch.mm(x, w, out=h)

    return 2 * options.matrices * options.rows * options.width * options.hidden / _best(work, on)


def _best(work, on: torch.device) -> float:
    seconds_of(work, on)
    return min(seconds_of(work, on) for _ in range(_ROUNDS))


if __name__ == "__main__":
    run(main)
