"""A training step in parts whose times add up, and the share of the step inside matrix products.

    python scripts/benchmark_step.py --model moe_256 --words 8192 --threads 2 --profile

Marks in the forward and the backward pass divide the step into parts, one after another, so that their times sum to the
step's time. --profile counts, with torch's profiler, the time inside matrix products and LSTM kernels alone. Prints the
step that took the median time; --json writes it to a file.
"""

import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import synthetic
import torch
from benchmarking import parse, parser, positive, product_ceiling, run, seconds_of, synchronize, write_record
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from moe_lm.analysis.cost import flops_per_word
from moe_lm.gate import Gate
from moe_lm.loss.objective import Objective
from moe_lm.model.lstm import Lstm, ProjectedLstm
from moe_lm.model.moe import Experts
from moe_lm.ops import experts as experts_cpu
from moe_lm.ops import experts_gpu
from moe_lm.train.trainer import Trainer

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "_grouped_mm", "mv", "addmv", "linear", "mkldnn_linear")
_LSTMS = ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn", "_cudnn_rnn_backward", "_thnn_fused_lstm_cell")
_STEPS = "the steps"
"""Name of the profiled region."""

_Ends = tuple[str, str]
"""The parts that end where a module's pass begins and where it ends."""


def main() -> None:
    """Measure the steps of one model."""
    made = parser(__doc__, "overrides", "threads", "square", words=8192, vocabulary=20_000)
    made.add_argument("--model", default="moe_256", help="a preset of configs/model")
    made.add_argument("--steps", type=positive, default=7)
    made.add_argument("--profile", action="store_true", help="count the time inside products and LSTM kernels")
    options = parse(made)
    prepared = synthetic.data(options.vocabulary, 60 * options.words)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"model={options.model}", f"batch.words={options.words}", f"batch.micro_words={options.words}"]
        overrides += options.overrides
        trainer = synthetic.trainer(overrides, prepared, Path(folder) / "step", threads=options.threads)
        device = trainer.model.device
        for _ in range(2):  # the first steps also allocate memory
            synthetic.step(trainer)
        unmarked = [seconds_of(lambda: synthetic.step(trainer), device) for _ in range(options.steps)]
        seconds, num_words, parts = _timed(trainer, device, options.steps)
        profiled = _profiled(trainer, device) if options.profile else None
    found = {
        "parts": parts,
        "seconds": seconds,
        "unmarked_seconds": statistics.median(unmarked),
        "words_per_second": num_words / seconds,
        "flops_per_second": flops_per_word(trainer.model) * num_words / seconds,
        "product_flops_per_second": product_ceiling(device, options.square),
    }
    _print(found, profiled)
    write_record(options, device, found | {"profile": profiled})


class _TimeLine:
    """The moments at which the parts of a step end."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.threads = 1
        """Number of threads that compute experts at this moment."""
        self.begin()

    def begin(self) -> None:
        """Forget everything; the first part begins now."""
        self._moments, self._inside, self.backward = [], [], False
        self.mark("")

    def mark(self, name: str) -> None:
        """End the part of this name."""
        moment = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((name, moment))

    def count_inside(self, name: str, seconds: float, of: str) -> None:
        """Move one thread's seconds from the part `of`, on which all threads work, to the part `name`."""
        self._inside.append((name, seconds / self.threads, of))

    def parts(self) -> dict[str, float]:
        """Return each part's seconds, in the order of the first ends."""
        found = defaultdict(float)
        for (_, before), (name, after) in zip(self._moments, self._moments[1:], strict=False):
            found[name] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        for name, seconds, of in self._inside:
            found[name] += seconds
            found[of] -= seconds
        return dict(found)

    def marking(self, call: Callable, name: str) -> Callable:
        """Return a function that calls `call` and then ends the part of this name."""

        def marked(*args: object, **kwargs: object) -> object:
            result = call(*args, **kwargs)
            self.mark(name)
            return result

        return marked


