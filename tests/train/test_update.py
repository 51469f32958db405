"""Updates that must not be made: a loss or gradient that is not finite, a loss that exploded, too little memory."""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import with_overrides

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint import sharded_safetensors as tensors_on_disk
from moe_lm.train.later import Later
from moe_lm.train.step import TrainStep, _float32_as_tf32


@pytest.fixture
def faulty(monkeypatch):
    """Make `fault(model, step)` happen before the passes of every update, and see what the update did."""

    def install(fault):
        passes, seen = TrainStep._passes, []

        def with_fault(self, batch, step):
            before = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
            undo = fault(self.model, step)
            found = passes(self, batch, step)
            if undo:
                undo()
            seen.append((step, self.model, before))
            return found

        monkeypatch.setattr(TrainStep, "_passes", with_fault)
        return seen

    return install


def nan_gradient(steps):
    """A gradient with one NaN, deep in the model, at these steps."""

    def fault(model, step):
        if step in steps:
            handle = model.layers["middle"].experts.w1_EDH.register_hook(lambda grad: grad * float("nan"))
            return handle.remove
        return None

    return fault


def exploding(steps):
    """Logits a thousand times too large: a loss of hundreds of nats a word, finite like its gradient."""

    def fault(model, step):
        if step not in steps:
            return None
        with torch.no_grad():
            model.softmax.weight_VD.mul_(3000.0)
        return lambda: model.softmax.weight_VD.data.div_(3000.0)

    return fault


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(params=["at once", "later"])
def known(request, monkeypatch):
    """Whether an update is made is known at once or, as from a GPU, while the next one is under way."""
    if request.param == "later":
        monkeypatch.setattr(Later, "is_here", False)


@pytest.mark.parametrize("fault", [nan_gradient, exploding])
def test_left_out_and_counted(workspace, moe_lm, training, faulty, fault, known):
    """Step 4 changes no weight; the run goes on and says so in its log."""
    seen = faulty(fault({4}))
    outcome = moe_lm("train", *training)
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if "step 5 was left out" in line and "WARNING" in line]
    before_4, before_5 = (before for step, _, before in seen if step in (4, 5))
    for name, tensor in before_4.items():
        torch.testing.assert_close(before_5[name], tensor, rtol=1e-6, atol=0)
    before_6 = next(before for step, _, before in seen if step == 6)
    assert any(not torch.equal(before_6[name], tensor) for name, tensor in before_5.items())
    assert [line["skipped"] for line in lines() if "skipped" in line] == [1]
    assert all(torch.isfinite(torch.tensor(line["nats_per_word"])) for line in lines() if "nats_per_word" in line)


def test_too_many_in_a_row_end_the_run(workspace, moe_lm, training, faulty, monkeypatch, known):
    """The last good checkpoint is named, though it was still being written, is there, and holds no NaN."""
    write = tensors_on_disk.write
    monkeypatch.setattr(tensors_on_disk, "write", lambda *args: (time.sleep(0.2), write(*args)))
    faulty(nan_gradient(set(range(6, 100))))
    outcome = moe_lm("train", *with_overrides(training, "training.max_skipped=3"))
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moe-lm: 3 updates in a row")
    assert "up to step 9" in last
    assert "optimizer.learning_rate" in last
    steps = sorted(int(path.name) for path in Path("runs/tiny/checkpoints").glob("[0-9]*"))
    assert f"the last good checkpoint is that of step {steps[-1]}" in last
    assert moe_lm("evaluate", "run=runs/tiny").code == 0


