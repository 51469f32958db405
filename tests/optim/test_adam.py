"""Adam against its update rule written out."""

import math

import pytest
import torch
from torch import nn

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
