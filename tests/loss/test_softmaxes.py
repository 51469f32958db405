"""Full and sampled softmax against word-by-word formulas, and the drawing of the sampled words.

Shape suffixes: T tokens, D width, V vocabulary, S sampled words.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moe_lm.loss.softmax import FullSoftmax, SampledSoftmax, draw_distinct
from moe_lm.ops.sparse_rows import UniqueIndices

WIDTH = 3


def full(size, chunk_logits=100):
    return FullSoftmax(width=WIDTH, vocabulary_size=size, chunk_logits=chunk_logits)


def sampled(size, num_sampled, chunk_logits=100):
    return SampledSoftmax(width=WIDTH, vocabulary_size=size, num_sampled=num_sampled, chunk_logits=chunk_logits)


def with_bias(softmax):
    """In float64, with biases that are not zero."""
    torch.manual_seed(0)
    torch.nn.init.normal_(softmax.bias_V)
    return softmax.double()


def states(size, num_tokens=30):
    torch.manual_seed(1)
    hidden_TD = torch.randn(num_tokens, WIDTH, dtype=torch.float64).requires_grad_()
    return hidden_TD, torch.randint(size, (num_tokens,))


def check_exact(softmax, hidden_TD, target_T):
    """Value and gradients are those of torch's cross-entropy."""
    inputs = (hidden_TD, softmax.weight_VD, softmax.bias_V)
    got = softmax(hidden_TD, UniqueIndices(target_T), 5)
    want = F.cross_entropy(hidden_TD @ softmax.weight_VD.t() + softmax.bias_V, target_T, reduction="sum")
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk_logits", [1, 40, 10**9])
@pytest.mark.parametrize("train", [True, False])
def test_full_softmax_is_the_cross_entropy(chunk_logits, train):
    """Values and gradients to hidden, weight and bias, in many blocks and in one."""
    check_exact(with_bias(full(11, chunk_logits)).train(train), *states(11))


@pytest.mark.parametrize("size", [2, 11, 16])
def test_sampling_as_many_words_as_there_are_is_exact(size):
    """With V <= num_sampled training is the exact softmax, gradients included."""
    check_exact(with_bias(sampled(size, 16)).train(), *states(size))


@pytest.mark.parametrize("make", [full, lambda size: sampled(size, 4)], ids=["full", "sampled"])
def test_evaluation_is_exact_whatever_the_seed(make):
    """In eval mode the nats are exact, equal for all seeds, and the sum of the tokens' nats."""
    softmax, (hidden_TD, target_T) = with_bias(make(50)).eval(), states(50)
    want_T = F.cross_entropy(hidden_TD @ softmax.weight_VD.t() + softmax.bias_V, target_T, reduction="none").detach()
    with torch.no_grad():
        assert (
            softmax(hidden_TD, UniqueIndices(target_T), 1).item()
            == softmax(hidden_TD, UniqueIndices(target_T), 2).item()
        )
        torch.testing.assert_close(softmax(hidden_TD, UniqueIndices(target_T), 1), want_T.sum())
    torch.testing.assert_close(softmax.token_nats(hidden_TD, target_T), want_T)


@pytest.mark.parametrize("size", [2, 1000, 793_471])
def test_zero_logits_give_the_vocabulary_as_perplexity(size):
    """A softmax of zeros has a perplexity of V to 1e-6, in float32."""
    for softmax in (full(size, 2**22).eval(), sampled(size, 8, 2**22).eval()):
        torch.nn.init.zeros_(softmax.weight_VD)
        with torch.no_grad():
            nats = softmax(torch.randn(6, WIDTH), UniqueIndices(torch.arange(6) % size), 0)
        assert math.exp(nats.item() / 6) == pytest.approx(size, rel=1e-6)


def log_uniform(size):
    """P(i) = log((i+2)/(i+1)) / log(V+1)."""
    return [math.log((i + 2) / (i + 1)) / math.log(size + 1) for i in range(size)]