@pytest.mark.parametrize("every_seconds", [0, 1000])
def test_what_is_known_later_is_counted_alike(workspace, moe_lm, training, faulty, monkeypatch, every_seconds):
    """Lines and checkpoints are those of a training that waits, though some updates are left out."""
    faulty(nan_gradient({2, 3, 9}))
    found = []
    for later in (False, True):
        monkeypatch.setattr(Later, "is_here", not later)
        seldom = ["training.log_every=5", f"checkpoint.every_seconds={every_seconds}", "checkpoint.keep_last=20"]
        run = with_overrides(training, f"name=later_{later}", *seldom)
        assert moe_lm("train", *run).code == 0
        text = Path(f"runs/later_{later}/metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        timed = ("seconds", "words_per_second")
        lines = [{key: x for key, x in line.items() if key not in timed} for line in lines]
        saved = sorted(Path(f"runs/later_{later}/checkpoints").glob("[0-9]*"))
        progress = [checkpoint.load_state(path)["progress"] for path in saved]
        skipped = [[x["skipped"], x["skipped_in_a_row"], x["interval"].get("steps")] for x in progress]
        found.append((lines, [path.name for path in saved], skipped))
    assert found[0] == found[1]
    assert sum(line.get("skipped", 0) for line in found[0][0]) == 3


def test_what_a_checkpoint_waits_for_is_the_trainings_time(workspace, moe_lm, training, monkeypatch):
    """The update that a GPU is still at when a checkpoint begins."""
    waits, read = [], Later.read
    monkeypatch.setattr(Later, "is_here", False)
    monkeypatch.setattr(Later, "read", lambda later: (waits.append(1), read(later))[-1])
    clock = SimpleNamespace(perf_counter=lambda: float(sum(waits)), monotonic=time.monotonic)
    monkeypatch.setattr("moe_lm.train.trainer.time", clock)
    assert moe_lm("train", *with_overrides(training, "training.log_every=5", "checkpoint.every_seconds=0")).code == 0
    *_, line = (line for line in lines() if "seconds" in line)
    assert line["seconds"] == sum(waits) == 2 * line["step"]  # on a CPU an update reads it too


def test_too_many_in_a_row_known_later_are_told_by_their_step(workspace, moe_lm, training, faulty, monkeypatch):
    """Not by that of the update which is under way meanwhile."""
    monkeypatch.setattr(Later, "is_here", False)
    faulty(nan_gradient(set(range(6, 100))))
    seldom = ["training.max_skipped=2", "training.log_every=100", "checkpoint.every_seconds=1000"]
    outcome = moe_lm("train", *with_overrides(training, *seldom))
    assert outcome.code == 2
    assert "up to step 8; the last good checkpoint is that of step 5" in outcome.err.splitlines()[-1]


def test_one_good_update_between_starts_the_count_anew(workspace, moe_lm, training, faulty, known):
    faulty(nan_gradient({2, 3, 5, 6, 8, 9}))
    assert moe_lm("train", *with_overrides(training, "training.max_skipped=3")).code == 0
    assert sum(line.get("skipped", 0) for line in lines() if "split" not in line) == 6


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "can't allocate memory: you tried"])
def test_too_little_memory_names_the_key(workspace, moe_lm, training, monkeypatch, said):
    def fail(self, batch, step):
        raise RuntimeError(said)

    monkeypatch.setattr(TrainStep, "_passes", fail)
    outcome = moe_lm("train", *training)
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert last.startswith("moe-lm: out of memory")
    assert "batch.micro_words" in last
    assert "Traceback" not in outcome.err


def test_another_runtime_error_is_not_hidden(workspace, moe_lm, training, monkeypatch):
    def fail(self, batch, step):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(TrainStep, "_passes", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        moe_lm("train", *training)


@pytest.fixture
def products():
    """What float32 products of a GPU do, until the test ends."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_within_an_update_where_it_is_allowed(products, allowed):
    """And what was there comes back, whatever happens within."""
    with contextlib.suppress(KeyError), _float32_as_tf32(allowed):
        assert products.allow_tf32 == allowed
        raise KeyError
    assert not products.allow_tf32
    assert products.fp32_precision == "none"


def test_who_has_chosen_a_precision_keeps_it(products):
    products.fp32_precision = "ieee"
    with _float32_as_tf32(True):
        assert products.fp32_precision == "ieee"


def test_an_update_on_a_cpu_leaves_precisions_alone(own_trained, moe_lm, training, monkeypatch, products):
    """Also under autocast, and where the caller speaks torch's newer language of them."""
    seen, passes = [], TrainStep._passes

    def watched(self, batch, step):
        seen.append(products.fp32_precision)
        return passes(self, batch, step)

    monkeypatch.setattr(TrainStep, "_passes", watched)
    arguments = with_overrides(training, "training.num_words=2000", "machine.precision=bfloat16")
    for precision in ("none", "tf32"):
        products.fp32_precision = precision
        assert moe_lm("train", *with_overrides(arguments, f"name={precision}")).code == 0
    assert set(seen) == {"none", "tf32"}
