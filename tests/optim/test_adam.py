"""Adam against its update rule written out."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE
from moe_lm.optim.adam import Adam

SETTINGS = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "clip_norm": 1.0}
SETTINGS |= {"experts": "adam", "vocabulary": "dense"}


def test_three_steps_are_those_of_the_paper():
    """Kingma & Ba, Algorithm 1, number by number, with a rate that changes from step to step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = Adam(**SETTINGS).build(model)
    values = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    m, v = ({name: [0.0] * len(x) for name, x in values.items()} for _ in range(2))
    assert optimizer.param_groups[0]["lr"] == 0.01
    for step, rate in enumerate([0.01, 0.02, 0.005], start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            for i, g in enumerate(parameter.grad.flatten().tolist()):
                m[name][i] = 0.8 * m[name][i] + 0.2 * g
                v[name][i] = 0.99 * v[name][i] + 0.01 * g * g
                m_hat, v_hat = m[name][i] / (1 - 0.8**step), v[name][i] / (1 - 0.99**step)
                values[name][i] -= rate * m_hat / (math.sqrt(v_hat) + 1e-3)
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.detach().flatten().tolist() == pytest.approx(values[name], rel=1e-12)


def test_every_parameter_is_optimized():
    """No parameter is left out, and the recipe keeps the rate and the norm for the trainer."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    recipe = Adam(**SETTINGS)
    held = {id(p) for group in recipe.build(model).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert (recipe.learning_rate, recipe.clip_norm) == (0.01, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"clip_norm": -1.0},
        {"experts": "sgd"},
        {"vocabulary": "sparse"},
    ],
    ids=str,
)
def test_wrong_settings_are_mistakes(wrong):
    """A rate, epsilon or norm that is not positive, or a beta outside [0, 1), is refused in one line."""
    with pytest.raises(ValueError, match=r"must be|choose") as caught:
        Adam(**SETTINGS | wrong)
    assert next(iter(wrong)) in str(caught.value)
    assert "\n" not in str(caught.value)


def mixture_lm(k=2):
    """A model with every parameter group: 16 experts of which a token uses `k`, and 4 groups of 4 behind them."""
    noisy = partial(NoisyTopK, noise_epsilon=0.01)
    sizes = {"width": 4, "hidden": 3, "num_experts": 16, "gate": noisy}
    layers = {
        "lower": Lstm(width=4),
        "flat": MoE(**sizes, k=k),
        "deep": HierarchicalMoE(**sizes, num_groups=4, k=k, primary_k=1, primary_gate=noisy),
    }
    softmax = partial(FullSoftmax, chunk_logits=1000)
    return LanguageModel(width=4, vocabulary_size=9, dropout=0.0, layers=layers, softmax=softmax)


def rates_of(model, **settings):
    """The factor of the learning rate by parameter name."""
    optimizer = Adam(**SETTINGS | settings).build(model)
    rates = {id(p): group["rate"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters()}


def test_rates_of_groups_and_of_experts_that_see_few_tokens():
    """Flat: k / E = 2/16; hierarchical: 1 of 4 groups, then 2 of its 4 experts, 2/16 again; to the power 1/3: 1/2."""
    model = mixture_lm()
    rates = rates_of(model, rates={"experts": 3.0, "gates": 5.0, "vocabulary": 7.0}, sparsity_exponent=1 / 3)
    for name, rate in rates.items():
        if "primary_gate" in name:
            assert rate == pytest.approx(5 * (1 / 4) ** (1 / 3)), name
        elif "experts" in name:
            assert rate == pytest.approx(1.5), name
        elif "gate" in name:
            assert rate == pytest.approx(2.5), name
        else:
            assert rate == (1.0 if "lower" in name else 7.0), name
    assert set(rates_of(model).values()) == {1.0}
    assert len(Adam(**SETTINGS).build(model).param_groups) == 1  # equal rates share one fused update


def test_a_step_moves_each_group_by_its_rate():
    """Adam's first step is rate * learning rate * sign of the gradient; at rate 0 nothing moves."""
    model = mixture_lm()
    optimizer = Adam(**SETTINGS | {"epsilon": 1e-12}, rates={"gates": 0.0, "rest": 0.5}).build(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.set_learning_rate(0.004)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0.0 if "gate" in name else 0.5 if "lower" in name else 1.0
        torch.testing.assert_close(parameter, before[name] - 0.004 * rate, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["factored", "lazy"])
def test_rates_hold_for_the_other_rules(rule):
    """Factored Adam and lazy Adam update by the rate of the group, too."""
    model, kind = mixture_lm(), {"factored": {"experts": "factored"}, "lazy": {"vocabulary": "lazy"}}[rule]
    group, part = ("experts", "experts") if rule == "factored" else ("vocabulary", "embedding")
    optimizer = Adam(**SETTINGS | kind | {"epsilon": 1e-12}, rates={group: 0.25}).build(model)
    optimizer.set_learning_rate(0.004)
    moved = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        moved[name] = parameter.detach().clone()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if part in name:
            torch.testing.assert_close(parameter, moved[name] - 0.001, rtol=0, atol=1e-6)


def rates_groups():
    """The parameter groups."""
    return ("experts", "gates", "feed_forward", "vocabulary", "rest")


def test_wrong_rates_are_refused_by_name():
    for wrong, key in (
        ({"rates": {"experts": -1.0}}, r"optimizer\.rates\.experts=-1\.0"),
        ({"rates": {"gates": math.inf}}, r"optimizer\.rates\.gates=inf"),
        ({"rates": dict.fromkeys(rates_groups(), 0.0)}, r"optimizer\.rates: all are 0"),
        ({"rates": {"lstm": 1.0}}, r"optimizer\.rates\.lstm: the parameter groups are experts, gates"),
        ({"sparsity_exponent": -0.5}, r"optimizer\.sparsity_exponent=-0\.5"),
    ):
        with pytest.raises(ValueError, match=key):
            Adam(**SETTINGS | wrong)
