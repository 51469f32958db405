"""The LSTM layer against torch's LSTM cell, run sentence by sentence from a zero state.

Shape suffixes: T tokens, D width, L timesteps.
"""

import pytest
import torch

from moe_lm.layer.lstm import Lstm
from moe_lm.mistake import Mistake
from moe_lm.sentences import Sentences

WIDTH = 4
LENGTHS = [[3], [1, 1], [2, 5, 1, 5], [7, 7, 7]]


def sentences_of(lengths):
    """The place of every token and, per token, (sentence, timestep), by timestep and then by sentence."""
    where = [(b, t) for t in range(max(lengths)) for b in range(len(lengths)) if t < lengths[b]]
    position_T = torch.tensor([t * len(lengths) + b for b, t in where])
    padded = len(where) < max(lengths) * len(lengths)
    return Sentences(max(lengths), len(lengths), position_T if padded else None), where


def make():
    torch.manual_seed(0)
    layer = Lstm(width=WIDTH).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def by_cell(layer, x_TD, lengths):
    """Each sentence alone through one cell."""
    _, where = sentences_of(lengths)
    cell = torch.nn.LSTMCell(WIDTH, WIDTH).double()
    weights = {name.removesuffix("_l0"): p for name, p in layer.lstm.named_parameters()}
    rows = [None] * len(where)
    for b, length in enumerate(lengths):
        state = (torch.zeros(1, WIDTH, dtype=torch.float64),) * 2
        for t in range(length):
            place = where.index((b, t))
            state = torch.func.functional_call(cell, weights, (x_TD[place : place + 1], state))
            rows[place] = state[0][0]
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_layer_runs_each_sentence_from_a_zero_state(lengths):
    """Outputs and gradients to inputs, weights and biases are those of one cell, a sentence at a time."""
    layer, (sentences, where) = make(), sentences_of(lengths)
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64).requires_grad_()
    got_TD, nothing = layer(x_TD, sentences)
    want_TD = by_cell(layer, x_TD, lengths)
    assert nothing is None
    torch.testing.assert_close(got_TD, want_TD)
    factor_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    inputs = (x_TD, *layer.parameters())
    got = torch.autograd.grad((got_TD * factor_TD).sum(), inputs)
    want = torch.autograd.grad((want_TD * factor_TD).sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_sentence_does_not_see_its_neighbours():
    """Other tokens in the other sentences leave a sentence's outputs as they are."""
    layer, (sentences, where) = make(), sentences_of([2, 5, 1, 5])
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    mine = torch.tensor([b == 1 for b, _ in where])
    other_TD = torch.where(mine[:, None], x_TD, torch.randn_like(x_TD))
    before_TD, after_TD = layer(x_TD, sentences)[0], layer(other_TD, sentences)[0]
    torch.testing.assert_close(after_TD[mine], before_TD[mine], rtol=1e-13, atol=1e-13)
    assert (after_TD[~mine] != before_TD[~mine]).any(dim=1).all()


def test_no_timestep_sees_a_later_one():
    """A change at timestep 2 changes that sentence from there on, and nothing before."""
    layer, (sentences, where) = make(), sentences_of([4, 5])
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    other_TD = x_TD.clone()
    other_TD[where.index((1, 2))] += 1
    gap_T = (layer(other_TD, sentences)[0] - layer(x_TD, sentences)[0]).abs().amax(dim=1)
    for (b, t), gap in zip(where, gap_T.tolist(), strict=True):
        assert (gap > 1e-6) if (b == 1 and t >= 2) else (gap < 1e-13)


def test_a_new_layer_has_forget_bias_one_and_counts_as_the_paper():
    """The biases of torch's two vectors add up to 1 for the forget gate and 0 elsewhere; 512 units cost 2.1 M."""
    layer = Lstm(width=WIDTH)
    total = (layer.lstm.bias_ih_l0 + layer.lstm.bias_hh_l0).tolist()
    assert total == [0.0] * WIDTH + [1.0] * WIDTH + [0.0] * 2 * WIDTH  # input, forget, cell, output
    with torch.device("meta"):
        assert Lstm(width=512).operations_per_timestep() == 2_097_152


def test_a_width_below_one_is_a_mistake():
    """A width of 0 is refused with the key to change."""
    with pytest.raises(Mistake, match=r"model\.width=0"):
        Lstm(width=0)