@pytest.mark.parametrize("chunk_logits", [1, 10**6])
def test_sampled_softmax_is_the_formula_for_the_words_it_drew(chunk_logits):
    """-log softmax of the true word beside the sampled words that differ from it, logits less log expected counts."""
    size, seed = 60, 11
    softmax, (hidden_TD, target_T) = with_bias(sampled(size, 20, chunk_logits)).train(), states(size, 40)
    candidates, num_tries = draw_distinct(20, size, seed)
    log_count = [math.log(1 - (1 - p) ** num_tries) for p in log_uniform(size)]
    hits = 0
    want = torch.zeros((), dtype=torch.float64)
    for hidden_D, target in zip(hidden_TD, target_T.tolist(), strict=True):

        def score(word, hidden_D=hidden_D):
            return hidden_D @ softmax.weight_VD[word] + softmax.bias_V[word] - log_count[word]

        others = [word for word in candidates.tolist() if word != target]
        hits += len(others) < 20
        want = want + torch.stack([score(target), *map(score, others)]).logsumexp(0) - score(target)
    assert 3 < hits < 37  # tokens with and without an accidental hit
    got = softmax(hidden_TD, UniqueIndices(target_T), seed)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    inputs = (hidden_TD, softmax.weight_VD, softmax.bias_V)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_equal_seeds_draw_equal_words():
    """The seed alone decides the words: torch's global generator is neither read nor moved."""
    torch.manual_seed(1)
    first, state = draw_distinct(20, 500, 7), torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = draw_distinct(20, 500, 7), draw_distinct(20, 500, 8)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("count", "size"), [(1, 2), (1, 1000), (20, 21), (100, 1000), (8192, 793_471)])
def test_draw_gives_the_right_number_of_distinct_words(count, size):
    """`count` distinct ids, ascending, all within the vocabulary, in at least `count` tries."""
    for seed in range(5):
        ids, num_tries = draw_distinct(count, size, seed)
        assert ids.dtype == torch.int64
        assert len(ids) == count
        assert (ids[1:] > ids[:-1]).all()
        assert ids[0] >= 0
        assert ids[-1] < size
        assert num_tries >= count


def test_a_single_draw_is_log_uniform():
    """One word a draw: the frequencies of 20,000 draws are P(i), which sums to 1, within five standard errors."""
    size, draws = 6, 20_000
    p = np.array(log_uniform(size))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    results = [draw_distinct(1, size, seed) for seed in range(draws)]
    assert {num_tries for _, num_tries in results} == {1}
    frequency = np.bincount([ids.item() for ids, _ in results], minlength=size) / draws
    assert (np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_draws_until_so_many_are_distinct():
    """Tries and inclusions agree with drawing word by word until `count` differ, and with 1-(1-P)^tries."""
    size, count, rounds = 30, 10, 4000
    p = np.array(log_uniform(size))
    generator = np.random.default_rng(0)
    included, tries = np.zeros(size), []
    for _ in range(rounds):
        seen, number = set(), 0
        for word in generator.choice(size, 300, p=p).tolist():
            number += 1
            seen.add(word)
            if len(seen) == count:
                break
        assert len(seen) == count
        included[list(seen)] += 1
        tries.append(number)
    mine, my_tries = np.zeros(size), []
    for seed in range(rounds):
        ids, num_tries = draw_distinct(count, size, seed)
        mine[ids.numpy()] += 1
        my_tries.append(num_tries)
    error = np.sqrt(2 * included / rounds * (1 - included / rounds) / rounds) + 1e-3
    assert (np.abs(mine - included) / rounds < 5 * error).all()
    assert abs(np.mean(my_tries) - np.mean(tries)) < 5 * np.std(tries) * math.sqrt(2 / rounds)
    # The expected count that the logits are corrected by takes the tries as given: right to 0.02 here.
    expected = np.mean([1 - (1 - p) ** number for number in my_tries], axis=0)
    assert np.abs(mine / rounds - expected).max() < 0.02


def test_operations_count_the_words_compared():
    """Full: every row. Sampled: the sampled rows and the target's, or every row where that is no fewer."""
    assert full(100).operations_per_timestep() == 100 * WIDTH
    assert sampled(100, 8).operations_per_timestep() == 9 * WIDTH
    assert sampled(100, 100).operations_per_timestep() == 100 * WIDTH


def test_no_sampled_word_is_a_mistake():
    """num_sampled = 0 is refused with the key to change."""
    with pytest.raises(ValueError, match=r"softmax\.num_sampled=0"):
        sampled(100, 0)