def _timed(trainer: Trainer, device: torch.device, steps: int) -> tuple[float, int, dict[str, float]]:
    """Return seconds, words and parts of the step that took the median time."""
    line, seen = _TimeLine(device), []
    with _marked(trainer, line):
        for _ in range(steps):
            synchronize(device)
            line.begin()
            num_words = synthetic.step(trainer)
            line.mark("rest")
            synchronize(device)
            parts = line.parts()
            seen.append((sum(parts.values()), num_words, parts))
    return sorted(seen, key=lambda step: step[0])[len(seen) // 2]


@contextmanager
def _marked(trainer: Trainer, line: _TimeLine) -> Iterator[None]:
    """Put the marks into a model and its training step."""
    step, model = trainer.train_step, trainer.model
    with ExitStack() as stack:

        def mark_after(owner: object, attribute: str, name: str) -> None:
            call = getattr(owner, attribute)
            stack.enter_context(patch.object(owner, attribute, line.marking(call, name)))

        for number, layer in enumerate(model.layers.values()):
            _mark_layer(stack, layer, line, before="embedding" if number == 0 else "between")
        _mark(stack, model.softmax, line, ("between", "softmax"), ("losses", "softmax, backward"))
        stack.callback(model.softmax.register_forward_hook(lambda *_: setattr(line, "backward", True)).remove)
        micro_batches = step._micro_batches  # a generator: the batch is complete when the generator ends
        listed = line.marking(lambda *args: list(micro_batches(*args)), "batch")
        stack.enter_context(patch.object(step, "_micro_batches", listed))
        stack.enter_context(patch.object(Objective, "__call__", line.marking(Objective.__call__, "losses")))
        mark_after(step._reducer, "finish", "embedding, backward")
        mark_after(step._reducer, "norm", "norm")
        mark_after(step.optimizer, "clip", "clip")
        mark_after(step.optimizer, "step", "optimizer")
        _mark_experts(stack, line)
        yield


def _mark_layer(stack: ExitStack, layer: nn.Module, line: _TimeLine, before: str) -> None:
    if not layer.gates():
        name = "LSTM" if isinstance(layer, Lstm | ProjectedLstm) else "layer"
        _mark(stack, layer, line, (before, name), ("between, backward", f"{name}, backward"))
        return
    _mark(stack, layer, line, (before, "combine"), ("between, backward", "gate, backward"))
    for module in layer.modules():
        if isinstance(module, Experts):
            _mark(stack, module, line, ("gate", "experts"), ("combine, backward", "dispatch, backward"))
        elif isinstance(module, Gate):
            _mark(stack, module, line, ("gate", "gate"))


def _mark(stack: ExitStack, module: nn.Module, line: _TimeLine, forward: _Ends, backward: _Ends | None = None) -> None:
    hooks = [module.register_forward_pre_hook(lambda *_: line.mark(forward[0]))]
    hooks += [module.register_forward_hook(lambda *_: line.mark(forward[1]))]
    if backward is not None:
        hooks += [module.register_full_backward_pre_hook(lambda *_: line.mark(backward[0]))]
        hooks += [module.register_full_backward_hook(lambda *_: line.mark(backward[1]))]
    for hook in hooks:
        stack.callback(hook.remove)


def _mark_experts(stack: ExitStack, line: _TimeLine) -> None:
    """Divide the experts' autograd node into dispatch, products and combine.

    Its backward pass gathers the gradients of the expert outputs, and the tokens once more.
    """
    for module, gather, add in (
        (experts_cpu, "gather_rows", "add_rows_"),
        (experts_gpu, "gather_weighted", "sum_by_token"),
    ):
        for name, *parts in ((gather, "dispatch", "combine, backward"), (add, "combine", "dispatch, backward")):
            stack.enter_context(patch.object(module, name, _inside_experts(getattr(module, name), line, *parts)))
    backward = line.marking(experts_gpu._MoEMLP.backward, "experts, backward")  # its last operation is a product
    stack.enter_context(patch.object(experts_gpu._MoEMLP, "backward", staticmethod(backward)))
    run_parallel = experts_cpu.run_parallel

    def marked(tasks: list) -> None:
        line.threads = len(tasks)
        run_parallel(tasks)
        line.threads = 1
        line.mark(_experts(line))

    stack.enter_context(patch.object(experts_cpu, "run_parallel", marked))


def _experts(line: _TimeLine) -> str:
    return "experts, backward" if line.backward else "experts"


def _inside_experts(call: Callable, line: _TimeLine, forward: str, backward: str) -> Callable:
    """Mark a call inside the experts' node, which follows products; with several threads, count each one's seconds."""

    def marked(*args: object) -> object:
        name = backward if line.backward else forward
        if line.threads == 1:
            line.mark(_experts(line))
            return line.marking(call, name)(*args)
        started = time.perf_counter()
        result = call(*args)
        line.count_inside(name, time.perf_counter() - started, _experts(line))
        return result

    return marked


def _profiled(trainer: Trainer, device: torch.device, steps: int = 3) -> dict[str, object]:
    """Return the shares of a step inside matrix products, LSTM kernels and the largest other operators."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    all_threads = _ExperimentalConfig(profile_all_threads=not cuda)
    synchronize(device)
    with profile(activities=activities, experimental_config=all_threads) as seen, record_function(_STEPS):
        whole = seconds_of(lambda: [synthetic.step(trainer) for _ in range(steps)], device)
    self_seconds = _seconds_on(DeviceType.CPU, seen) if cuda else _thread_seconds(seen)
    shares = {key: took / whole for key, took in self_seconds.items()}
    names = {key: key.removeprefix("aten::").removeprefix("mkldnn::") for key in shares}
    kinds = {"matrix products": _PRODUCTS, "LSTM kernels": _LSTMS}
    others = Counter({key: x for key, x in shares.items() if names[key] not in _PRODUCTS + _LSTMS})
    found = {
        "seconds": whole / steps,
        "shares": {kind: sum(x for k, x in shares.items() if names[k] in keys) for kind, keys in kinds.items()},
        "others": dict(others.most_common(40)),
    }
    if cuda:
        kernels = Counter({key: took / whole for key, took in _seconds_on(DeviceType.CUDA, seen).items()})
        found |= {"busy": sum(kernels.values()), "kernels": dict(kernels.most_common(40))}
    return found


def _seconds_on(device: DeviceType, seen: profile) -> dict[str, float]:
    """Return the GPU seconds of each kernel (CUDA), or of the kernels that each operator itself launched (CPU)."""
    events = [event for event in seen.key_averages() if event.device_type == device and event.key != _STEPS]
    found = defaultdict(float)
    for event in events:
        if device == DeviceType.CPU or not event.is_user_annotation:
            found[event.key[:120]] += event.self_device_time_total / 1e6  # names of templates are longer
    return dict(found)


def _thread_seconds(seen: profile) -> dict[str, float]:
    """Return each operator's own seconds, divided by the number of threads where several compute experts together."""
    events = seen.events()
    [main_thread] = [event.thread for event in events if event.name == _STEPS]
    # The thread that collates batches runs beside the step; it multiplies no matrices and is not counted.
    others = {event.thread for event in events if event.name == "aten::mm"} - {main_thread}
    found = defaultdict(float)
    for event in events:
        if event.thread == main_thread or event.thread in others:
            number = 1 if event.thread == main_thread else len(others)
            found[event.name] += event.self_cpu_time_total / 1e6 / number
    waiting = [name for name in found if name.startswith("_MoEMLP")] if others else []
    return {name: seconds for name, seconds in found.items() if name not in (_STEPS, *waiting)}


def _print(found: dict, profiled: dict | None) -> None:
    total = sum(found["parts"].values())
    for name, seconds in found["parts"].items():
        print(f"{name:<22} {seconds:9.4f} s  {100 * seconds / total:5.1f} %")
    share = found["flops_per_second"] / found["product_flops_per_second"]
    print(f"{'the step':<22} {total:9.4f} s  (without marks {found['unmarked_seconds']:.4f} s)")
    print(
        f"{found['words_per_second']:,.0f} words/s, {found['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{100 * share:.0f} % of what products of square matrices reach"
    )
    if profiled is not None:
        for kind, of_step in profiled["shares"].items():
            print(f"{kind:<22} {100 * of_step:5.1f} % of a step of {profiled['seconds']:.3f} s (profiled)")
        if "busy" in profiled:
            print(f"{'the GPU busy':<22} {100 * profiled['busy']:5.1f} %")
        for name, of_step in list(profiled["others"].items())[:12]:
            print(f"  {name:<40} {100 * of_step:5.1f} %")


if __name__ == "__main__":
    run(main)
