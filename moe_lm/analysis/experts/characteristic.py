"""The words that are characteristic of an expert: Dunning's log-likelihood ratio (Dunning 1993).

For an expert and a word all tokens of the text fall into a table of four: of this word or another, served by this
expert or not. With k tokens in a cell where e = row sum * column sum / tokens are expected were both independent,
G2 = 2 sum k ln(k / e).

Shape suffixes: E experts, V vocabulary, N pairs of an expert and a word that occur.
"""

from dataclasses import dataclass

import numpy as np

from moe_lm.analysis.experts.strongest import ranks
from moe_lm.analysis.experts.tally import Tally

DIGITS = 6
"""Decimals of G2 that count when words are sorted; of equal ones the more frequent word of the vocabulary is first."""


@dataclass(frozen=True)
class Characteristic:
    """Experts and words, ascending by expert, each expert's most characteristic word first."""

    expert_N: np.ndarray
    word_N: np.ndarray
    count_N: np.ndarray
    ratio_N: np.ndarray


def characteristic_words(tally: Tally, count_V: np.ndarray, most: int) -> Characteristic:
    """Return at most this many words of each expert, only such as it serves more often than other words."""
    key_N, count_N = tally.words.result()
    expert_N, word_N = key_N // tally.vocabulary_size, key_N % tally.vocabulary_size
    load_N, total_N = tally.load_E[expert_N], count_V[word_N]
    # count / total > load / tokens, in whole numbers
    over_N = count_N.astype(float) * tally.tokens > load_N.astype(float) * total_N
    expert_N, word_N, count_N, load_N, total_N = (x[over_N] for x in (expert_N, word_N, count_N, load_N, total_N))
    ratio_N = np.round(log_likelihood_ratios(count_N, load_N, total_N, tally.tokens), DIGITS)
    order = np.lexsort((word_N, -ratio_N, expert_N))
    order = order[ranks(expert_N[order]) < most]
    return Characteristic(expert_N[order], word_N[order], count_N[order], ratio_N[order])


def log_likelihood_ratios(both_N: np.ndarray, load_N: np.ndarray, total_N: np.ndarray, tokens: int) -> np.ndarray:
    """Return G2 of tables whose first cell, first row sum, first column sum and sum of all these are."""
    both_N, load_N, total_N = (x.astype(float) for x in (both_N, load_N, total_N))
    cells = (
        (both_N, load_N, total_N),
        (load_N - both_N, load_N, tokens - total_N),
        (total_N - both_N, tokens - load_N, total_N),
        (tokens - load_N - total_N + both_N, tokens - load_N, tokens - total_N),
    )
    ratio_N = np.zeros(len(both_N))
    for seen_N, row_N, column_N in cells:
        some_N = seen_N > 0  # an empty cell adds nothing
        expected_N = row_N[some_N] * column_N[some_N] / tokens
        ratio_N[some_N] += 2 * seen_N[some_N] * np.log(seen_N[some_N] / expected_N)
    return ratio_N
