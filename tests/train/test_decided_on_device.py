"""Updates that the device decides on, as on a GPU, against those that the host decides on; kernels are interpreted."""

import os
import sys

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu compares a GPU with the CPU", allow_module_level=True)

from moe_lm.optim import CompositeOptimizer

CPU = torch.device("cpu")
SMALL = ["batch.words=60", "batch.micro_words=30"]
CASES = {
    "adam": [],
    "factored": ["optimizer.experts=factored"],
    "dense": ["optimizer.vocabulary=dense", "softmax=full"],
    "loss_free": ["gate@model.layers.middle.gate=loss_free", "balance=[]", "optimizer.experts=factored"],
    "batchwise": ["gate@model.layers.middle.gate=strictly_balanced", "balance=[batchwise]"],
    "short": ["optimizer.experts=factored", "optimizer.clip_norm=1e9"],
}


@pytest.fixture
def by_device(monkeypatch):
    """Let the device decide from now on; says how often it did."""
    asked, real = [], CompositeOptimizer.clip_on_device

    def watched(self, *arguments):
        asked.append(None)
        real(self, *arguments)

    def install():
        for module in [module for name, module in sys.modules.items() if name.startswith("moe_lm.")]:
            if hasattr(module, "by_triton"):
                monkeypatch.setattr(module, "by_triton", lambda x: x.dtype != torch.float64)
        monkeypatch.setattr(CompositeOptimizer, "clip_on_device", watched)
        return asked

    return install


def tensors(trainer):
    """All weights, gates' own numbers and moments."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    moments = {
        f"{names[parameter]} {key}": value
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }
    return {name: x.detach().clone() for name, x in {**trainer.model.state_dict(), **moments}.items()}


def steps(trainer, faulty=()):
    """Make five updates, of the faulty ones with a NaN in a gradient; return what there is after each."""
    trainer.model.train()
    found, experts = [], trainer.model.layers["middle"].experts
    for step in range(5):
        hook = experts.w2_EHD.register_hook(lambda grad: grad * float("nan")) if step in faulty else None
        done = trainer.update(trainer.batches.step(step), step, 1e-2)
        if hook:
            hook.remove()
        assert done.made == (step not in faulty)
        found.append(tensors(trainer))
    return found


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_same_updates(trainer, by_device, overrides):
    """Clipped, with one left out at the beginning and one later: weights and moments as where the host decides."""
    overrides = [*SMALL, "optimizer.clip_norm=0.05", *overrides]
    host = steps(trainer(CPU, *overrides), faulty=(0, 3))
    asked = by_device()
    device = steps(trainer(CPU, *overrides), faulty=(0, 3))
    assert len(asked) == 5
    for ours, theirs in zip(device[1:], host[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            assert (ours[name] - want).norm() <= 2e-3 * want.norm() + 1e-7, name


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_what_is_left_out_changes_no_bit(trainer, by_device, overrides):
    """Of weights, moments, counts of steps and what gates move."""
    by_device()
    made = trainer(CPU, *SMALL, *overrides)
    before = tensors(made)
    first, second, third, left_out, last = steps(made, faulty=(0, 3))
    for then, now in ((before, first), (third, left_out)):
        for name, x in then.items():
            assert torch.equal(x, now[name]), name
    assert any(not torch.equal(x, second[name]) for name, x in first.items())
    assert all(torch.isfinite(x).all() for x in last.values())


def test_a_loss_that_explodes_is_left_out(trainer, by_device):
    """Though it and its gradient are finite."""
    by_device()
    made = trainer(CPU, *SMALL)
    made.model.train()
    made.update._largest_loss = 1e-3
    before = tensors(made)
    done = made.update(made.batches.step(0), 0, 1e-2)
    assert not done.made
    assert torch.isfinite(done.norm)
    now = tensors(made)
    assert all(torch.equal(x, now[name]) for name, x in before.items())


def test_the_update_after_is_as_if_nothing_were_before(trainer, by_device):
    """Neither what the last one was scaled by nor whether it was made is left."""
    by_device()
    made = trainer(CPU, *SMALL, "optimizer.experts=factored")
    made.model.train()
    made.update.optimizer.zero_grad = list  # a step alone forgets
    made.update(made.batches.step(0), 0, 1e-2)
    for part in made.optimizer.parts:
        assert part.found_inf is None
        assert getattr(part, "scale", 1.0) == 1.0
        assert getattr(part, "grad_scale", None) is None


def test_moments_of_a_checkpoint_go_on(trainer, by_device):
    """Counts of steps that the host has kept, or a file, are taken up by the device."""
    made = trainer(CPU, *SMALL, "optimizer.experts=factored")
    made.model.train()
    made.update(made.batches.step(0), 0, 1e-2)
    by_device()
    made.update(made.batches.step(1), 1, 1e-2)
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {2}
    assert made.update.optimizer.decides_on_device()
