"""From what was counted to what is told: the record of each layer.

Shape suffixes: E experts, G groups, N entries that occur.
"""

import numpy as np

from moe_lm.analysis.experts import Expert, Group, InspectedLayer, Pair, Pairs, Spread, Word
from moe_lm.analysis.experts.characteristic import characteristic_words
from moe_lm.analysis.experts.reading import Reading
from moe_lm.analysis.experts.tally import Tally
from moe_lm.analysis.experts.texts import Texts

FEW = 64
"""The most experts that have a bar or a row each in a picture."""
MOST_PAIRS = FEW * (FEW - 1) // 2
"""The most frequent pairs that are told: of so few experts all, as their heat map shows them."""
DIGITS = 6
"""Decimals of every figure: the order in which floats were added does not show."""


def summarized(reading: Reading, texts: Texts, most_words: int) -> tuple[InspectedLayer, ...]:
    """Return every gated layer's record, with at most this many characteristic words an expert."""
    return tuple(layer_of(name, tally, reading, texts, most_words) for name, tally in reading.tallies.items())


def layer_of(name: str, tally: Tally, reading: Reading, texts: Texts, most_words: int) -> InspectedLayer:
    """Return the record of one layer."""
    return InspectedLayer(
        layer=name,
        num_experts=tally.num_experts,
        num_groups=tally.num_groups,
        tokens=tally.tokens,
        unserved=tally.tokens - tally.served,
        assignments=int(tally.load_E.sum()),
        most_experts=tally.most_experts,
        unused=int((tally.load_E == 0).sum()),
        entropy=rounded(tally.entropy / tally.served) if tally.served else None,
        load_spread=spread(tally.load_E),
        importance_spread=spread(tally.importance_E),
        pairs=pairs_of(tally),
        groups=groups_of(tally),
        experts=experts_of(tally, reading, texts, most_words),
    )


def experts_of(tally: Tally, reading: Reading, texts: Texts, most_words: int) -> tuple[Expert, ...]:
    """Return the record of every expert."""
    words = words_of(tally, reading, texts, most_words)
    load_share_E, importance_share_E = shares(tally.load_E), shares(tally.importance_E)
    size = tally.num_experts // tally.num_groups if tally.num_groups else None
    return tuple(
        Expert(
            expert=i,
            group=i // size if size else None,
            load=load,
            load_share=rounded(load_share_E[i]),
            importance=rounded(tally.importance_E[i]),
            importance_share=rounded(importance_share_E[i]),
            entropy=rounded(tally.entropy_E[i] / load) if load else None,
            words=tuple(words.get(i, ())),
            contexts=tuple(texts.context(gate, offset) for gate, offset in tally.strongest.of(i)),
        )
        for i, load in enumerate(tally.load_E.tolist())
    )


def words_of(tally: Tally, reading: Reading, texts: Texts, most_words: int) -> dict[int, list[Word]]:
    """Return the characteristic words by expert."""
    found = characteristic_words(tally, reading.count_V, most_words)
    columns = (found.expert_N, found.word_N, found.count_N, reading.count_V[found.word_N], found.ratio_N)
    words: dict[int, list[Word]] = {}
    for expert, index, count, total, ratio in zip(*(column.tolist() for column in columns), strict=True):
        word = Word(texts.word(index), index, count, rounded(count / total), ratio)
        words.setdefault(expert, []).append(word)
    return words


def groups_of(tally: Tally) -> tuple[Group, ...]:
    """Return what the experts of each group do together; nothing where there are no groups."""
    if not tally.num_groups:
        return ()
    load_GE = tally.load_E.reshape(tally.num_groups, -1)
    load_G, importance_G = load_GE.sum(axis=1), tally.importance_E.reshape(load_GE.shape).sum(axis=1)
    load_share_G, importance_share_G = shares(load_G), shares(importance_G)
    return tuple(
        Group(
            group=g,
            tokens=int(tally.tokens_G[g]),
            load=int(load_G[g]),
            load_share=rounded(load_share_G[g]),
            importance=rounded(importance_G[g]),
            importance_share=rounded(importance_share_G[g]),
            used=int((load_GE[g] > 0).sum()),
        )
        for g in range(tally.num_groups)
    )


def pairs_of(tally: Tally) -> Pairs:
    """Return how often experts serve the same token, the most frequent pairs first, equal ones by number."""
    key_N, count_N = tally.pairs.result()
    order = np.lexsort((key_N, -count_N))[:MOST_PAIRS]
    first, second = key_N[order] // tally.num_experts, key_N[order] % tally.num_experts
    load_E = tally.load_E.astype(float)
    lift = count_N[order] * tally.tokens / (load_E[first] * load_E[second])
    columns = (first.tolist(), second.tolist(), count_N[order].tolist(), lift.tolist())
    expected = (load_E.sum() ** 2 - (load_E**2).sum()) / 2 / tally.tokens
    return Pairs(
        tokens=tally.shared,
        distinct=len(key_N),
        lift=rounded(int(count_N.sum()) / expected) if expected else None,
        most_frequent=tuple(Pair((i, j), count, rounded(x)) for i, j, count, x in zip(*columns, strict=True)),
    )


def spread(value_E: np.ndarray) -> Spread:
    """Return how evenly values are spread; of nothing, the entropy is 0 and no expert is effective."""
    share_E = shares(value_E)
    share_E = share_E[share_E > 0]
    entropy = float(-(share_E * np.log2(share_E)).sum())
    return Spread(rounded(entropy), rounded(2**entropy) if len(share_E) else 0.0)


def shares(value_E: np.ndarray) -> np.ndarray:
    """Return each value over the sum of all, 0 where there is nothing."""
    total = value_E.sum()
    return value_E / total if total > 0 else np.zeros(len(value_E))


def rounded(value: float) -> float:
    """Return a figure as it is told; never -0."""
    return round(float(value), DIGITS) + 0.0
