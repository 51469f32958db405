"""Which sentences make which micro-batch, and how their tokens are laid out.

Shape suffixes: L timesteps, B sentences, T tokens, D width.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from moe_lm.data.batching import POOL_STEPS, Batches, iter_eval_batches
from moe_lm.data.micro_batch import lengths, micro_batch
from moe_lm.data.prepared import Split
from moe_lm.data.sentences import Sentences
from moe_lm.errors import UserError

START, END, FILL, FIRST = 0, 1, 2, 10


SMALL_PARTS = (2048, 128, 16)


def split_of(length_N, words_per_token=1):
    """Sentence n is the ids FIRST + n, FILL, ..., FILL, END: its first target names it."""
    length_N = np.asarray(length_N, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(length_N)])
    tokens = np.full(starts[-1], FILL, dtype=np.int32)
    tokens[starts[:-1]] = FIRST + np.arange(len(length_N))
    tokens[starts[1:] - 1] = END
    return Split(tokens=tokens, starts=starts, words=(length_N * words_per_token).astype(np.uint32))


def realistic(num_sentences, seed=0):
    """Lognormal lengths as of news text: mean 25 words with `</S>`, 2 to 250."""
    generator = np.random.default_rng(seed)
    return np.clip(np.round(generator.lognormal(np.log(25) - 0.18, 0.6, num_sentences)), 2, 250)


def batches_of(split, words=400, micro_words=200, seed=1):
    return Batches(split, start=START, seed=seed, words=words, micro_words=micro_words)


def taken_apart(batch):
    """Each sentence's inputs and targets, in order."""
    sentences = [([], []) for _ in range(batch.sentences.num_sentences)]
    rows = zip(batch.sentence_T.tolist(), batch.input_T.tolist(), batch.target_T.tolist(), strict=True)
    for sentence, given, target in rows:
        sentences[sentence][0].append(given)
        sentences[sentence][1].append(target)
    return sentences


def named(batch):
    """The sentences' numbers, each checked token by token."""
    numbers = []
    for given, target in taken_apart(batch):
        assert given == [START, *target[:-1]]
        assert target[1:] == [FILL] * (len(target) - 2) + [END]
        numbers.append(target[0] - FIRST)
    return numbers


def same(one, other):
    return all(
        torch.equal(a.input_T, b.input_T) and torch.equal(a.target_T, b.target_T)
        for a, b in zip(one, other, strict=True)
    )


def test_layout_by_hand():
    """Sentences `5 6 </S>` and `7 </S>`: by timestep, then sentence; inputs a step late after `<S>`."""
    split = Split(
        tokens=np.array([5, 6, END, 7, END], dtype=np.int32),
        starts=np.array([0, 3, 5]),
        words=np.array([2, 2], dtype=np.uint32),
    )
    batch = micro_batch(split, np.array([0, 1]), START)
    assert batch.input_T.tolist() == [START, START, 5, 7, 6]
    assert batch.target_T.tolist() == [5, 7, 6, END, END]
    assert batch.sentence_T.tolist() == [0, 1, 0, 1, 0]
    assert batch.sentences.position_T.tolist() == [0, 1, 2, 3, 4]
    assert (batch.sentences.num_steps, batch.sentences.num_sentences, batch.num_words) == (3, 2, 4)
    turned = micro_batch(split, np.array([1, 0]), START)
    assert turned.target_T.tolist() == [7, 5, END, 6, END]
    assert turned.sentences.position_T.tolist() == [0, 1, 2, 3, 5]
    assert micro_batch(split, np.array([1]), START).sentences.position_T is None
    assert batch.input_T.dtype == batch.target_T.dtype == batch.sentence_T.dtype == torch.int64


@pytest.mark.parametrize("length_B", [[3, 1, 4], [2, 2], [5]], ids=str)
def test_pad_and_unpad_are_inverse(length_B):
    """Tokens stand where the rectangle's sentences and steps say, zeros elsewhere; gradients pass both ways."""
    batch = micro_batch(split_of(length_B), np.arange(len(length_B)), START)
    place, sentence_T = batch.sentences, batch.sentence_T.tolist()
    x_TD = torch.randn(sum(length_B), 2, dtype=torch.float64).requires_grad_()
    x_LBD, seen = place.pad(x_TD), Counter()
    want_LBD = torch.zeros(max(length_B), len(length_B), 2, dtype=torch.float64)
    for row, sentence in zip(x_TD.detach(), sentence_T, strict=True):
        want_LBD[seen[sentence], sentence] = row
        seen[sentence] += 1
    assert torch.equal(x_LBD.detach(), want_LBD)
    assert torch.equal(place.unpad(x_LBD), x_TD)
    assert torch.autograd.gradcheck(place.pad, x_TD)
    assert torch.autograd.gradcheck(place.unpad, x_LBD.detach().requires_grad_())


