"""Inspection of a model's experts: which tokens, words and contexts each one serves.

`inspect.json` is the record `Inspection`, with a key for each field. Counts are taken over one pass over a text in
evaluation mode. A token is an input of the gate: a word, a subword piece or the `<S>` that begins each sentence. The
load of an expert is the number of tokens routed to it, its importance the sum of its gate values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """A token that was routed to an expert; `before`, `word` and `after` joined are the text."""

    gate: float  # gate value G(x)_i
    sentence: int  # index of the sentence in the split
    position: int  # index of the input token in the sentence; 0 is `<S>`
    before: str  # words before the token; "… " stands for omitted ones
    word: str  # the routed input token
    after: str  # words after the token, which the gate did not see; " …" stands for omitted ones


@dataclass(frozen=True)
class Word:
    """A token that is routed to an expert more often than the average token."""

    word: str  # text of the token; a piece that continues a word begins with "·"
    id: int  # index in the vocabulary
    count: int  # number of its occurrences that are routed to the expert
    share: float  # `count` as a fraction of all its occurrences in the text
    log_likelihood_ratio: float
    """Dunning's G2, by which an expert's words are sorted; 10.8 and above is significant at p < 0.001."""


@dataclass(frozen=True)
class Expert:
    """Statistics of one expert."""

    expert: int  # index of the expert
    group: int | None  # index of its group in a hierarchical mixture
    load: int
    load_share: float  # load as a fraction of all assignments
    importance: float
    importance_share: float  # importance as a fraction of the sum of all gate values
    entropy: float | None  # mean entropy, in bits, of the gate values of the tokens it serves; null if it serves none
    words: tuple[Word, ...]  # most characteristic words, in descending order of G2
    contexts: tuple[Context, ...]
    """Contexts with the largest gate values, equal ones in the order of the text. Each distinct prefix appears once."""


@dataclass(frozen=True)
class Pair:
    """Two experts that serve the same tokens."""

    experts: tuple[int, int]
    tokens: int  # number of tokens routed to both
    lift: float  # `tokens` divided by its expectation if the experts were chosen independently


@dataclass(frozen=True)
class Group:
    """Statistics of a group of experts in a hierarchical mixture."""

    group: int
    tokens: int  # number of tokens routed to at least one of its experts
    load: int
    load_share: float
    importance: float
    importance_share: float
    used: int  # number of its experts that serve any token


@dataclass(frozen=True)
class Spread:
    """Evenness of a distribution over experts."""

    entropy: float  # entropy in bits
    effective: float  # 2^entropy, the number of equally loaded experts that has this entropy


@dataclass(frozen=True)
class Pairs:
    """How often two experts serve the same token."""

    tokens: int  # number of tokens routed to several experts
    distinct: int  # number of different pairs that occur
    lift: float | None  # mean lift of all pairs, weighted by their expected number; null without pairs
    most_frequent: tuple[Pair, ...]


@dataclass(frozen=True)
class InspectedLayer:
    """Statistics of one gated layer."""

    layer: str  # name of the layer in the configuration, model.layers.<name>
    num_experts: int
    num_groups: int | None
    tokens: int  # number of input tokens
    unrouted: int  # number of tokens without an expert
    assignments: int
    most_experts: int  # largest number of experts that serve one token
    unused: int  # number of experts that serve no token
    entropy: float | None
    """Mean entropy, in bits, of the gate values of a token, normalised to sum 1; null if no token has an expert."""
    load_spread: Spread
    importance_spread: Spread
    pairs: Pairs
    groups: tuple[Group, ...]  # all groups by index; empty for a flat mixture
    experts: tuple[Expert, ...]  # all experts by index


@dataclass(frozen=True)
class Inspection:
    """Statistics of all gated layers of a model on one text."""

    run: str  # name of the run
    step: int  # training step of the checkpoint
    split: str
    sentences: int  # number of sentences read, from the start of the split
    words: int  # number of predicted words, `</S>` included
    tokens: int  # number of input tokens, `<S>` included: `words`, or more with subwords
    distinct_words: int  # number of different input tokens
    layers: tuple[InspectedLayer, ...]
