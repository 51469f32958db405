"""Every figure against a plain loop over tokens, and unit tests of the data structures."""

import random
from collections import Counter, defaultdict
from itertools import combinations
from math import log, log2

import numpy as np
import pytest
from known_gates import random_model, reading_of, split_of, vocabulary_of

from moe_lm.analysis.experts import tally as tallying
from moe_lm.analysis.experts.summary import Texts, characteristic_words, summarize
from moe_lm.analysis.experts.tally import GATE_RESOLUTION, SparseCounts, StrongestContexts, input_tokens
from moe_lm.data.batching import iter_eval_batches

WORDS = " ".join(f"w{i}" for i in range(12))
KINDS = {
    "flat": {"kind": "flat", "gate": "noisy_top_k", "num_experts": 7, "k": 3},
    "k=1": {"kind": "flat", "gate": "noisy_top_k", "num_experts": 7, "k": 1},
    "none or many": {"kind": "flat", "gate": "strictly_balanced", "num_experts": 7, "k": 2},
    "hierarchical": {"kind": "hierarchical", "gate": "noisy_top_k", "num_experts": 12, "k": 2, "groups": 4},
    "hierarchical, none or many": {
        **{"kind": "hierarchical", "gate": "strictly_balanced", "num_experts": 12, "k": 2, "groups": 4}
    },
}


@pytest.fixture(scope="module")
def text():
    draw = random.Random(3)
    vocabulary = vocabulary_of(WORDS)
    words = WORDS.split()
    sentences = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(60)]
    return vocabulary, split_of(vocabulary, sentences + sentences[:10])  # some sentences twice


def loop(model, vocabulary, split, name):
    """Each token's word, context and gate values, from one sentence at a time."""
    batches = iter_eval_batches(split, start=vocabulary.start, max_sentences=1, max_words=1)
    for chosen, batch in batches:
        gating = model.hidden(batch)[1][name]
        gates = defaultdict(dict)
        columns = (x.tolist() for x in (gating.token_A, gating.expert_A, gating.gate_A))
        for token, expert, gate in zip(*columns, strict=True):
            gates[token][expert] = gate
        inputs = batch.input_T.tolist()
        for position, word in enumerate(inputs):
            yield int(chosen[0]), position, word, tuple(inputs[: position + 1]), gates[position]


@pytest.fixture(params=[(kind, place) for kind in KINDS for place in (0, 1)], ids=str, scope="module")
def both(request, text):
    """A gated layer's record, the reading, and the tokens as the loop finds them."""
    kind, place = request.param
    vocabulary, split = text
    model = random_model(vocabulary, **KINDS[kind])
    reading = reading_of(model, vocabulary, split, max_sentences=7)
    layers = summarize(reading, Texts(vocabulary, split), max_words=4)
    assert [layer.layer for layer in layers] == ["one", "two"]
    return layers[place], reading, list(loop(model, vocabulary, split, layers[place].layer))


def test_load_importance_and_tokens_without_experts(both):
    layer, reading, tokens = both
    assert layer.tokens == reading.tokens == len(tokens)
    load, importance = Counter(), Counter()
    for *_, gates in tokens:
        load.update(gates.keys())
        importance.update(gates)
    assert {expert.expert: expert.load for expert in layer.experts if expert.load} == load
    for expert in layer.experts:
        assert expert.importance == pytest.approx(importance[expert.expert], abs=1e-5)
    assert layer.unrouted == sum(not gates for *_, gates in tokens)
    assert layer.most_experts == max(len(gates) for *_, gates in tokens)
    assert layer.unused == layer.num_experts - len(load)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "none or many" in kind])
def test_the_cases_are_what_they_are_meant_to_be(text, kind):
    vocabulary, split = text
    tallies = reading_of(random_model(vocabulary, **KINDS[kind]), vocabulary, split).tallies.values()
    assert any(tally.routed < tally.tokens for tally in tallies)
    assert any(tally.most_experts > 2 for tally in tallies)


def test_entropies(both):
    layer, _, tokens = both
    of_tokens, of_experts = [], defaultdict(list)
    for *_, gates in tokens:
        if gates:
            shares = [gate / sum(gates.values()) for gate in gates.values()]
            of_tokens.append(-sum(share * log2(share) for share in shares))
            for expert in gates:
                of_experts[expert].append(of_tokens[-1])
    assert layer.entropy == pytest.approx(sum(of_tokens) / len(of_tokens), abs=1e-6)
    for expert in layer.experts:
        values = of_experts[expert.expert]
        assert expert.entropy == (pytest.approx(sum(values) / len(values), abs=1e-6) if values else None)


def test_pairs(both):
    layer, _, tokens = both
    pairs = Counter(pair for *_, gates in tokens for pair in combinations(sorted(gates), 2))
    assert {pair.experts: pair.tokens for pair in layer.pairs.most_frequent} == pairs
    assert layer.pairs.tokens == sum(len(gates) > 1 for *_, gates in tokens)
    load = [expert.load for expert in layer.experts]
    for pair in layer.pairs.most_frequent:
        first, second = (load[expert] / len(tokens) for expert in pair.experts)
        assert pair.lift == pytest.approx(pair.tokens / len(tokens) / (first * second), abs=1e-6)
    found = [pair.tokens for pair in layer.pairs.most_frequent]
    assert found == sorted(found, reverse=True)