def test_padding_holds_nothing_of_the_tokens():
    """What stands in the padding does not reach the tokens, nor its gradient."""
    place = Sentences(2, 2, torch.tensor([0, 1, 3]))
    y_LBD = torch.tensor([[[1.0], [2.0]], [[float("nan")], [3.0]]]).requires_grad_()
    y_TD = place.unpad(y_LBD)
    assert y_TD.tolist() == [[1.0], [2.0], [3.0]]
    y_TD.sum().backward()
    assert y_LBD.grad.tolist() == [[[1.0], [1.0]], [[0.0], [1.0]]]


@pytest.mark.parametrize(("num_sentences", "num_pools"), [(1500, 4), (5000, 2), (40, 3)])
def test_every_sentence_comes_once_an_epoch(num_sentences, num_pools):
    """Over whole pools, every sentence comes as often as every other, or once more in the epoch under way."""
    batches = batches_of(split_of(realistic(num_sentences)))
    counts = Counter(n for s in range(POOL_STEPS * num_pools) for batch in batches.step(s) for n in named(batch))
    epochs, rest = divmod(num_pools * batches.sentences_per_pool, num_sentences)
    assert sum(counts.values()) == epochs * num_sentences + rest
    assert {counts[n] for n in range(num_sentences)} <= {epochs, epochs + 1}
    assert sum(count == epochs + 1 for count in counts.values()) == (rest if epochs else len(counts))
    assert batches.epoch(POOL_STEPS * num_pools) == pytest.approx(epochs + rest / num_sentences)


def test_a_step_is_a_pure_function_of_seed_and_step():
    """In any order of access, and from a fresh object, a step's micro-batches are the same to the token."""
    split = split_of(realistic(1500))
    forward = batches_of(split)
    steps = [forward.step(s) for s in range(200)]
    order = np.random.default_rng(0).permutation(200)[:40].tolist()
    once_used = batches_of(split)
    for s in order:
        assert same(once_used.step(s), steps[s])
        assert same(batches_of(split).step(s), steps[s])
        torch.rand(1)
        np.random.rand()
    assert not same(batches_of(split, seed=2).step(0), steps[0])


def test_epochs_and_seeds_differ_in_order():
    """The endless sequence shuffles each epoch anew, and each seed; hardly a sentence keeps its place."""
    batches = batches_of(split_of(realistic(1000)))
    other = batches_of(split_of(realistic(1000)), seed=2)
    first, second, third = (batches._stream(e * 1000, (e + 1) * 1000) for e in range(3))
    elsewhere = other._stream(0, 1000)
    for one, two in [(first, second), (second, third), (first, elsewhere), (first, np.arange(1000))]:
        assert sorted(one) == sorted(two) == list(range(1000))
        assert (one == two).sum() < 10  # a random permutation keeps one on average
    across = batches._stream(900, 2100)
    assert across.tolist() == [*first[900:], *second, *third[:100]]


def test_order_is_the_same_on_every_machine():
    """The first sentences for seed 1, as a Philox written in plain Python gives them; resuming depends on it."""
    assert batches_of(split_of([2] * 1000))._stream(0, 5).tolist() == [285, 93, 617, 520, 96]


@pytest.mark.parametrize(("words", "micro_words"), [(4096, 4096), (8192, 8192), (8192, 1024)])
def test_padding_stays_below_two_percent(words, micro_words):
    """Of the LSTM's steps over four pools of news-like sentences, at most 2 % are padding (docs/design.md)."""
    batches = batches_of(split_of(realistic(60_000)), words=words, micro_words=micro_words)
    steps = tokens = 0
    for s in range(256):
        for batch in batches.step(s):
            steps += batch.sentences.num_steps * batch.sentences.num_sentences
            tokens += len(batch.target_T)
    assert 0 < 1 - tokens / steps <= 0.02


