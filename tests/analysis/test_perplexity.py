"""Perplexity against a sum over sentences in float64, and its independence of the batching.

Shape suffixes: V vocabulary.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from moe_lm.analysis.perplexity import EvalResult, evaluate
from moe_lm.data.batch import PaddedLayout
from moe_lm.data.prepared import Split
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax, SampledSoftmax
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE

WIDTH, SIZE, START, END = 6, 40, 0, 1


def make(softmax=FullSoftmax, **settings):
    torch.manual_seed(0)
    gate = partial(NoisyTopK, noise_epsilon=0.01)
    moe = MoE(width=WIDTH, hidden=8, num_experts=6, k=2, gate=gate)
    with torch.no_grad():
        moe.gate.gate_DE.normal_()
    return LanguageModel(
        width=WIDTH,
        vocabulary_size=SIZE,
        dropout=0.5,
        layers={"lower": Lstm(width=WIDTH), "middle": moe},
        softmax=partial(softmax, **{"chunk_logits": 2000} | settings),
    )


def make_split(num_sentences=300):
    """Sentences of 1 to 30 tokens, each token of two words to tell them apart."""
    generator = np.random.default_rng(0)
    length_N = generator.integers(1, 31, num_sentences)
    starts = np.concatenate([[0], np.cumsum(length_N)])
    tokens = generator.integers(2, SIZE, starts[-1]).astype(np.int32)
    tokens[starts[1:] - 1] = END
    return Split(tokens, starts, (2 * length_N).astype(np.uint32))


MODEL, SPLIT = make(), make_split()


def measured(model=MODEL, split=SPLIT, max_sentences=64, max_words=10**6, **more):
    return evaluate(model, split, start=START, max_sentences=max_sentences, max_words=max_words, **more)


def by_sentence(model, split, count):
    """Nats of the first `count` sentences, each alone, in float64."""
    model = make().double().eval()
    nats = 0.0
    for n in range(count):
        ids = split.tokens[split.starts[n] : split.starts[n + 1]].tolist()
        x_TD = model.embedding.weight_VD[torch.tensor([START, *ids[:-1]])]
        cell, _ = model.layers["lower"].lstm(x_TD[:, None])
        x_TD = x_TD + cell[:, 0]
        x_TD = x_TD + model.layers["middle"](x_TD, PaddedLayout(len(x_TD), 1, None))[0]
        log_p = (x_TD @ model.softmax.weight_VD.t() + model.softmax.bias_V).log_softmax(dim=1)
        nats -= sum(log_p[t, word].item() for t, word in enumerate(ids))
    return nats


def test_nats_are_the_sum_over_sentences():
    """The whole split's nats equal those of sentences fed one by one in float64; words are the split's."""
    result = measured()
    assert result.nats == pytest.approx(by_sentence(MODEL, SPLIT, 300), rel=1e-6)
    assert (result.words, result.sentences) == (2 * len(SPLIT.tokens), 300)
    assert result.perplexity == pytest.approx(math.exp(result.nats / result.words))
    assert result.metrics() == {
        "perplexity": result.perplexity,
        "nats": result.nats,
        "predicted_words": result.words,
    }


@pytest.mark.parametrize(("max_sentences", "max_words"), [(1, 10**6), (7, 10**6), (1000, 10**6), (1000, 50), (1000, 5)])
def test_perplexity_does_not_depend_on_the_batching(max_sentences, max_words):
    """With 1, 7 or 1,000 sentences at a time, or few words, the perplexity agrees to 1e-6."""
    result = measured(max_sentences=max_sentences, max_words=max_words)
    want = measured(max_sentences=16)
    assert result.perplexity == pytest.approx(want.perplexity, rel=1e-6)
    assert (result.words, result.sentences) == (want.words, want.sentences)


@pytest.mark.parametrize("make_it", [make, partial(make, SampledSoftmax, num_sampled=5)], ids=["full", "sampled"])
def test_zero_output_weights_give_the_vocabulary(make_it):
    """A model that knows nothing has perplexity V to 1e-6, with either softmax: evaluation is exact."""
    model = make_it().train()
    torch.nn.init.zeros_(model.softmax.weight_VD)
    split = Split(SPLIT.tokens, SPLIT.starts, (SPLIT.words // 2).astype(np.uint32))
    assert measured(model, split).perplexity == pytest.approx(SIZE, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 5, 299, 300, 10_000])
def test_limit_measures_the_first_sentences(limit):
    """`limit` counts the split's first sentences, in the split's order, or all where it is beyond them."""
    result, count = measured(limit=limit), min(limit, 300)
    assert result.sentences == count
    assert result.words == 2 * SPLIT.starts[count]
    if limit <= 5:
        assert result.nats == pytest.approx(by_sentence(MODEL, SPLIT, count), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_is_without_dropout_noise_gradients_and_traces(training):
    """Two measurements agree to the bit, and the model's mode, gradients and torch's generator stay as they were."""
    model = make().train(training)
    state, graphs = torch.random.get_rng_state(), []
    model.layers["lower"].register_forward_hook(lambda layer, given, made: graphs.append(made[0].requires_grad))
    first, second = measured(model), measured(model)
    assert not any(graphs)
    assert first == second
    assert model.training == model.layers["middle"].training == training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_nats_add_up_in_float64():
    """2^24 nats and then ones, a sentence at a time: float32 would lose every one of them."""

    class Constant(torch.nn.Module):
        device = torch.device("cpu")
        sizes = iter([2.0**24] + [1.0] * 299)

        def token_nats(self, batch):
            return torch.tensor([next(self.sizes)], dtype=torch.float64)

    assert measured(Constant(), max_sentences=1).nats == 2**24 + 299


def test_progress_counts_every_word():
    """The progress callback receives the words of each micro-batch."""
    amounts = []
    result = measured(on_progress=amounts.append, max_sentences=7)
    assert sum(amounts) == result.words
    assert len(amounts) == math.ceil(300 / 7)


def test_perplexity_beyond_a_float_is_infinite():
    """A diverged model reports infinity and does not fail."""
    assert EvalResult(nats=1e6, words=1, sentences=1).perplexity == math.inf
    assert EvalResult(nats=math.log(35.7) * 8, words=8, sentences=1).perplexity == pytest.approx(35.7)
