"""What an inspection finds out about the experts of a model; `inspect.json` is the record `Inspection`, key by key.

All counts are of one reading of a text in evaluation mode. A token is what the gate decides about: an input word (or
piece of a word), `<S>` at the beginning of each sentence.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """A place in the text at which a gate chose an expert; `before`, `word` and `after` joined are the text."""

    gate: float
    """The gate value, G(x)_i."""
    sentence: int
    """Number of the sentence in the split, from 0."""
    position: int
    """Number of the input token in its sentence; 0 is `<S>`."""
    before: str
    """The last words that the model had read before; "… " stands for more."""
    word: str
    """The input token at the decision."""
    after: str
    """The next words, which the gate could not see; " …" stands for more."""


@dataclass(frozen=True)
class Word:
    """A token that an expert serves more often than others are by it."""

    word: str
    """As text; a piece that continues a word begins with "·"."""
    id: int
    """Its number in the vocabulary."""
    count: int
    """How many of its occurrences the expert serves."""
    share: float
    """That number over all its occurrences in the text."""
    log_likelihood_ratio: float
    """Dunning's G2, by which the words of an expert are sorted: 10.8 or more is beyond chance (p < 0.001)."""


@dataclass(frozen=True)
class Expert:
    """What one expert does."""

    expert: int
    """Its number, from 0."""
    group: int | None
    """The group it belongs to, in a hierarchical mixture."""
    load: int
    """Tokens that it serves."""
    load_share: float
    """Of all assignments."""
    importance: float
    """Sum of its gate values."""
    importance_share: float
    """Of all gate values."""
    entropy: float | None
    """Bits: mean, over the tokens that it serves, of the entropy of the token's gate values; null if it serves none."""
    words: tuple[Word, ...]
    """Its most characteristic ones, the first most so."""
    contexts: tuple[Context, ...]
    """Those of the largest gate values; of equal ones the earlier. What is read alike in several sentences is one."""


@dataclass(frozen=True)
class Pair:
    """Two experts that serve the same tokens."""

    experts: tuple[int, int]
    tokens: int
    """Tokens that both serve."""
    lift: float
    """That number over what it would be on average if each served its tokens independently of the other."""


@dataclass(frozen=True)
class Group:
    """What the experts of one group do together, in a hierarchical mixture."""

    group: int
    tokens: int
    """Tokens that at least one of its experts serves."""
    load: int
    load_share: float
    importance: float
    importance_share: float
    used: int
    """Its experts that serve any token."""


@dataclass(frozen=True)
class Spread:
    """How evenly something is spread over experts."""

    entropy: float
    """Bits."""
    effective: float
    """2^entropy: as many experts with equal shares would have this entropy."""


@dataclass(frozen=True)
class Pairs:
    """How often two experts serve the same token."""

    tokens: int
    """Tokens that several experts serve."""
    distinct: int
    """Different pairs that occur."""
    lift: float | None
    """Mean lift of all pairs, weighted by what is expected of each; null where no two experts serve anything."""
    most_frequent: tuple[Pair, ...]


@dataclass(frozen=True)
class InspectedLayer:
    """One gated layer."""

    layer: str
    """Its name in the configuration, model.layers.<name>."""
    num_experts: int
    num_groups: int | None
    tokens: int
    """Tokens that the gate decided about."""
    unserved: int
    """Those that no expert serves."""
    assignments: int
    most_experts: int
    """The most experts that one token has."""
    unused: int
    """Experts that serve no token."""
    entropy: float | None
    """Bits: mean, over the tokens that have experts, of the entropy of their gate values, normalised to sum 1."""
    load_spread: Spread
    importance_spread: Spread
    pairs: Pairs
    groups: tuple[Group, ...]
    """By number; empty where the mixture is not hierarchical."""
    experts: tuple[Expert, ...]
    """All of them, by number."""


@dataclass(frozen=True)
class Inspection:
    """All gated layers of a model, as one text shows them."""

    run: str
    """Name of the run."""
    step: int
    """Of the checkpoint."""
    split: str
    sentences: int
    """Sentences read, the first of the split."""
    words: int
    """Words predicted, `</S>` included."""
    tokens: int
    """Input tokens, `<S>` included: as many as `words`, or more where words are made of pieces."""
    distinct_words: int
    """Different tokens among them."""
    layers: tuple[InspectedLayer, ...]
