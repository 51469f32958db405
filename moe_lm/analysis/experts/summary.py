"""Summarise a tally as the record of a layer: load, characteristic words, pairs, groups and strongest contexts.

The characteristic words of an expert are those with the largest log-likelihood ratio (Dunning 1993). For a word and an
expert, the tokens of the text form a 2 x 2 table: this word or another, routed to this expert or not. If both were
independent, a cell would have e = row sum * column sum / tokens; with k tokens in it, G2 = 2 sum k ln(k / e).

Shape suffixes: E experts, G groups, V vocabulary, N entries that occur.
"""

import numpy as np

from moe_lm.analysis.experts import Context, Expert, Group, InspectedLayer, Pair, Pairs, Spread, Word
from moe_lm.analysis.experts.tally import Reading, Tally, ranks
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary import START, Vocabulary

FEW_EXPERTS = 64
"""Up to this many experts, a picture has a bar or a row for each."""
MAX_PAIRS = FEW_EXPERTS * (FEW_EXPERTS - 1) // 2
"""Maximum number of pairs recorded: all pairs of `FEW_EXPERTS` experts, because the heat map shows them all."""
DIGITS = 6
"""Decimals of all figures, rounded before they are sorted: the order of floating-point sums then does not matter."""
WORDS_BEFORE, WORDS_AFTER = 14, 6
"""Words of a context shown before and after the routed token."""
TOKENS_BEFORE, TOKENS_AFTER = 96, 48
"""Tokens decoded for these words, as a word may have several tokens."""
MAX_LETTERS = 160
"""Maximum number of letters shown on each side of the routed token."""


class Texts:
    """Decodes words and contexts of a split."""

    def __init__(self, vocabulary: Vocabulary, split: Split):
        self._vocabulary, self._split = vocabulary, split

    def word(self, index: int) -> str:
        """Return the text of a token; a piece that continues a word begins with "·"."""
        text = self._vocabulary.decode([index])
        if not text or "\ufffd" in text:  # a marker, a lone space or part of a letter
            return self._vocabulary.token(index)
        begins_word = len(self._vocabulary.tokens_per_word([index, index])) == 2
        return clip_end(text, 1) if begins_word else f"·{clip_end(text, 1)}"

    def context(self, gate: float, offset: int) -> Context:
        """Return the context of the input token that predicts the token at `offset` of the split."""
        starts, tokens = self._split.starts, self._split.tokens
        sentence = int(np.searchsorted(starts, offset, side="right")) - 1
        first, last = int(starts[sentence]), int(starts[sentence + 1])
        read = tokens[max(first, offset - TOKENS_BEFORE) : offset].tolist()
        following = tokens[offset : min(last, offset + TOKENS_AFTER)].tolist()
        before, word, after = self._parts(read, following)
        if offset - TOKENS_BEFORE > first:
            before = f"… {before}"
        return Context(gate, sentence, offset - first, clip_begin(before), word, clip_end(after, WORDS_AFTER + 1))

    def _parts(self, read: list[int], following: list[int]) -> tuple[str, str, str]:
        """Return the text before the last token of `read`, that token, and the text after it."""
        decode = self._vocabulary.decode
        if not read:
            return "", START, f" {decode(following)}"
        before, through, whole = decode(read[:-1]), decode(read), decode(read + following)
        word = through[len(before) :].lstrip()
        if through.startswith(before) and whole.startswith(through) and word and "\ufffd" not in through:
            return through[: len(through) - len(word)], word, whole[len(through) :]
        return f"{before} ", self.word(read[-1]), f" {decode(following)}"


def clip_begin(text: str) -> str:
    """Return the last words of a text."""
    parts = text.split(" ")
    most = WORDS_BEFORE + text.endswith(" ")
    kept = text if len(parts) <= most else f"… {' '.join(parts[-most:])}"
    return kept if len(kept) <= MAX_LETTERS else f"… {kept[-MAX_LETTERS:]}"


def clip_end(text: str, most: int) -> str:
    """Return the first `most` words of a text."""
    parts = text.split(" ")
    kept = text if len(parts) <= most else f"{' '.join(parts[:most])} …"
    return kept if len(kept) <= MAX_LETTERS else f"{kept[:MAX_LETTERS]} …"


def summarize(reading: Reading, texts: Texts, max_words: int) -> tuple[InspectedLayer, ...]:
    """Return the record of every gated layer, with at most `max_words` characteristic words per expert."""
    return tuple(_layer(name, tally, reading, texts, max_words) for name, tally in reading.tallies.items())


def _layer(name: str, tally: Tally, reading: Reading, texts: Texts, max_words: int) -> InspectedLayer:
    return InspectedLayer(
        layer=name,
        num_experts=tally.num_experts,
        num_groups=tally.num_groups,
        tokens=tally.tokens,
        unrouted=tally.tokens - tally.routed,
        assignments=int(tally.load_E.sum()),
        most_experts=tally.most_experts,
        unused=int((tally.load_E == 0).sum()),
        entropy=_round(tally.entropy / tally.routed) if tally.routed else None,
        load_spread=_spread(tally.load_E),
        importance_spread=_spread(tally.importance_E),
        pairs=_pairs(tally),
        groups=_groups(tally),
        experts=_experts(tally, reading, texts, max_words),
    )