@pytest.mark.parametrize(
    ("words", "micro_words", "num_parts"), [(4096, 4096, 1), (8192, 1024, 8), (3000, 1000, 3), SMALL_PARTS]
)
def test_steps_hold_the_words_asked_for(words, micro_words, num_parts):
    """Each step has words / micro_words micro-batches near micro_words, and words on average to 1 %."""
    batches = batches_of(split_of(realistic(30_000)), words=words, micro_words=micro_words)
    steps = [batches.step(s) for s in range(3 * POOL_STEPS)]
    assert {len(step) for step in steps} == {num_parts}
    sizes = [[batch.num_words for batch in step] for step in steps]
    assert np.mean([sum(parts) for parts in sizes]) == pytest.approx(words, rel=0.01)
    assert all(abs(size - micro_words) < 0.1 * micro_words + 250 for parts in sizes for size in parts)


@pytest.mark.parametrize(("words", "micro_words"), [(8192, 5600), (1000, 450)])
def test_micro_batches_hold_no_more_than_asked_for(words, micro_words):
    """On average a micro-batch has at most micro_words, also where they do not divide the words."""
    batches = batches_of(split_of(realistic(30_000)), words=words, micro_words=micro_words)
    sizes = [batch.num_words for s in range(POOL_STEPS) for batch in batches.step(s)]
    assert np.mean(sizes) <= 1.02 * micro_words


def test_a_step_mixes_lengths():
    """Which micro-batches form a step is random: its parts differ in length, and short ones do not all come first."""
    batches = batches_of(split_of(realistic(30_000)), words=8192, micro_words=1024)
    spread, firsts = [], []
    for s in range(POOL_STEPS):
        longest = [batch.sentences.num_steps for batch in batches.step(s)]
        spread.append(max(longest) - min(longest))
        firsts.append(longest[0])
    assert np.median(spread) > 20
    assert abs(np.corrcoef(np.arange(POOL_STEPS), firsts)[0, 1]) < 0.5  # 4 standard errors of unrelated numbers


def test_sentences_in_a_pool_are_grouped_across_the_epochs_shuffle():
    """A micro-batch is no fixed set: two epochs put a sentence beside different neighbours."""
    split = split_of(realistic(1500))
    batches = batches_of(split)
    neighbours = {0: set(), 1: set()}
    per_epoch = 1500 / batches.sentences_per_pool * POOL_STEPS
    for s in range(int(2 * per_epoch)):
        for batch in batches.step(s):
            numbers = named(batch)
            if 7 in numbers:
                neighbours[int(s >= per_epoch)] |= set(numbers)
    assert len(neighbours[0] & neighbours[1]) < len(neighbours[0] | neighbours[1]) / 2


def test_words_are_the_splits_and_not_tokens():
    """For subwords the micro-batch counts words, as the split does."""
    split = split_of(realistic(300), words_per_token=3)
    batch = micro_batch(split, np.arange(20), START)
    assert batch.num_words == 3 * len(batch.target_T)
    assert type(batch.num_words) is int


@pytest.mark.parametrize("limit", [None, 0, 1, 5, 10_000])
@pytest.mark.parametrize(("max_sentences", "max_words"), [(1, 10**6), (7, 10**6), (1000, 3), (1000, 300), (64, 97)])
@pytest.mark.parametrize("num_sentences", [1, 7, 1000])
def test_in_order_yields_every_sentence_once(num_sentences, max_sentences, max_words, limit):
    """Each of the first `limit` sentences once, within both bounds or alone, with its number."""
    split = split_of(realistic(num_sentences))
    expected = list(range(num_sentences))[:limit]
    found = []
    for chosen, batch in iter_eval_batches(
        split, start=START, max_sentences=max_sentences, max_words=max_words, limit=limit
    ):
        assert named(batch) == chosen.tolist()
        place = batch.sentences
        assert 1 <= place.num_sentences <= max_sentences
        assert place.num_sentences == 1 or place.num_sentences * place.num_steps <= max_words
        found += chosen.tolist()
    assert sorted(found) == expected


def test_lengths_count_the_end_of_sentence():
    """A sentence's length is its number of targets."""
    assert lengths(split_of([3, 1, 5]), np.array([2, 0, 1])).tolist() == [5, 3, 1]


@pytest.mark.parametrize(("words", "micro_words"), [(10, 11), (10, 0), (0, 0)])
def test_wrong_sizes_are_mistakes(words, micro_words):
    """micro_words beyond words, or none, is refused with the keys to change."""
    with pytest.raises(UserError, match=r"batch\.micro_words"):
        batches_of(split_of([3, 4]), words=words, micro_words=micro_words)


@pytest.mark.parametrize("words", [1, 30, 100])
def test_every_step_has_something_to_learn_from(words):
    """Even a batch of fewer words than a sentence gives every step at least one sentence."""
    batches = batches_of(split_of(realistic(2000)), words=words, micro_words=words)
    assert all(batches.step(s) for s in range(200))
