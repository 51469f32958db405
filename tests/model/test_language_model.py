"""The stack: residual sums, dropout, and what reaches the softmax.

Shape suffixes: T tokens, D width, V vocabulary.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from moe_lm.data.batch import collate
from moe_lm.data.prepared import Split
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE

WIDTH, SIZE, START = 4, 9, 0
SPLIT = Split(
    tokens=np.array([5, 6, 3, 1, 7, 1, 8, 8, 1], dtype=np.int32),
    starts=np.array([0, 4, 6, 9]),
    words=np.array([4, 2, 3], dtype=np.uint32),
)
BATCH = collate(SPLIT, np.arange(3), START)


class Affine(nn.Module):
    """y = a x + b; passes its name on as the gating if it has one."""

    def __init__(self, a, b, gating=None):
        super().__init__()
        self.a, self.b, self.gating = a, b, gating

    def forward(self, x_TD, sentences):
        assert sentences.index_T is BATCH.layout.index_T
        assert sentences.input_T is BATCH.input_T
        return self.a * x_TD + self.b, self.gating


def make(layers, dropout=0.0, width=WIDTH, size=SIZE):
    torch.manual_seed(0)
    return LanguageModel(
        width=width,
        vocabulary_size=size,
        dropout=dropout,
        layers=layers,
        softmax=partial(FullSoftmax, chunk_logits=20),
    )


def mixture(**changes):
    gate = partial(NoisyTopK, noise_epsilon=0.01)
    return MoE(**{"width": WIDTH, "hidden": 6, "num_experts": 5, "k": 2, "gate": gate} | changes)


def test_stack_is_residual_sums_in_order():
    """x + layer(x), layer by layer in the order given, starting from the input words' embeddings."""
    model = make({"z": Affine(2.0, 1.0), "a": Affine(0.0, -3.0, "chosen"), "m": Affine(1.0, 0.0)}).double()
    hidden_TD, gatings = model.hidden(BATCH)
    for row, word in zip(hidden_TD, BATCH.input_T.tolist(), strict=True):
        want = [2 * (3 * e + 1 - 3) for e in model.embedding.weight_VD[word].tolist()]
        assert row.tolist() == pytest.approx(want, rel=1e-12)
    assert gatings == {"a": "chosen"}


def test_nats_are_those_of_the_layers_put_together_by_hand():
    """Embedding, LSTM, MoE, feed-forward and softmax, composed in the test, give the model's nats and gradients."""
    model = make({"l": Lstm(width=WIDTH), "m": mixture(), "f": FeedForward(width=WIDTH, hidden=3, num_hidden=2)})
    model = model.double().eval()
    nats, gatings = model(BATCH)
    x_TD = torch.stack([model.embedding.weight_VD[word] for word in BATCH.input_T.tolist()])
    for name in ("l", "m", "f"):
        x_TD = x_TD + model.layers[name](x_TD, BATCH.layout)[0]
    logits_TV = x_TD @ model.softmax.weight_VD.t() + model.softmax.bias_V
    want = sum(logits_TV[t].exp().sum().log() - logits_TV[t, word] for t, word in enumerate(BATCH.target_T.tolist()))
    assert list(gatings) == ["m"]
    assert nats.dtype == torch.float64
    torch.testing.assert_close(nats, want)
    torch.testing.assert_close(model.token_nats(BATCH).sum(), want.detach())
    parameters = [p for name, p in model.named_parameters() if "noise" not in name]
    got, wanted = torch.autograd.grad(nats, parameters), torch.autograd.grad(want, parameters)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_word_sees_itself_or_what_follows():
    """Changing the last word of a sentence changes no nats but its own and those after it."""
    model = make({"l": Lstm(width=WIDTH), "m": mixture(), "u": Lstm(width=WIDTH)}).eval()
    tokens = SPLIT.tokens.copy()
    tokens[2] = 4  # the third word of sentence 0
    other = collate(Split(tokens, SPLIT.starts, SPLIT.words), np.arange(3), START)
    gap_T = (model.token_nats(other) - model.token_nats(BATCH)).abs().tolist()
    # By timestep: 5 7 8 | 6 . 8 | 3 . (2) | . : sentence 0 stands at places 0, 3, 6 and 8.
    assert [t for t, gap in enumerate(gap_T) if gap > 1e-7] == [6, 8]


def test_training_drops_and_scales_up_the_rest():
    """Dropout 0.3 leaves 70 % of embedding and layer outputs, divided by 0.7, and never touches the residual."""
    width = 20_000
    model = make({"one": Affine(0.0, 1.0)}, dropout=0.3, width=width, size=SIZE).train()
    with torch.no_grad():
        model.embedding.weight_VD.fill_(7.0)
    values, counts = (x.tolist() for x in model.hidden(BATCH)[0].double().mul(0.7).round().unique(return_counts=True))
    assert values == [0.0, 1.0, 7.0, 8.0]  # (7 + 1), 7, 1 or nothing kept
    total = len(BATCH.input_T) * width
    for count, chance in zip(counts, [0.3 * 0.3, 0.3 * 0.7, 0.7 * 0.3, 0.7 * 0.7], strict=True):
        assert abs(count / total - chance) < 5 * math.sqrt(chance * (1 - chance) / total)
    model.eval()
    assert (model.hidden(BATCH)[0] == 8).all()


def test_same_seed_same_dropout():
    """Dropout and noise follow torch's generator: seeding it repeats them."""
    model = make({"l": Lstm(width=WIDTH), "m": mixture()}, dropout=0.5).train()
    nats = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nats.append(model(BATCH)[0].item())
    assert nats[0] == nats[1] != nats[2]


def test_seed_reaches_the_softmax():
    """The model hands its seed on, which fixes the sampled words."""
    seen = []

    class Spy(nn.Module):
        def forward(self, hidden_TD, targets, seed):
            seen.append((seed, targets.row_T))
            return hidden_TD.sum().double()

    model = make({})
    model.softmax = Spy()
    model(BATCH, 17)
    [(seed, target_T)] = seen
    assert seed == 17
    assert target_T is BATCH.target_T


def test_bfloat16_autocast_trains_every_parameter():
    """Under CPU autocast nats are near float32's and every parameter gets a finite gradient in float32."""
    model = make({"l": Lstm(width=WIDTH), "m": mixture(k=5), "u": Lstm(width=WIDTH)}).eval()
    want = model(BATCH)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        nats, _ = model(BATCH)
    nats.backward()
    assert nats.item() == pytest.approx(want, rel=0.02)
    for name, parameter in model.named_parameters():
        if "noise" not in name:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_wrong_dropout_is_a_mistake(dropout):
    """Dropout outside [0, 1) is refused with its key."""
    with pytest.raises(ValueError, match=r"model\.dropout"):
        make({}, dropout=dropout)
