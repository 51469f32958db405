"""A whole training step by part, as a time line that adds up, and the share of it inside matrix products.

    python scripts/benchmark_step.py --model moe_256 --words 8192 --threads 2 --profile

The parts are told apart by marks in the forward pass and in the backward pass, each between one part and the next, so
that their times sum to the step's. --profile counts, with torch's profiler, the time inside matrix products and LSTM
kernels alone. Prints the step of the median time, and with --json writes it.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import made_up
import torch
from measuring import new_file, positive, product_ceiling, run, seconds_of, wait_for, write_record
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from moe_lm.analysis.cost.operations import flops_per_word
from moe_lm.cli import machine as make
from moe_lm.errors import UserError
from moe_lm.model.experts import Experts
from moe_lm.model.lstm import Lstm, ProjectedLstm
from moe_lm.ops import experts_grouped as experts_grouped
from moe_lm.ops import experts_loop as experts_loop
from moe_lm.train.trainer import Trainer

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "_grouped_mm", "mv", "addmv", "linear", "mkldnn_linear")
_LSTMS = ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn", "_cudnn_rnn_backward", "_thnn_fused_lstm_cell")

_HERE = "the steps"
"""Name of what the profiled thread does."""


def main() -> None:
    """Measure the steps of one model."""
    options = _options()
    make.keep_memory()
    make.set_threads(options.threads)
    prepared = made_up.data(options.vocabulary, 60 * options.words)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"batch.words={options.words}", f"batch.micro_words={options.words}"]
        words += [] if options.threads is None else [f"machine.threads={options.threads}"]
        trainer = made_up.trainer(
            "step", [f"model={options.model}", *words, *options.overrides], prepared, Path(folder)
        )
        on = made_up.device_of(trainer)
        for _ in range(2):  # which allocate, too
            made_up.step(trainer)
        plain = [seconds_of(lambda: made_up.step(trainer), on) for _ in range(options.steps)]
        whole, num_tokens, parts = _timed(trainer, on, options.steps)
        profiled = _profiled(trainer, on) if options.profile else None
    flops = flops_per_word(trainer.model) * num_tokens
    ceiling = product_ceiling(on, torch.bfloat16 if on.type == "cuda" else torch.float32, options.square)
    found = {
        "parts": parts,
        "seconds": whole,
        "unmarked_seconds": statistics.median(plain),
        "words_per_second": num_tokens / whole,
        "flops_per_second": flops / whole,
        "product_flops_per_second": ceiling,
    }
    _print(found, profiled)
    sizes = {key: value for key, value in vars(options).items() if key != "json"}
    write_record(options.json, on, found | {"profile": profiled, "options": sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moe_256", help="a preset of configs/model")
    parser.add_argument("--words", type=positive, default=8192, help="in a batch, which is one micro-batch")
    parser.add_argument("--vocabulary", type=positive, default=20_000)
    parser.add_argument("--steps", type=positive, default=7)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--square", type=positive, default=2048, help="size of the products that give the ceiling")
    parser.add_argument("--profile", action="store_true", help="count the time inside products and LSTMs")
    parser.add_argument("--overrides", nargs="*", default=[], help="further keys of moe-lm train")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args()


class TimeLine:
    """Moments by the name of the part that ends there."""

    def __init__(self, on: torch.device):
        self._cuda, self._moments, self._aside = on.type == "cuda", [], []
        self.backward = False
        """Whether the backward pass has begun."""
        self.side_by_side = 1
        """Threads that work at the same time now."""

    def begin(self) -> None:
        """Start anew."""
        self._moments, self._aside, self.backward = [], [], False
        self.mark("")

    def mark(self, name: str) -> None:
        """The part of this name ends here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append((name, event))
        else:
            self._moments.append((name, time.perf_counter()))

    def aside(self, name: str, seconds: float, of: str) -> None:
        """Of a part that several threads work on one of them spent so long on what this names."""
        self._aside.append((name, seconds / self.side_by_side, of))

    def parts(self) -> dict[str, float]:
        """Return each part's seconds, in the order of its first end."""
        found = defaultdict(float)
        for (_, before), (name, after) in zip(self._moments, self._moments[1:], strict=False):
            found[name] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        for name, seconds, of in self._aside:
            found[name] += seconds
            found[of] -= seconds
        return dict(found)