def _experts(tally: Tally, reading: Reading, texts: Texts, max_words: int) -> tuple[Expert, ...]:
    words: dict[int, list[Word]] = {}
    for expert, index, count, ratio in characteristic_words(tally, reading.count_V, max_words):
        share = _round(count / int(reading.count_V[index]))
        words.setdefault(expert, []).append(Word(texts.word(index), index, count, share, ratio))
    load_share_E, importance_share_E = _shares(tally.load_E), _shares(tally.importance_E)
    group_size = tally.num_experts // tally.num_groups if tally.num_groups else None
    return tuple(
        Expert(
            expert=i,
            group=i // group_size if group_size else None,
            load=load,
            load_share=_round(load_share_E[i]),
            importance=_round(tally.importance_E[i]),
            importance_share=_round(importance_share_E[i]),
            entropy=_round(tally.entropy_E[i] / load) if load else None,
            words=tuple(words.get(i, ())),
            contexts=tuple(texts.context(gate, offset) for gate, offset in tally.strongest.of(i)),
        )
        for i, load in enumerate(tally.load_E.tolist())
    )


def characteristic_words(tally: Tally, count_V: np.ndarray, max_words: int) -> list[tuple[int, int, int, float]]:
    """Return (expert, word, count, G2) of each expert's most characteristic words, by expert and descending G2.

    Only words routed to the expert more often than the average word are returned. Words of equal G2 are ordered by id,
    that is, by frequency.
    """
    key_N, count_N = tally.words.result()
    expert_N, word_N = key_N // tally.vocabulary_size, key_N % tally.vocabulary_size
    load_N, total_N = tally.load_E[expert_N], count_V[word_N]
    more_N = count_N.astype(float) * tally.tokens > load_N.astype(float) * total_N  # count / total > load / tokens
    expert_N, word_N, count_N, load_N, total_N = (x[more_N] for x in (expert_N, word_N, count_N, load_N, total_N))
    ratio_N = np.round(log_likelihood_ratios(count_N, load_N, total_N, tally.tokens), DIGITS)
    order = np.lexsort((word_N, -ratio_N, expert_N))
    order = order[ranks(expert_N[order]) < max_words]
    columns = (column_N[order].tolist() for column_N in (expert_N, word_N, count_N, ratio_N))
    return list(zip(*columns, strict=True))


def log_likelihood_ratios(both_N: np.ndarray, load_N: np.ndarray, total_N: np.ndarray, tokens: int) -> np.ndarray:
    """Return G2 of 2 x 2 tables given by their first cell, first row sum, first column sum and grand total."""
    both_N, load_N, total_N = (x.astype(float) for x in (both_N, load_N, total_N))
    cells = (
        (both_N, load_N, total_N),
        (load_N - both_N, load_N, tokens - total_N),
        (total_N - both_N, tokens - load_N, total_N),
        (tokens - load_N - total_N + both_N, tokens - load_N, tokens - total_N),
    )
    ratio_N = np.zeros(len(both_N))
    for observed_N, row_N, column_N in cells:
        some_N = observed_N > 0  # an empty cell adds nothing
        expected_N = row_N[some_N] * column_N[some_N] / tokens
        ratio_N[some_N] += 2 * observed_N[some_N] * np.log(observed_N[some_N] / expected_N)
    return ratio_N


def _groups(tally: Tally) -> tuple[Group, ...]:
    if not tally.num_groups:
        return ()
    load_GE = tally.load_E.reshape(tally.num_groups, -1)
    load_G, importance_G = load_GE.sum(axis=1), tally.importance_E.reshape(load_GE.shape).sum(axis=1)
    load_share_G, importance_share_G = _shares(load_G), _shares(importance_G)
    return tuple(
        Group(
            group=g,
            tokens=int(tally.tokens_G[g]),
            load=int(load_G[g]),
            load_share=_round(load_share_G[g]),
            importance=_round(importance_G[g]),
            importance_share=_round(importance_share_G[g]),
            used=int((load_GE[g] > 0).sum()),
        )
        for g in range(tally.num_groups)
    )


def _pairs(tally: Tally) -> Pairs:
    """Return the pairs of experts by descending number of tokens, equal ones by index."""
    key_N, count_N = tally.pairs.result()
    order = np.lexsort((key_N, -count_N))[:MAX_PAIRS]
    first_N, second_N = key_N[order] // tally.num_experts, key_N[order] % tally.num_experts
    load_E = tally.load_E.astype(float)
    lift_N = count_N[order] * tally.tokens / (load_E[first_N] * load_E[second_N])
    columns = (first_N.tolist(), second_N.tolist(), count_N[order].tolist(), lift_N.tolist())
    expected = (load_E.sum() ** 2 - (load_E**2).sum()) / 2 / tally.tokens
    return Pairs(
        tokens=tally.shared,
        distinct=len(key_N),
        lift=_round(int(count_N.sum()) / expected) if expected else None,
        most_frequent=tuple(Pair((i, j), count, _round(lift)) for i, j, count, lift in zip(*columns, strict=True)),
    )


def _spread(value_E: np.ndarray) -> Spread:
    """Return the spread of values normalised to sum 1; where all are 0, entropy and effective number are 0."""
    share_E = _shares(value_E)
    share_E = share_E[share_E > 0]
    entropy = float(-(share_E * np.log2(share_E)).sum())
    return Spread(_round(entropy), _round(2**entropy) if len(share_E) else 0.0)


def _shares(value_E: np.ndarray) -> np.ndarray:
    """Return values normalised to sum 1; zeros where all are 0."""
    total = value_E.sum()
    return value_E / total if total > 0 else np.zeros(len(value_E))


def _round(value: float) -> float:
    return round(float(value), DIGITS) + 0.0  # + 0.0 turns -0.0 into 0.0
