"""Inspection of a gate that depends on the word alone, against figures worked out by hand."""

from math import log, log2

import pytest
from known_gates import inspection_of, split_of, table_model, vocabulary_of

from moe_lm.analysis.experts import Inspection
from moe_lm.analysis.experts.tally import first_sentences
from moe_lm.errors import UserError

# The inputs are <S> a b a, <S> b, <S> a b: nine tokens, three of each.
H_A, H_B, H_S = (-sum(p * log2(p) for p in ps) for ps in ((0.75, 0.25), (0.5, 0.5), (0.9, 0.1)))


@pytest.fixture
def by_hand() -> Inspection:
    """Three sentences through a gate that is set by hand."""
    vocabulary = vocabulary_of("a b")
    gates = {"a": {0: 0.75, 1: 0.25}, "b": {1: 0.5, 2: 0.5}, "<S>": {3: 0.9, 0: 0.1}}
    model = table_model(vocabulary, gates, num_experts=5, k=2)
    return inspection_of(model, vocabulary, split_of(vocabulary, ["a b a", "b", "a b"]))


def near(value):
    return pytest.approx(value, abs=1e-6)


def test_counts_of_the_text(by_hand):
    assert (by_hand.sentences, by_hand.words, by_hand.tokens, by_hand.distinct_words) == (3, 9, 9, 3)
    [layer] = by_hand.layers
    assert (layer.layer, layer.num_experts, layer.num_groups, layer.groups) == ("middle", 5, None, ())
    assert (layer.tokens, layer.assignments, layer.unrouted, layer.unused, layer.most_experts) == (9, 18, 0, 1, 2)


def test_shares_of_load_and_importance(by_hand):
    experts = by_hand.layers[0].experts
    assert [expert.load for expert in experts] == [6, 6, 3, 3, 0]
    assert [expert.load_share for expert in experts] == near([6 / 18, 6 / 18, 3 / 18, 3 / 18, 0])
    importance = [3 * 0.75 + 3 * 0.1, 3 * 0.25 + 3 * 0.5, 1.5, 2.7, 0]
    assert [expert.importance for expert in experts] == near(importance)
    assert [expert.importance_share for expert in experts] == near([value / 9 for value in importance])


def test_entropies(by_hand):
    [layer] = by_hand.layers
    assert layer.entropy == near((H_A + H_B + H_S) / 3)
    means = [(H_A + H_S) / 2, (H_A + H_B) / 2, H_B, H_S]
    assert [expert.entropy for expert in layer.experts] == [*map(near, means), None]
    load = -2 * (1 / 3) * log2(1 / 3) - 2 * (1 / 6) * log2(1 / 6)
    assert (layer.load_spread.entropy, layer.load_spread.effective) == (near(load), near(2**load))


def test_pairs(by_hand):
    pairs = by_hand.layers[0].pairs
    assert (pairs.tokens, pairs.distinct) == (9, 3)
    found = [(pair.experts, pair.tokens, pair.lift) for pair in pairs.most_frequent]
    # both * tokens / (load * load)
    assert found == [((0, 1), 3, 3 * 9 / 36), ((0, 3), 3, 3 * 9 / 18), ((1, 2), 3, 3 * 9 / 18)]
    expected = (6 * 6 + 6 * 3 + 6 * 3 + 6 * 3 + 6 * 3 + 3 * 3) / 9
    assert pairs.lift == near(9 / expected)


def test_contexts(by_hand):
    def told(expert):
        return [
            (c.gate, c.sentence, c.position, c.before, c.word, c.after)
            for c in by_hand.layers[0].experts[expert].contexts
        ]

    # "a" at the beginning is read in sentences 0 and 2, and <S> in all: each is one context, the earliest.
    assert told(0) == [(0.75, 0, 1, "", "a", " b a"), (0.75, 0, 3, "a b ", "a", ""), (0.1, 0, 0, "", "<S>", " a b a")]
    assert told(2) == [(0.5, 0, 2, "a ", "b", " a"), (0.5, 1, 1, "", "b", "")]
    assert told(4) == []


def test_characteristic_words(by_hand):
    experts = by_hand.layers[0].experts
    # Of 9 tokens the expert serves 6, all 3 of the word: cells 3, 3, 0, 3 where 2, 4, 1, 2 are expected.
    ratio = 2 * (3 * log(3 / 2) + 3 * log(3 / 4) + 3 * log(3 / 2))
    told = [(word.word, word.id, word.count, word.share, word.log_likelihood_ratio) for word in experts[0].words]
    assert told == [("<S>", 1, 3, 1.0, near(ratio)), ("a", 3, 3, 1.0, near(ratio))]
    assert [word.word for word in experts[2].words] == ["b"]
    assert experts[4].words == ()


def test_a_word_that_is_served_less_than_others_is_not_characteristic():
    vocabulary = vocabulary_of("a b")
    gates = {"a": {0: 0.75, 1: 0.25}, "b": {0: 0.5, 2: 0.5}, "<S>": {3: 0.9, 0: 0.1}}
    model = table_model(vocabulary, gates, num_experts=4, k=2)
    [layer] = inspection_of(model, vocabulary, split_of(vocabulary, ["a b a", "b"])).layers
    assert layer.experts[0].load == layer.tokens
    assert layer.experts[0].words == ()  # it serves everything: nothing is characteristic
    assert [word.word for word in layer.experts[1].words] == ["a"]


def test_with_one_expert_a_token_there_are_no_pairs():
    vocabulary = vocabulary_of("a b")
    model = table_model(vocabulary, {"a": {0: 1}, "b": {1: 1}, "<S>": {1: 1}}, num_experts=2, k=1)
    [layer] = inspection_of(model, vocabulary, split_of(vocabulary, ["a b a", "b"])).layers
    assert (layer.pairs.tokens, layer.pairs.distinct, layer.pairs.most_frequent) == (0, 0, ())
    assert layer.entropy == 0
    assert [context.gate for context in layer.experts[0].contexts] == [1.0, 1.0]


def test_the_first_sentences_with_so_many_words():
    vocabulary = vocabulary_of("a b")
    split = split_of(vocabulary, ["a b a", "b", "a b"])  # 4, 2 and 3 words with </S>
    limits = {1: 1, 4: 1, 5: 2, 6: 2, 7: 3, 9: 3, 1000: 3, None: 3}
    assert {limit: first_sentences(split, limit) for limit in limits} == limits
    with pytest.raises(UserError, match="no sentence"):
        first_sentences(split_of(vocabulary, []), None)


def test_only_the_first_sentences_are_read():
    vocabulary = vocabulary_of("a b")
    model = table_model(vocabulary, {"a": {0: 1}, "b": {1: 1}, "<S>": {1: 1}}, num_experts=2, k=1)
    found = inspection_of(model, vocabulary, split_of(vocabulary, ["b", "a b a", "a"]), sentences=1)
    assert (found.sentences, found.words, found.layers[0].experts[0].load) == (1, 2, 0)
