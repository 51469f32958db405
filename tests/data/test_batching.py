"""Which sentences make which micro-batch, and the thread that collates them one step ahead."""

import threading
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from moe_lm.data.batching import POOL_STEPS, Batches, Prefetcher, iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError

START, END, FILL, FIRST = 0, 1, 2, 10


SMALL_PARTS = (2048, 128, 16)


def split_of(length_N, words_per_token=1):
    """Sentence n has the ids FIRST + n, FILL, ..., FILL, END, so that its first target names it."""
    length_N = np.asarray(length_N, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(length_N)])
    tokens = np.full(starts[-1], FILL, dtype=np.int32)
    tokens[starts[:-1]] = FIRST + np.arange(len(length_N))
    tokens[starts[1:] - 1] = END
    return Split(tokens=tokens, starts=starts, words=(length_N * words_per_token).astype(np.uint32))


def realistic(num_sentences, seed=0):
    """Lognormal lengths like those of news: mean 25 words with `</S>`, 2 to 250."""
    generator = np.random.default_rng(seed)
    return np.clip(np.round(generator.lognormal(np.log(25) - 0.18, 0.6, num_sentences)), 2, 250)


def batches_of(split, words=400, micro_words=200, seed=1):
    return Batches(split, start=START, seed=seed, words=words, micro_words=micro_words)


def sentences_of(batch):
    """Each sentence's inputs and targets, in order."""
    sentences = [([], []) for _ in range(batch.layout.num_sentences)]
    rows = zip(batch.layout.sentence_T.tolist(), batch.input_T.tolist(), batch.target_T.tolist(), strict=True)
    for sentence, given, target in rows:
        sentences[sentence][0].append(given)
        sentences[sentence][1].append(target)
    return sentences


def named(batch):
    """The sentences' numbers, after checking every token."""
    numbers = []
    for given, target in sentences_of(batch):
        assert given == [START, *target[:-1]]
        assert target[1:] == [FILL] * (len(target) - 2) + [END]
        numbers.append(target[0] - FIRST)
    return numbers


def same(one, other):
    return all(
        torch.equal(a.input_T, b.input_T) and torch.equal(a.target_T, b.target_T)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("num_sentences", "num_pools"), [(1500, 4), (5000, 2), (40, 3)])
def test_every_sentence_comes_once_an_epoch(num_sentences, num_pools):
    """Over whole pools, every sentence comes equally often, or once more in the unfinished epoch."""
    batches = batches_of(split_of(realistic(num_sentences)))
    counts = Counter(n for s in range(POOL_STEPS * num_pools) for batch in batches.step(s) for n in named(batch))
    epochs, rest = divmod(num_pools * batches.sentences_per_pool, num_sentences)
    assert sum(counts.values()) == epochs * num_sentences + rest
    assert {counts[n] for n in range(num_sentences)} <= {epochs, epochs + 1}
    assert sum(count == epochs + 1 for count in counts.values()) == (rest if epochs else len(counts))
    assert batches.epoch(POOL_STEPS * num_pools) == pytest.approx(epochs + rest / num_sentences)


def test_a_step_is_a_pure_function_of_seed_and_step():
    """In any order of access, and from a new object, a step's micro-batches have the same tokens."""
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
    """Each epoch and each seed has its own order; hardly a sentence keeps its position."""
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
    """The first sentences for seed 1, as a Philox in plain Python gives them; resuming depends on them."""
    assert batches_of(split_of([2] * 1000))._stream(0, 5).tolist() == [285, 93, 617, 520, 96]


@pytest.mark.parametrize(("words", "micro_words"), [(4096, 4096), (8192, 8192), (8192, 1024)])
def test_padding_stays_below_two_percent(words, micro_words):
    """At most 2 % of the LSTM's steps over four pools of news-like sentences are padding."""
    batches = batches_of(split_of(realistic(60_000)), words=words, micro_words=micro_words)
    steps = tokens = 0
    for s in range(256):
        for batch in batches.step(s):
            steps += batch.layout.num_steps * batch.layout.num_sentences
            tokens += len(batch.target_T)
    assert 0 < 1 - tokens / steps <= 0.02


@pytest.mark.parametrize(
    ("words", "micro_words", "num_parts"), [(4096, 4096, 1), (8192, 1024, 8), (3000, 1000, 3), SMALL_PARTS]
)
def test_steps_hold_the_words_asked_for(words, micro_words, num_parts):
    """Each step has words / micro_words micro-batches of about micro_words, and `words` on average within 1 %."""
    batches = batches_of(split_of(realistic(30_000)), words=words, micro_words=micro_words)
    steps = [batches.step(s) for s in range(3 * POOL_STEPS)]
    assert {len(step) for step in steps} == {num_parts}
    sizes = [[batch.num_words for batch in step] for step in steps]
    assert np.mean([sum(parts) for parts in sizes]) == pytest.approx(words, rel=0.01)
    assert all(abs(size - micro_words) < 0.1 * micro_words + 250 for parts in sizes for size in parts)


@pytest.mark.parametrize(("words", "micro_words"), [(8192, 5600), (1000, 450)])
def test_micro_batches_hold_no_more_than_asked_for(words, micro_words):
    """On average a micro-batch has at most micro_words, even where that does not divide the words."""
    batches = batches_of(split_of(realistic(30_000)), words=words, micro_words=micro_words)
    sizes = [batch.num_words for s in range(POOL_STEPS) for batch in batches.step(s)]
    assert np.mean(sizes) <= 1.02 * micro_words


