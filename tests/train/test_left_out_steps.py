"""A step that is left out changes no bit of weights, optimizer state or gates' buffers, nor the steps after it."""

import pytest
import torch

CPU = torch.device("cpu")
SMALL = ["batch.words=60", "batch.micro_words=30", "optimizer.clip_norm=0.05"]
CASES = {
    "adam": [],
    "factored": ["optimizer.experts=factored"],
    "dense": ["optimizer.vocabulary=dense", "softmax=full"],
    "loss_free": ["gate@model.layers.middle.gate=loss_free", "balance=[]", "optimizer.experts=factored"],
    "batchwise": ["gate@model.layers.middle.gate=strictly_balanced", "balance=[batchwise]"],
}


def tensors(trainer):
    """Return copies of all weights, buffers and optimizer state."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    state = {
        f"{names[parameter]} {key}": value
        for parameter, values in trainer.optimizer.state.items()
        for key, value in values.items()
    }
    return {name: x.detach().clone() for name, x in {**trainer.model.state_dict(), **state}.items()}


def step(trainer, number, *, faulty=False):
    """Make one step, with NaN in a gradient if it is to be left out; return what there is after it."""
    trainer.model.train()
    weight = trainer.model.layers["middle"].experts.w2_EHD
    hook = weight.register_hook(lambda grad: grad * torch.nan) if faulty else None
    done = trainer.train_step(trainer.prefetcher.batches.step(number), number, 1e-2)
    if hook:
        hook.remove()
    assert done.updated != faulty
    return tensors(trainer)


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_left_out_steps_change_nothing(trainer, overrides):
    """Left out at the beginning, before there is any optimizer state, and later."""
    left_out, plain = (trainer(CPU, *SMALL, *overrides) for _ in range(2))
    before = tensors(left_out)
    assert all(torch.equal(x, before[name]) for name, x in step(left_out, 0, faulty=True).items())
    first = step(left_out, 1)
    again = step(left_out, 2, faulty=True)
    assert first.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    last = step(left_out, 3)
    step(plain, 1)
    want = step(plain, 3)
    assert any(not torch.equal(x, first[name]) for name, x in last.items())
    assert all(torch.equal(x, want[name]) for name, x in last.items())


def test_an_exploded_loss_leaves_the_step_out(trainer):
    """Loss and gradient are finite, but the loss is too large to learn from."""
    made = trainer(CPU, *SMALL)
    made.model.train()
    made.train_step._max_loss = 1e-3
    before = tensors(made)
    done = made.train_step(made.prefetcher.batches.step(0), 0, 1e-2)
    assert not done.updated
    assert torch.isfinite(done.grad_norm)
    assert all(torch.equal(x, before[name]) for name, x in tensors(made).items())


def test_a_step_clears_the_scale(trainer):
    """A step alone, without `zero_grad`, forgets the factor that clipped its gradients."""
    made = trainer(CPU, *SMALL, "optimizer.experts=factored")
    made.model.train()
    made.optimizer.zero_grad = list
    made.train_step(made.prefetcher.batches.step(0), 0, 1e-2)
    scales = [part.scale for part in made.optimizer.parts if hasattr(part, "scale")]
    assert scales == [1.0, 1.0]
