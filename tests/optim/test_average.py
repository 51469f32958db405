"""Averaged weights against the weighted sum written out; that checkpoints and exports hold them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import call, with_overrides
from torch import nn

from moe_lm.optim.adam import Adam
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.train.trainer import Trainer

SETTINGS = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "clip_norm": 1.0}
SETTINGS |= {"experts": "adam", "vocabulary": "dense"}


def weighted_mean(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """sum_s decay^(t-s) w_s / sum_s decay^(t-s), in float64."""
    factors = [decay ** (len(weights) - s) for s in range(1, len(weights) + 1)]
    return sum(f * w.double() for f, w in zip(factors, weights, strict=True)) / sum(factors)


def stepped(optimizer: CompositeOptimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_all_weights(decay):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = Adam(**SETTINGS, average_decay=decay).build(model)
    with optimizer.averaged_weights():
        before = model.weight.detach().clone()
    assert torch.equal(before, model.weight)  # there is no average yet
    seen = []
    for _ in range(6):
        stepped(optimizer, model)
        seen.append(model.weight.detach().clone())
        with optimizer.averaged_weights():
            assert torch.allclose(model.weight, weighted_mean(seen, decay), rtol=1e-12, atol=0)
        assert torch.equal(model.weight, seen[-1])


def test_an_error_inside_leaves_the_weights():
    model = nn.Linear(4, 3)
    optimizer = Adam(**SETTINGS, average_decay=0.9).build(model)
    for _ in range(3):
        stepped(optimizer, model)
    before = model.weight.detach().clone()
    with pytest.raises(OSError, match="full"), optimizer.averaged_weights():
        raise OSError("full")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"optimizer.average_decay=.*at least 0 and below 1"):
        Adam(**SETTINGS, average_decay=decay)


def test_checkpoints_validation_and_exports_use_the_average(workspace, training, moe_lm, monkeypatch):
    """The mean is made again of the weights after each step, which a watched training reports."""
    seen: dict[str, list[torch.Tensor]] = {}
    after_step = Trainer._after_step

    def watched(trainer, bar):
        for name, parameter in trainer.model.named_parameters():
            seen.setdefault(name, []).append(parameter.detach().clone())
        after_step(trainer, bar)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", watched)
        assert (
            moe_lm("train", *with_overrides(training, "valid.max_sentences=99"), "optimizer.average_decay=0.8").code
            == 0
        )
    last = sorted(Path("runs/tiny/checkpoints").iterdir())[-1]
    stored = {name: tensor for file in (last / "model").iterdir() for name, tensor in load_file(file).items()}
    for name, weights in seen.items():
        mean = weighted_mean(weights, 0.8)
        assert (stored[name] - mean).norm() <= 1e-6 * mean.norm(), name
        assert not torch.equal(stored[name], weights[-1]), name
    assert moe_lm("export", "run=runs/tiny", "to=out").code == 0
    exported = load_file("out/model.safetensors")
    assert all(torch.equal(exported[name], stored[name]) for name in seen)
    perplexity = json.loads(Path("runs/tiny/result.json").read_text())["perplexity"]
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    validations = [line["perplexity"] for line in lines if line.get("split") == "valid"]
    assert validations[-1] == pytest.approx(perplexity["valid"], rel=1e-6)
    for source in ("run=runs/tiny", "run=out"):
        printed = moe_lm("evaluate", source).out
        assert f"{perplexity['test']:.2f}" in printed, printed


def test_it_resumes_exactly(workspace, training):
    """Stopped at a step between two validations, and at the end of a run that then grows."""
    averaged = [*training, "optimizer.average_decay=0.8"]
    assert call("train", *averaged, "name=at_once") == 0
    shorter = with_overrides(averaged, "training.num_words=1500", "name=resumed")
    assert call("train", *shorter) == 0
    assert call("train", *with_overrides(averaged, "name=resumed")) == 0
    last = [sorted(Path(f"runs/{name}/checkpoints").iterdir())[-1] for name in ("at_once", "resumed")]
    for part in ("model", "optimizer"):
        ours, theirs = (
            {name: x for file in (folder / part).iterdir() for name, x in load_file(file).items()} for folder in last
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert {name.partition("/")[0] for name in ours} >= {"weight", "updates"}
