"""The LSTM layers against a cell written out in float64, run sentence by sentence from a zero state.

Shape suffixes: T tokens, D width, U units, L timesteps.
"""

import pytest
import torch

from moe_lm.data.batch import PaddedLayout
from moe_lm.model.lstm import Lstm, ProjectedLstm

WIDTH = 4
LENGTHS = [[3], [1, 1], [2, 5, 1, 5], [7, 7, 7]]
UNITS = [None, 9, 5, 4, 3]  # plain; projected to fewer numbers than there are units, as many, more


def sentences_of(lengths):
    """The place of every token and, per token, (sentence, timestep), by timestep and then by sentence."""
    where = [(b, t) for t in range(max(lengths)) for b in range(len(lengths)) if t < lengths[b]]
    position_T = torch.tensor([t * len(lengths) + b for b, t in where])
    padded = len(where) < max(lengths) * len(lengths)
    return PaddedLayout(max(lengths), len(lengths), position_T if padded else None), where


def make(units=None):
    """A layer with random parameters: plain, or projected from that many units."""
    torch.manual_seed(0)
    layer = (Lstm(width=WIDTH) if units is None else ProjectedLstm(width=WIDTH, units=units)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def by_hand(layer, x_TD, lengths):
    """Each sentence alone, a timestep at a time: four gates, a cell, its output, its projection."""
    _, where = sentences_of(lengths)
    weight = {name.removesuffix("_l0"): p for name, p in layer.lstm.named_parameters()}
    units = len(weight["bias_ih"]) // 4
    projection_DU = weight.get("weight_hr", torch.eye(units, dtype=torch.float64))
    rows = [None] * len(where)
    for b, length in enumerate(lengths):
        out_D, cell_U = x_TD.new_zeros(len(projection_DU)), x_TD.new_zeros(units)
        for t in range(length):
            place = where.index((b, t))
            sums = weight["weight_ih"] @ x_TD[place] + weight["bias_ih"] + weight["weight_hh"] @ out_D
            enter, forget, new, leave = (sums + weight["bias_hh"]).view(4, units)
            cell_U = forget.sigmoid() * cell_U + enter.sigmoid() * new.tanh()
            out_D = projection_DU @ (leave.sigmoid() * cell_U.tanh())
            rows[place] = out_D
    return torch.stack(rows)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_layer_runs_each_sentence_from_a_zero_state(lengths, units):
    """Outputs and gradients to inputs, weights and biases are those of one cell, a sentence at a time."""
    layer, (sentences, where) = make(units), sentences_of(lengths)
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64).requires_grad_()
    got_TD, nothing = layer(x_TD, sentences)
    want_TD = by_hand(layer, x_TD, lengths)
    assert nothing is None
    torch.testing.assert_close(got_TD, want_TD)
    factor_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    inputs = (x_TD, *layer.parameters())
    got = torch.autograd.grad((got_TD * factor_TD).sum(), inputs)
    want = torch.autograd.grad((want_TD * factor_TD).sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("units", UNITS)
def test_a_sentence_does_not_see_its_neighbours(units):
    """Other tokens in the other sentences leave a sentence's outputs as they are."""
    layer, (sentences, where) = make(units), sentences_of([2, 5, 1, 5])
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    mine = torch.tensor([b == 1 for b, _ in where])
    other_TD = torch.where(mine[:, None], x_TD, torch.randn_like(x_TD))
    before_TD, after_TD = layer(x_TD, sentences)[0], layer(other_TD, sentences)[0]
    torch.testing.assert_close(after_TD[mine], before_TD[mine], rtol=1e-13, atol=1e-13)
    assert (after_TD[~mine] != before_TD[~mine]).any(dim=1).all()


@pytest.mark.parametrize("units", UNITS)
def test_no_timestep_sees_a_later_one(units):
    """A change at timestep 2 changes that sentence from there on, and nothing before."""
    layer, (sentences, where) = make(units), sentences_of([4, 5])
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


@pytest.mark.parametrize(("units", "millions"), [(512, "2.36"), (1024, "4.72"), (2048, "9.44")])
def test_a_projected_layer_counts_as_the_paper(units, millions):
    """4 gates of (512 inputs + 512 recurrent inputs) and the projection: the LSTM rows of Table 7."""
    with torch.device("meta"):
        operations = ProjectedLstm(width=512, units=units).operations_per_timestep()
    assert operations == 4 * units * (512 + 512) + units * 512
    assert f"{operations / 1e6:.2f}" == millions


@pytest.mark.parametrize("units", UNITS[1:])
def test_a_new_projected_layer_begins_as_torch_begins(units):
    """Uniform weights of bound units^-0.5, the projection's too, forget bias 1; the names are torch's everywhere."""
    layer = ProjectedLstm(width=400, units=100 * units).lstm
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"]
    assert [name for name, _ in layer.named_parameters()] == names
    assert [len(p) // (100 * units) for p in layer.parameters()][:4] == [4, 4, 4, 4]
    bound = (100 * units) ** -0.5
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0, layer.weight_hr_l0):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    gates = (layer.bias_ih_l0 + layer.bias_hh_l0).view(4, -1)
    assert (gates == torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]).all()  # input, forget, cell, output


@pytest.mark.parametrize("units", UNITS)
def test_the_state_dict_holds_the_whole_layer(units):
    """A layer that takes up another's state gives its outputs."""
    layer, (sentences, where) = make(units), sentences_of([2, 5, 1])
    other = (Lstm(width=WIDTH) if units is None else ProjectedLstm(width=WIDTH, units=units)).double()
    x_TD = torch.randn(len(where), WIDTH, dtype=torch.float64)
    assert (other(x_TD, sentences)[0] != layer(x_TD, sentences)[0]).any()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x_TD, sentences)[0], layer(x_TD, sentences)[0])


@pytest.mark.parametrize("units", [9, 4, 3])
def test_bfloat16_autocast_trains_a_projected_layer(units):
    """Under CPU autocast outputs are near float32's and every parameter gets a finite gradient in float32."""
    layer, (sentences, where) = ProjectedLstm(width=WIDTH, units=units), sentences_of([2, 5, 1])
    x_TD = torch.randn(len(where), WIDTH)
    want_TD, _ = layer(x_TD, sentences)
    with torch.autocast("cpu", torch.bfloat16):
        got_TD, _ = layer(x_TD, sentences)
    torch.testing.assert_close(got_TD.float(), want_TD, rtol=0.05, atol=0.01)
    got_TD.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_sizes_below_one_are_a_mistake():
    """A width or a number of units of 0 is refused with the key to change."""
    with pytest.raises(ValueError, match=r"model\.width=0"):
        Lstm(width=0)
    with pytest.raises(ValueError, match=r"model\.width=0"):
        ProjectedLstm(width=0, units=3)
    with pytest.raises(ValueError, match=r"model\.lstm_units=0"):
        ProjectedLstm(width=3, units=0)