class _Marked(torch.autograd.Function):
    """The same tensor; when its gradient comes, the part behind it has ended."""

    @staticmethod
    def forward(ctx, x, line, name):
        ctx.line, ctx.name = line, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.line.mark(ctx.name)
        return grad, None, None


def _timed(trainer: Trainer, on: torch.device, steps: int) -> tuple[float, int, dict[str, float]]:
    """Return seconds, tokens and parts of the step that took the median time: its parts are its time."""
    line, seen = TimeLine(on), []
    _put_marks(trainer, line)
    for _ in range(steps):
        number = trainer.progress.step
        wait_for(on)
        line.begin()
        batch = trainer.ahead.step(number)
        done = trainer.update(batch, number, trainer.peak_rate)
        line.mark("rest")
        wait_for(on)
        trainer.progress.step += 1
        if not done.made:
            raise UserError(made_up.LEFT_OUT)
        parts = line.parts()
        seen.append((sum(parts.values()), batch.num_tokens, parts))
    return sorted(seen, key=lambda step: step[0])[len(seen) // 2]


def _put_marks(trainer: Trainer, line: TimeLine) -> None:
    model, update = trainer.model, trainer.update
    layers = list(model.layers.values())
    for number, layer in enumerate(layers):
        name = "LSTM" if isinstance(layer, Lstm | ProjectedLstm) else "layer"
        gated = hasattr(layer, "experts")
        _mark_module(layer, line, before="embedding" if number == 0 else "between", after="combine" if gated else name)
        if not gated:
            _mark_gradients(layer, line, output="between, backward", argument=f"{name}, backward")
            continue
        _mark_gradients(layer, line, output="between, backward", argument="gate, backward")
        for module in layer.modules():
            if isinstance(module, Experts):
                _mark_module(module, line, before="gate", after="experts")
                _mark_gradients(module, line, output="combine, backward", argument="dispatch, backward")
            elif hasattr(module, "operations_per_timestep") and module is not layer:
                _mark_module(module, line, before="gate", after="gate")
    _mark_way_to_experts(line)
    _mark_module(model.softmax, line, before="between", after="softmax")
    _mark_gradients(model.softmax, line, output="losses", argument="softmax, backward")
    model.softmax.register_forward_hook(lambda *_: setattr(line, "backward", True))
    update._micro_batch = _marking(update._micro_batch, line, "batch")
    update.objective = _marking(update.objective, line, "losses")
    update._gradients.finish = _marking(update._gradients.finish, line, "embedding, backward")
    update._gradients.norm = _marking(update._gradients.norm, line, "norm")
    for name in ("clip", "clip_on_device"):
        setattr(update.optimizer, name, _marking(getattr(update.optimizer, name), line, "clip"))
    update.optimizer.step = _marking(update.optimizer.step, line, "optimizer")


def _mark_module(module: torch.nn.Module, line: TimeLine, *, before: str, after: str) -> None:
    module.register_forward_pre_hook(lambda *_: line.mark(before))
    module.register_forward_hook(lambda *_: line.mark(after))


def _mark_gradients(module: torch.nn.Module, line: TimeLine, *, output: str, argument: str) -> None:
    """Mark when the gradient of a module's output is there, and when that of its first argument is."""

    def enter(_, arguments: tuple) -> tuple:
        return _Marked.apply(arguments[0], line, argument), *arguments[1:]

    def leave(_, __, result: object) -> object:
        if isinstance(result, Tensor):
            return _Marked.apply(result, line, output)
        return _Marked.apply(result[0], line, output), *result[1:]

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _mark_way_to_experts(line: TimeLine) -> None:
    """Tell dispatch and combine from products, which are one autograd node.

    In its backward pass what is gathered are the gradients of the answers, and the tokens once more.
    """
    for module, adds in ((experts_loop, "add_"), (experts_grouped, "summed_by_token")):
        module.gathered = _apart(module.gathered, line, "dispatch", "combine, backward")
        setattr(module, adds, _apart(getattr(module, adds), line, "combine", "dispatch, backward"))
    node = experts_grouped._GroupedMixture
    node.backward = staticmethod(_marking(node.backward, line, "experts, backward"))  # which ends with a product
    run_parallel = experts_loop.run_parallel

    def marked(works: list) -> None:
        line.side_by_side = len(works)
        run_parallel(works)
        line.side_by_side = 1
        line.mark(_experts(line))

    experts_loop.run_parallel = marked


def _experts(line: TimeLine) -> str:
    return "experts, backward" if line.backward else "experts"


def _apart(call, line: TimeLine, forward: str, backward: str):
    """Mark a call: what is before it are products. Of one of several threads note how long it took."""

    def apart(*arguments: object):
        name = backward if line.backward else forward
        if line.side_by_side > 1:
            started = time.perf_counter()
            result = call(*arguments)
            line.aside(name, time.perf_counter() - started, _experts(line))
        else:
            line.mark(_experts(line))
            result = call(*arguments)
            line.mark(name)
        return result

    return apart


def _marking(call, line: TimeLine, name: str):
    def marked(*arguments, **options):
        result = call(*arguments, **options)
        line.mark(name)
        return result

    if hasattr(call, "balance"):
        marked.balance = call.balance
    return marked


def _profiled(trainer: Trainer, on: torch.device, steps: int = 3) -> dict[str, object]:
    """Return the shares of a step inside matrix products, LSTM kernels and the largest others."""
    cuda = on.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait_for(on)
    every_thread = _ExperimentalConfig(profile_all_threads=not cuda)
    with profile(activities=activities, experimental_config=every_thread) as seen, record_function(_HERE):
        whole = seconds_of(lambda: [made_up.step(trainer) for _ in range(steps)], on)
    self_seconds = _device_seconds(seen) if cuda else _thread_seconds(seen)
    names = {key: key.removeprefix("aten::").removeprefix("mkldnn::") for key in self_seconds}
    kinds = {"matrix products": _PRODUCTS, "LSTM kernels": _LSTMS}
    shares = {
        kind: sum(took for key, took in self_seconds.items() if names[key] in of_kind) / whole
        for kind, of_kind in kinds.items()
    }
    others = {k: took / whole for k, took in self_seconds.items() if names[k] not in _PRODUCTS + _LSTMS}
    found = {"seconds": whole / steps, "shares": shares, "others": _largest(others)}
    if cuda:
        kernels = defaultdict(float)
        for key, took in _kernel_seconds(seen).items():
            kernels[key[:120]] += took / whole  # templates may differ in what comes later
        found |= {"busy": sum(kernels.values()), "kernels": _largest(kernels)}
    return found


def _largest(shares: dict[str, float]) -> dict[str, float]:
    return dict(sorted(shares.items(), key=lambda pair: -pair[1])[:40])


def _device_seconds(seen: profile) -> dict[str, float]:
    """Return the time of the kernels that each operation launched by itself."""
    operations = [e for e in seen.key_averages() if e.device_type == DeviceType.CPU and e.key != _HERE]
    return {event.key: event.self_device_time_total / 1e6 for event in operations}


def _kernel_seconds(seen: profile) -> dict[str, float]:
    """Return the time of each kernel, of copies and of fillings: all that a GPU was busy with."""
    kernels = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA and e.key != _HERE]
    return {event.key: event.self_device_time_total / 1e6 for event in kernels if not event.is_user_annotation}


def _thread_seconds(seen: profile) -> dict[str, float]:
    """Return each operation's own time; where threads work at the same time, a thread's counts by their number."""
    events = seen.events()
    [here] = [event.thread for event in events if event.name == _HERE]
    # Batches are laid out by a thread of their own, beside the step.
    others = {event.thread for event in events if event.name == "aten::mm"} - {here}
    found = defaultdict(float)
    for event in events:
        if event.thread == here or event.thread in others:
            found[event.name] += event.self_cpu_time_total / 1e6 / (1 if event.thread == here else len(others))
    waiting = [name for name in found if name.startswith("_LoopedMixture")] if others else []
    return {name: seconds for name, seconds in found.items() if name not in (_HERE, *waiting)}


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
        for kind, of_step in list(profiled["others"].items())[:12]:
            print(f"  {kind:<40} {100 * of_step:5.1f} %")


if __name__ == "__main__":
    run(main)