def test_words(both):
    layer, _, tokens = both
    total, served = Counter(), defaultdict(Counter)
    for _, _, word, _, gates in tokens:
        total[word] += 1
        for expert in gates:
            served[expert][word] += 1
    for expert in layer.experts:
        rows = {}
        for word, count in served[expert.expert].items():
            if count / total[word] > expert.load / len(tokens):
                rows[word] = ratio(count, expert.load, total[word], len(tokens))
        best = sorted(rows, key=lambda word: (-round(rows[word], 6), word))[:4]
        assert [word.id for word in expert.words] == best
        for word in expert.words:
            assert word.count == served[expert.expert][word.id]
            assert word.share == pytest.approx(word.count / total[word.id], abs=1e-6)
            assert word.log_likelihood_ratio == pytest.approx(rows[word.id], abs=1e-5)


def ratio(both, row, column, total):
    """Dunning's ratio by the entropies of the table, sum k ln k of cells - rows - columns + total."""
    cells = (both, row - both, column - both, total - row - column + both)
    sums = (row, total - row, column, total - column)

    def h(values):
        return sum(k * log(k) for k in values if k)

    return 2 * (h(cells) - h(sums) + h([total]))


def test_contexts(both):
    layer, _, tokens = both
    for expert in layer.experts:
        offered = {}
        for sentence, position, _, prefix, gates in sorted(tokens, key=lambda token: token[:2]):
            if expert.expert in gates:
                offered.setdefault(prefix, (-round(gates[expert.expert], 6), sentence, position))
        best = sorted(offered.values())[:5]
        assert [(-place.gate, place.sentence, place.position) for place in expert.contexts] == best


def test_groups(both):
    layer, _, tokens = both
    if layer.num_groups is None:
        assert all(expert.group is None for expert in layer.experts)
        return
    size = layer.num_experts // layer.num_groups
    assert [expert.group for expert in layer.experts] == [i // size for i in range(layer.num_experts)]
    received = Counter(group for *_, gates in tokens for group in {expert // size for expert in gates})
    for group in layer.groups:
        members = [expert for expert in layer.experts if expert.group == group.group]
        assert group.tokens == received[group.group]
        assert group.load == sum(expert.load for expert in members)
        assert group.importance_share == pytest.approx(sum(e.importance_share for e in members), abs=1e-5)
        assert group.used == sum(expert.load > 0 for expert in members)
    assert sum(group.load_share for group in layer.groups) == pytest.approx(1, abs=1e-5)


def test_the_record_is_the_same_for_any_batch(text):
    vocabulary, split = text
    records = []
    for sentences, words in ((1, 1), (7, 1000), (100, 30)):
        model = random_model(vocabulary, **KINDS["hierarchical, none or many"])
        reading = reading_of(model, vocabulary, split, max_sentences=sentences, max_words=words)
        records.append(summarize(reading, Texts(vocabulary, split), max_words=4))
    assert records[0] == records[1] == records[2]


def test_sparse_counts(monkeypatch):
    monkeypatch.setattr(tallying, "MAX_PENDING", 10)
    draw, sparse, expected = np.random.default_rng(1), SparseCounts(), Counter()
    for _ in range(50):
        keys = draw.integers(0, 40, size=draw.integers(0, 30)) * 10**12
        sparse.add(keys)
        expected.update(keys.tolist())
    keys, count = sparse.result()
    assert dict(zip(keys.tolist(), count.tolist(), strict=True)) == expected
    assert (np.diff(keys) > 0).all()


def test_strongest_in_any_order():
    draw = np.random.default_rng(2)
    size = 3000
    expert, prefix = draw.integers(0, 6, size), draw.integers(0, 200, size).astype(np.uint64)
    gate = (prefix % 23) / 23  # the same context has the same gate value
    offset = draw.permutation(size)
    expected = {e: {} for e in range(6)}
    for i in np.argsort(offset):
        expected[expert[i]].setdefault(prefix[i], (-round(gate[i] * GATE_RESOLUTION), offset[i]))
    for order in (np.arange(size), np.argsort(offset), np.argsort(-offset), np.argsort(gate)):
        strongest = StrongestContexts(7, 9)
        for part in np.array_split(order, 13):
            strongest.add(expert[part], gate[part], offset[part], prefix[part])
        for e in range(6):
            best = sorted(expected[e].values())[:9]
            assert [(-round(gate * GATE_RESOLUTION), offset) for gate, offset in strongest.of(e)] == best
        assert strongest.of(6) == []


def test_prefixes_are_equal_where_the_same_was_read(text):
    vocabulary, split = text
    by_text, by_number, offsets = {}, {}, set()
    for chosen, batch in iter_eval_batches(split, start=vocabulary.start, max_sentences=9, max_words=1000):
        tokens = input_tokens(batch, split.starts[chosen])
        sentence = np.searchsorted(split.starts, tokens.offset_T, side="right") - 1
        for word, offset, prefix, i in zip(tokens.word_T, tokens.offset_T, tokens.prefix_T, sentence, strict=True):
            read = (vocabulary.start, *split.tokens[split.starts[i] : offset].tolist())
            assert read[-1] == word
            assert by_text.setdefault(read, prefix) == prefix
            assert by_number.setdefault(prefix, read) == read
            offsets.add(int(offset))
    assert offsets == set(range(len(split.tokens)))


def test_characteristic_words_are_at_most_so_many(both):
    layer, reading, _ = both
    found = characteristic_words(reading.tallies[layer.layer], reading.count_V, max_words=2)
    assert max(Counter(expert for expert, *_ in found).values()) == 2
