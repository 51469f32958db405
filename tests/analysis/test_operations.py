"""Operations, parameters and FLOPs, summed up by hand (test_tables: against the paper) and as torch counts products."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lm.analysis.cost import (
    flops_per_word,
    operations_per_timestep,
    parameters_total,
    parameters_without_embedding_and_softmax,
)
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build_model
from moe_lm.data.batch import PaddedLayout, collate
from moe_lm.data.prepared import Split
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE

WIDTH, SIZE, NUM_TOKENS = 8, 30, 12


def test_figures_of_moe_256_to_the_number():
    """2 LSTMs of 4*512*1024, 4 of 256 experts of 2*512*1024, and both gate matrices of 512*256; no expert biases."""
    with torch.device("meta"):
        model = build_model(resolved(composed("train", ["model=moe_256"])), 793_471)
    assert operations_per_timestep(model) == 2 * 2_097_152 + 4 * 1_048_576 + 262_144 == 8_650_752
    assert parameters_without_embedding_and_softmax(model) == 2 * 2_097_152 + 256 * 1_048_576 + 262_144
    biases = 2 * 8 * 512 + 793_471  # torch's two vectors an LSTM, and the softmax's
    assert parameters_total(model) == 2 * 793_471 * 512 + 272_891_904 + biases


def make(*layers):
    return LanguageModel(
        width=WIDTH,
        vocabulary_size=SIZE,
        dropout=0.0,
        layers={str(number): layer for number, layer in enumerate(layers)},
        softmax=partial(FullSoftmax, chunk_logits=100),
    )


def batch():
    split = Split(
        tokens=np.array([5, 6, 7, 1] * 3, dtype=np.int32),
        starts=np.array([0, 4, 8, 12]),
        words=np.array([4, 4, 4], dtype=np.uint32),
    )
    return collate(split, np.arange(3), 0)


def counted(run):
    """Operations of all matrix products, as torch counts them, 2 a multiply-add; left alone it overlooks addmm_."""

    def in_place(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()


def moe(num_experts, k):
    gate = partial(NoisyTopK, noise_epsilon=0.01)
    return MoE(width=WIDTH, hidden=10, num_experts=num_experts, k=k, gate=gate)


LAYERS = {
    "wide": lambda: FeedForward(width=WIDTH, hidden=20, num_hidden=1),
    "deep": lambda: FeedForward(width=WIDTH, hidden=10, num_hidden=4),
    "moe": lambda: moe(6, 2),
    "moe, all experts": lambda: moe(3, 3),
    "moe, one expert": lambda: moe(1, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forward_makes_the_operations_claimed(name):
    """A training pass of the layer multiplies exactly operations_per_timestep numbers a token."""
    layer = LAYERS[name]()
    x_TD = torch.randn(NUM_TOKENS, WIDTH)
    layout = PaddedLayout(NUM_TOKENS, 1, None)
    assert counted(lambda: layer(x_TD, layout)) == 2 * NUM_TOKENS * layer.operations_per_timestep() > 0


def test_lstm_makes_the_operations_claimed():
    """torch counts nothing for its fused LSTM; its cell, run step by step, makes the operations claimed."""
    cell = torch.nn.LSTMCell(WIDTH, WIDTH)
    claimed = Lstm(width=WIDTH).operations_per_timestep()
    assert counted(lambda: cell(torch.randn(NUM_TOKENS, WIDTH))) == 2 * NUM_TOKENS * claimed


@pytest.mark.parametrize("name", LAYERS)
def test_training_flops_are_those_of_forward_and_backward(name):
    """flops_per_word is what torch counts over a training step with the full softmax: 2 a multiply-add."""
    model, data = make(LAYERS[name](), LAYERS["wide"]()), batch()
    assert counted(lambda: model(data)[0].backward()) == NUM_TOKENS * flops_per_word(model)


def test_operations_of_a_stack_add_up_and_leave_the_softmax_out():
    """The softmax counts in FLOPs only; biases count in parameters_total only."""
    model = make(Lstm(width=WIDTH), FeedForward(width=WIDTH, hidden=20, num_hidden=1))
    assert operations_per_timestep(model) == 4 * 8 * 16 + 2 * 8 * 20
    assert flops_per_word(model) == 6 * (4 * 8 * 16 + 2 * 8 * 20 + 30 * 8)
    assert parameters_without_embedding_and_softmax(model) == 4 * 8 * 16 + 2 * 8 * 20
    assert parameters_total(model) == 4 * 8 * 16 + 2 * 8 * 20 + 2 * 4 * 8 + 2 * 30 * 8 + 30
