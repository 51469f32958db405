"""What an update says of its whole batch."""

from collections import Counter

import pytest
import torch


@pytest.mark.parametrize("gate", ["noisy_top_k", "expert_choice", "switch"])
def test_tokens_of_the_busiest_expert_are_counted(trainer, gate):
    """Of all micro-batches together, each assignment one; not the expected load, which noisy top-k gating has."""
    choice = [] if gate == "noisy_top_k" else [f"gate@model.layers.middle.gate={gate}"]
    losses = {"noisy_top_k": [], "expert_choice": ["balance=[]"], "switch": ["balance=[switch]", "model.k=1"]}[gate]
    made = trainer(torch.device("cpu"), "batch.words=90", "batch.micro_words=30", *choice, *losses)
    taken = Counter()
    made.model.layers["middle"].gate.register_forward_hook(lambda *call: taken.update(call[-1].expert_A.tolist()))
    done = made.train_step(made.prefetcher.batches.step(0), 0, 1e-3)
    expected = max(taken.values()) / (sum(taken.values()) / 8)
    assert float(done.routing["max_over_mean_tokens"]) == pytest.approx(expected)
    [gating] = done.gatings.values()
    if gate == "noisy_top_k":
        assert float(gating.load_E.max() / gating.load_E.mean()) != pytest.approx(expected, rel=1e-3)


def test_two_layers_are_averaged(trainer):
    """Each by its own experts."""
    extra = ["model.order=[lower,extra,middle,upper]", "+layer@model.layers.extra=moe"]
    made = trainer(torch.device("cpu"), "batch.words=90", "batch.micro_words=90", *extra)
    taken = {"extra": Counter(), "middle": Counter()}
    for name, count in taken.items():
        gate = made.model.layers[name].gate
        gate.register_forward_hook(lambda *call, count=count: count.update(call[-1].expert_A.tolist()))
    done = made.train_step(made.prefetcher.batches.step(0), 0, 1e-3)
    expected = sum(max(count.values()) / (sum(count.values()) / 8) for count in taken.values()) / 2
    assert float(done.routing["max_over_mean_tokens"]) == pytest.approx(expected)


def test_a_dense_model_has_none(trainer):
    made = trainer(torch.device("cpu"), "layer@model.layers.middle=feed_forward", "batch.micro_words=30")
    assert made.train_step(made.prefetcher.batches.step(0), 0, 1e-3).routing == {}
