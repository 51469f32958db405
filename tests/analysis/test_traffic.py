"""Predicted bytes sent in a step against figures worked out by hand; tests/parallel counts real ones."""

from functools import partial

import pytest
import torch

from moe_lm.analysis.memory import StepSizes
from moe_lm.analysis.traffic import bytes_sent
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax, SampledSoftmax
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE
from moe_lm.optim.adam import Adam

WIDTH, SAMPLED, SIZE = 48, 100, 200
GATE = partial(NoisyTopK, noise_epsilon=0.01)


def model_of(layer) -> LanguageModel:
    softmax = partial(SampledSoftmax, num_sampled=SAMPLED, chunk_logits=1000)
    return LanguageModel(width=WIDTH, vocabulary_size=SIZE, dropout=0.0, layers={"middle": layer}, softmax=softmax)


def recipe(vocabulary: str) -> Adam:
    settings = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.9, "epsilon": 1.0, "clip_norm": 1.0}
    return Adam(**settings, experts="adam", vocabulary=vocabulary)


@pytest.fixture
def flat():
    with torch.device("meta"):
        return model_of(MoE(width=WIDTH, hidden=10, num_experts=10, k=2, gate=GATE))


def step(**sizes) -> StepSizes:
    return StepSizes(**({"words": 20, "micro_words": 20, "num_processes": 2} | sizes))


def test_two_processes(flat):
    """10 tokens per process, half of their 2 assignments remote, in both passes; a ring sends each tensor once."""
    replicated = 2 * WIDTH * 10 + 2 * SIZE * WIDTH + SIZE  # both gate matrices, both of the vocabulary, its biases
    tokens = 10 * 2 * WIDTH * 4 * 4 // 2
    assert bytes_sent(flat, recipe("dense"), step()) == {"tokens": tokens, "gradients": replicated * 4, "rows": 0}


def test_rows(flat):
    """Each process sends half of its row gradients to the other, which sums them, and receives the other sums.

    10 tokens of each process are 10 rows of the embedding here, at most 20 in all; of the softmax 100 candidates, the
    same on both, and 10 targets here, 20 in all.
    """
    of_gates = 2 * WIDTH * 10 * 4
    row, bias = WIDTH * 4 + 8, 4 + 8
    rows = row * (10 / 2 + 20 / 2) + (row + bias) * (110 / 2 + 120 / 2)
    assert bytes_sent(flat, recipe("lazy"), step()) == {
        "tokens": 10 * 2 * WIDTH * 4 * 4 // 2,
        "gradients": of_gates,
        "rows": rows,
    }


def test_a_sharded_vocabulary(flat):
    """Half of the rows are remote: indices are sent, rows received, gradients sent."""
    there_and_back = (8 + 2 * WIDTH * 4) * (10 + 110) / 2 + (8 + 2 * 4) * 110 / 2
    found = bytes_sent(flat, recipe("lazy"), step(vocab_parallel=True))
    assert found["rows"] == there_and_back
    assert found["gradients"] == 2 * WIDTH * 10 * 4


def test_an_exact_softmax_over_a_sharded_vocabulary():
    """Tokens go to the rows: 10 targets, hidden states and their gradients; sums of all 20 tokens both ways."""
    layer, softmax = Lstm(width=WIDTH), partial(FullSoftmax, chunk_logits=1000)
    with torch.device("meta"):
        model = LanguageModel(width=WIDTH, vocabulary_size=SIZE, dropout=0.0, layers={"lower": layer}, softmax=softmax)
    of_embedding = (8 + 2 * WIDTH * 4) * 10 / 2
    of_softmax = 10 * 8 + 2 * 10 * WIDTH * 4 + 20 * 8 + 2 * 20 * 8 / 2
    found = bytes_sent(model, recipe("lazy"), step(vocab_parallel=True))
    assert found["rows"] == of_embedding + of_softmax


def test_alone_nothing_is_sent(flat):
    assert set(bytes_sent(flat, recipe("lazy"), step(num_processes=1)).values()) == {0}


def test_several_micro_batches_send_tokens_once_more(flat):
    """The first pass, which collects statistics, adds a forward pass: three round trips instead of two."""
    once, more = (bytes_sent(flat, recipe("lazy"), step(words=40, micro_words=m))["tokens"] for m in (20, 10))
    assert more == 1.5 * once


def test_copies_of_experts(flat):
    """4 processes as 2 expert-parallel pairs of 5 experts each: half of the rows are remote, replicas sum gradients."""
    found = bytes_sent(flat, recipe("dense"), step(words=40, num_processes=4, expert_parallel_size=2))
    assert found["tokens"] == 10 * 2 * WIDTH * 4 * 4 // 2
    replicated = 2 * WIDTH * 10 + 2 * SIZE * WIDTH + SIZE
    assert found["gradients"] == replicated * 4 * 2 * 3 / 4 + 5 * 2 * WIDTH * 10 * 4


def test_bfloat16_halves_what_travels(flat):
    assert bytes_sent(flat, recipe("dense"), step(bfloat16=True))["tokens"] == 10 * 2 * WIDTH * 2 * 4 // 2


def test_hierarchical_and_without_experts():
    """2 groups a token and 2 experts in each are 4 assignments."""
    layer = HierarchicalMoE(width=WIDTH, hidden=10, num_experts=32, num_groups=4, k=2, gate=GATE, primary_gate=GATE)
    assert bytes_sent(model_of(layer), recipe("dense"), step())["tokens"] == 10 * 4 * WIDTH * 4 * 4 // 2
    assert bytes_sent(model_of(Lstm(width=WIDTH)), recipe("dense"), step())["tokens"] == 0