def test_a_step_mixes_lengths():
    """The micro-batches of a step are random: they differ in length, and short ones do not all come first."""
    batches = batches_of(split_of(realistic(30_000)), words=8192, micro_words=1024)
    spread, firsts = [], []
    for s in range(POOL_STEPS):
        longest = [batch.layout.num_steps for batch in batches.step(s)]
        spread.append(max(longest) - min(longest))
        firsts.append(longest[0])
    assert np.median(spread) > 20
    assert abs(np.corrcoef(np.arange(POOL_STEPS), firsts)[0, 1]) < 0.5  # 4 standard errors of unrelated numbers


def test_micro_batches_differ_between_epochs():
    """Two epochs group a sentence with different ones."""
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


@pytest.mark.parametrize("num_sentences", [1, 7, 1000])
def test_evaluation_reads_every_sentence_once(num_sentences):
    """Each of the first `limit` sentences once, with its index, within both bounds or alone."""
    split = split_of(realistic(num_sentences))
    for (max_sentences, max_words), limit in product(
        [(1, 10**6), (7, 10**6), (1000, 3), (1000, 300), (64, 97)], [None, 0, 1, 5, 10_000]
    ):
        found = []
        for indices, batch in iter_eval_batches(
            split, start=START, max_sentences=max_sentences, max_words=max_words, limit=limit
        ):
            assert named(batch) == indices.tolist()
            layout = batch.layout
            assert 1 <= layout.num_sentences <= max_sentences
            assert layout.num_sentences == 1 or layout.num_sentences * layout.num_steps <= max_words
            found += indices.tolist()
        assert sorted(found) == list(range(num_sentences))[:limit]


@pytest.mark.parametrize(("words", "micro_words"), [(10, 11), (10, 0), (0, 0)])
def test_wrong_sizes_are_refused(words, micro_words):
    """micro_words above words, or below 1, is refused with the keys to change."""
    with pytest.raises(UserError, match=r"batch\.micro_words"):
        batches_of(split_of([3, 4]), words=words, micro_words=micro_words)


@pytest.mark.parametrize("words", [1, 30, 100])
def test_every_step_has_a_sentence(words):
    """Every step has at least one sentence, even where a batch has fewer words than a sentence."""
    batches = batches_of(split_of(realistic(2000)), words=words, micro_words=words)
    assert all(batches.step(s) for s in range(200))


def small_batches():
    """Two micro-batches per step, of sentences of 2 to 9 words."""
    return batches_of(split_of(np.arange(400) % 8 + 2), words=40, micro_words=20, seed=3)


def both(count):
    return list(range(count))


def contents(batch, numbers=(0, 1)):
    return [(batch[n].input_T.tolist(), batch[n].target_T.tolist(), batch[n].num_words) for n in numbers]


def test_prefetched_batches_are_the_same():
    """Steps in order, repeated, out of order, and across the end of a pool."""
    for steps in ([0, 1, 2], [5, 5, 6], [0, 7, 3, 4], [126, 127, 128, 129]):
        prefetcher, plain = Prefetcher(small_batches(), both, pin_memory=False), small_batches()
        for step in steps:
            batch = prefetcher.step(step)
            assert (batch.num_words, batch.num_tokens) == (plain.step(step).num_words, plain.step(step).num_tokens)
            assert contents(batch) == contents(plain.step(step))
            assert contents(batch) == contents(plain.step(step))  # asked for again, it is collated again


def test_a_batch_that_the_memory_cannot_order_is_refused(monkeypatch):
    """Before a pool is drawn that would fill the memory."""
    monkeypatch.setattr("moe_lm.data.batching.free_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"batch.words=100000000000: .* 1.0 GiB are free; lower batch.words"):
        batches_of(split_of([3, 4]), words=10**11, micro_words=10**9)


def test_only_the_assigned_micro_batches_and_the_dummy_are_prefetched():
    """A process without a micro-batch gets the shortest sentence; other processes' micro-batches are not collated."""
    batch = Prefetcher(small_batches(), lambda count: [1, None], pin_memory=False).step(0)
    assert set(batch.prefetched) == {1, None}
    assert torch.equal(batch.dummy().target_T, small_batches().step(0).dummy().target_T)
    assert contents(batch) == contents(small_batches().step(0))


def test_another_thread_collates_the_next_step():
    """While a step is computed, the micro-batches of the next step are collated, and no others."""
    seen, batches = [], small_batches()
    step = batches.step
    batches.step = lambda number: seen.append((number, threading.current_thread().name)) or step(number)
    prefetcher = Prefetcher(batches, both, pin_memory=False)
    for number in (0, 1):
        prefetcher.step(number)
    prefetcher._next[1].result()
    assert [number for number, _ in seen] == [0, 1, 2]
    here = threading.current_thread().name
    assert [name == here for _, name in seen] == [True, False, False]


def test_an_error_of_the_thread_is_raised_for_its_step_only():
    """Another step does not raise it."""
    batches = small_batches()
    step = batches.step

    def broken(number):
        if number == 1:
            raise OSError("no such page")
        return step(number)

    batches.step = broken
    prefetcher = Prefetcher(batches, both, pin_memory=False)
    prefetcher.step(0)
    prefetcher.step(2)
    prefetcher.step(0)
    with pytest.raises(OSError, match="no such page"):
        prefetcher.step(1)


def test_unique_inputs_are_computed_ahead_for_a_gpu(monkeypatch):
    """In pinned memory, as a GPU would wait for them; not where training runs on a CPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)  # there is no GPU here
    batch = Prefetcher(small_batches(), both, pin_memory=True).step(0)
    for micro in (batch[0], batch[1]):
        assert all(any(x is found for x in pinned) for found in (micro.input_T, *micro.inputs.unique[:2]))
        assert micro.inputs.unique[0].tolist() == sorted(set(micro.input_T.tolist()))
    assert Prefetcher(small_batches(), both, pin_memory=False).step(0)[0].inputs.is_found is False
