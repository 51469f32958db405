"""Steps without an update: a loss or gradient that is not finite, a loss that exploded, too little memory."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
from tiny_training import with_overrides

from moe_lm.checkpoint import sharded_safetensors
from moe_lm.train.step import TrainStep, _float32_as_tf32


@pytest.fixture
def faulty(monkeypatch):
    """Run `fault(model, step)` before the passes of every step, and record the weights before each step."""

    def install(fault):
        passes, seen = TrainStep._forward_backward, []

        def with_fault(self, batch, step):
            before = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
            undo = fault(self.model, step)
            found = passes(self, batch, step)
            if undo:
                undo()
            seen.append((step, self.model, before))
            return found

        monkeypatch.setattr(TrainStep, "_forward_backward", with_fault)
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


@pytest.mark.parametrize("fault", [nan_gradient, exploding])
def test_left_out_and_counted(workspace, moe_lm, training, faulty, fault):
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


def test_too_many_in_a_row_end_the_run(workspace, moe_lm, training, faulty, monkeypatch):
    """The last good checkpoint is named, though it was still being written, is there, and holds no NaN."""
    write = sharded_safetensors.write
    monkeypatch.setattr(sharded_safetensors, "write", lambda *args: (time.sleep(0.2), write(*args)))
    faulty(nan_gradient(set(range(6, 100))))
    outcome = moe_lm("train", *with_overrides(training, "training.max_skipped_steps=3"))
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moe-lm: 3 updates in a row")
    assert "up to step 9" in last
    assert "optimizer.learning_rate" in last
    steps = sorted(int(path.name) for path in Path("runs/tiny/checkpoints").glob("[0-9]*"))
    assert f"the last good checkpoint is that of step {steps[-1]}" in last
    assert moe_lm("evaluate", "run=runs/tiny").code == 0


def test_a_run_without_any_update_is_no_success(workspace, moe_lm, training, faulty):
    """Fewer steps than `max_skipped_steps`, all skipped: no result of the initial weights."""
    faulty(nan_gradient(set(range(100))))
    outcome = moe_lm("train", *training, "training.max_skipped_steps=100")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("moe-lm: 12 updates in a row had no finite loss and gradient")
    assert not Path("runs/tiny/result.json").exists()


def test_one_good_update_between_starts_the_count_anew(workspace, moe_lm, training, faulty):
    faulty(nan_gradient({2, 3, 5, 6, 8, 9}))
    assert moe_lm("train", *with_overrides(training, "training.max_skipped_steps=3")).code == 0
    assert sum(line.get("skipped", 0) for line in lines() if "split" not in line) == 6


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "can't allocate memory: you tried"])
def test_too_little_memory_names_the_key(workspace, moe_lm, training, monkeypatch, said):
    def fail(self, batch, step):
        raise RuntimeError(said)

    monkeypatch.setattr(TrainStep, "_forward_backward", fail)
    outcome = moe_lm("train", *training)
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert last.startswith("moe-lm: out of memory")
    assert "batch.micro_words" in last
    assert "Traceback" not in outcome.err


def test_another_runtime_error_is_not_hidden(workspace, moe_lm, training, monkeypatch):
    def fail(self, batch, step):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(TrainStep, "_forward_backward", fail)
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
    seen, passes = [], TrainStep._forward_backward

    def watched(self, batch, step):
        seen.append(products.fp32_precision)
        return passes(self, batch, step)

    monkeypatch.setattr(TrainStep, "_forward_backward", watched)
    arguments = with_overrides(training, "training.num_words=2000", "machine.precision=bfloat16")
    for precision in ("none", "tf32"):
        products.fp32_precision = precision
        assert moe_lm("train", *with_overrides(arguments, f"name={precision}")).code == 0
    assert set(seen) == {"none", "tf32"}
