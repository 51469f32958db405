"""Sentences are drawn from the model's own distribution, each from its seed and number alone."""

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_run import RUN, scored
from tiny_training import assert_one_line

from moe_lm import load
from moe_lm.analysis.sample import SamplingConfig, next_log_probabilities, sample, sample_token
from moe_lm.cli import sample as command
from moe_lm.cli.config import composed
from moe_lm.data.batch import collate
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel

DRAWS = 4000


@torch.no_grad()
def next_probabilities(lm: LoadedModel, ids: list[int]) -> np.ndarray:
    """Probability of every next token, from the nats that evaluation computes for each possible continuation."""
    size = lm.vocabulary.size
    tokens = np.array([[*ids, token] for token in range(size)], dtype=np.int32)
    starts = np.arange(size + 1) * (len(ids) + 1)
    split = Split(tokens=tokens.reshape(-1), starts=starts, words=np.full(size, len(ids) + 1))
    batch = collate(split, np.arange(size), lm.vocabulary.start)
    return np.exp(-lm.model.token_nats(batch)[-size:].numpy())


def peaked(lm: LoadedModel, by: float = 8, **bias: float) -> LoadedModel:
    """A copy whose probabilities differ much from one another; `bias` is added to the markers' logits.

    Most pieces of its text begin a word: of the tiny model's 300 pieces most are bytes.
    """
    lm = LoadedModel(copy.deepcopy(lm.model), lm.vocabulary, lm.config, lm.step, lm.fingerprint)
    with torch.no_grad():
        lm.model.softmax.weight_VD.mul_(by)
        for marker, value in bias.items():
            lm.model.softmax.bias_V[getattr(lm.vocabulary, marker)] += value
        for index in range(lm.vocabulary.size):
            lm.model.softmax.bias_V[index] += 6 * lm.vocabulary.token(index).startswith("▁")
    return lm


@pytest.mark.parametrize("prefix", ["", "w3 zebra"])
def test_the_likeliest_word_every_time(either, prefix):
    lm = peaked(load("runs/tiny"), end=-8)
    ids = lm.vocabulary.encode(prefix)
    for _ in range(40):
        probability_V = next_probabilities(lm, ids)
        probability_V[[lm.vocabulary.start, lm.vocabulary.unknown]] = 0
        likeliest = int(probability_V.argmax())
        if likeliest == lm.vocabulary.end or len(lm.vocabulary.decode([*ids, likeliest]).split()) > 12:
            break
        ids.append(likeliest)
    words = lm.vocabulary.decode(ids).replace("<UNK>", "zebra")
    assert len(words.split()) > len(prefix.split()) + 2
    assert lm.sample(prefix, num=2, top=1, max_words=12) == [words, words]


def chi_squared(counts: Counter, probability: dict[str, float]) -> tuple[float, float]:
    """Pearson's statistic of the counts, and what it exceeds once in a million (Wilson and Hilferty's formula)."""
    assert counts.keys() <= probability.keys()
    total = counts.total()
    often = {word: p * total for word, p in probability.items() if p * total >= 5}
    found = {word: counts[word] for word in often}
    cells = [
        *((found[word], often[word]) for word in often),
        (total - sum(found.values()), total - sum(often.values())),
    ]
    cells = [(n, expected) for n, expected in cells if expected > 0.5]
    free = len(cells) - 1
    bound = free * (1 - 2 / (9 * free) + 4.7534 * math.sqrt(2 / (9 * free))) ** 3
    return sum((n - expected) ** 2 / expected for n, expected in cells), bound


def expected_of(lm: LoadedModel, ids: list[int], change) -> dict[str, float]:
    """The probabilities of the next word, `</S>` as an empty one, after `change` of those of all tokens."""
    probability_V = change(next_probabilities(lm, ids))
    words = {i: lm.vocabulary.token(i) for i in np.flatnonzero(probability_V)}
    words[lm.vocabulary.end] = ""
    return {word: probability_V[i] / probability_V.sum() for i, word in words.items()}


def without(lm: LoadedModel, *markers: str):
    def change(probability_V: np.ndarray) -> np.ndarray:
        probability_V[[getattr(lm.vocabulary, marker) for marker in markers]] = 0
        return probability_V

    return change


def test_words_are_drawn_as_often_as_the_model_says(trained, monkeypatch):
    """4000 draws of a next word; each rule's counts fit its own distribution and no other rule's."""
    lm = peaked(load("runs/tiny"), by=3, unknown=5)
    passes = {}

    def pass_once(model, vocabulary, ids):
        if tuple(ids) not in passes:
            passes[tuple(ids)] = next_log_probabilities(model, vocabulary, ids)
        return passes[tuple(ids)]

    monkeypatch.setattr("moe_lm.analysis.sample.next_log_probabilities", pass_once)
    ids, bare = lm.vocabulary.encode("w1"), without(lm, "start", "unknown")

    def likeliest(probability_V):
        probability_V = bare(probability_V)
        return np.where(probability_V >= np.sort(probability_V)[-5], probability_V, 0)

    rules = {
        "all": (SamplingConfig(max_words=2), bare),
        "cold": (SamplingConfig(max_words=2, temperature=0.5), lambda p: bare(p) ** 2),
        "hot": (SamplingConfig(max_words=2, temperature=2), lambda p: bare(p) ** 0.5),
        "top": (SamplingConfig(max_words=2, top=5), likeliest),
        "unknown": (SamplingConfig(max_words=2, unknown=True), without(lm, "start")),
    }
    expected = {name: expected_of(lm, ids, change) for name, (_, change) in rules.items()}
    for name, (how, _) in rules.items():
        drawn = [sample(lm.model, lm.vocabulary, "w1", seed=1, number=i, config=how) for i in range(DRAWS)]
        counts = Counter(one.sentence.removeprefix("w1").strip() for one in drawn)
        for other, probability in expected.items():
            if other == name:
                statistic, bound = chi_squared(counts, probability)
                assert statistic < bound, name
            elif counts.keys() <= probability.keys():
                statistic, bound = chi_squared(counts, probability)
                assert statistic > bound, (name, other)


def test_the_ends_of_the_unit_interval():
    """No sample is a banned token or lies beyond the last one."""
    log_p_V = torch.tensor([-torch.inf, 0.3, 0.1, -torch.inf, 0.3, 0.0]).double().log_softmax(dim=0)
    for how in (
        SamplingConfig(),
        SamplingConfig(top=2),
        SamplingConfig(top=6),
        SamplingConfig(temperature=1e-300),
        SamplingConfig(temperature=1e300),
    ):
        assert sample_token(log_p_V, 0.0, [5], how) == 1
        assert sample_token(log_p_V, 1 - 2.0**-53, [5], how) == (1 if how.top == 1 else 4)
    assert sample_token(log_p_V, 1 - 2.0**-53, [5], SamplingConfig(top=1)) == 1  # of equal ones the lower id
    for last in torch.linspace(0.1, 3, 50, dtype=torch.float64):
        assert sample_token(torch.tensor([0.0, last, -torch.inf]).double(), 1 - 2.0**-53, [], SamplingConfig()) == 1


def test_a_sentence_depends_on_its_seed_and_number_alone(either, moe_lm):
    five = moe_lm("sample", RUN, "max_words=4").out.splitlines()
    assert moe_lm("sample", RUN, "max_words=4", "num=2").out.splitlines() == five[:2]
    lm, how = load("runs/tiny"), SamplingConfig(max_words=4)
    assert lm.sample(num=7, max_words=4)[:5] == five
    assert len({*five, *lm.sample(seed=2, max_words=4)}) == 10
    assert sample(lm.model, lm.vocabulary, "", seed=1, number=4, config=how).sentence == five[4]


def test_an_export_draws_what_its_run_does(trained, moe_lm, tmp_path):
    assert moe_lm("export", RUN, f"to={tmp_path / 'exported'}").code == 0
    expected = load("runs/tiny").sample("w1 w2")
    assert moe_lm("sample", f"run={tmp_path / 'exported'}", "prefix=w1 w2").out.splitlines() == expected


PREFIXES = ["w1", "  w1   w2 ", '"', "it's", "a,b=c", "[w1]", "null w1", "</S> <S>", "w1 \\"]


def test_every_sentence_begins_with_the_prefix(either, moe_lm):
    lm = load("runs/tiny")
    for prefix in PREFIXES:
        given, found = prefix.split(), lm.sample(prefix, max_words=3, num=1)
        words = found[0].split()
        assert words[: len(given) - 1] == given[:-1], prefix
        assert words[len(given) - 1].startswith(given[-1]), prefix  # pieces may go on with its last word
    outcome = moe_lm("sample", RUN, f"prefix={PREFIXES[-1]}", "max_words=3", "num=1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == found


def test_a_prefix_is_taken_literally():
    assert [composed("sample", [RUN, f"prefix={prefix}"]).prefix for prefix in PREFIXES] == PREFIXES


def test_unknown_words_of_the_prefix_are_told(trained, moe_lm):
    outcome = moe_lm("sample", RUN, "prefix=w1 zebra <UNK>", "num=1")
    [line] = outcome.err.splitlines()
    assert line.endswith(": zebra <UNK>")
    assert outcome.out.startswith("w1 zebra <UNK> ")
    assert moe_lm("sample", RUN, "prefix=w1 w2", "num=1").err == ""


@pytest.mark.parametrize("marker", ["unknown", "start"])
def test_markers_are_not_drawn(either, marker):
    lm = peaked(load("runs/tiny"), end=-50, **{marker: 50})
    for sentence in lm.sample(num=3, max_words=6, temperature=2):
        assert not {"<UNK>", "<S>", "</S>"} & set(sentence.split())
    if marker == "unknown":
        assert lm.sample(num=2, max_words=6, unknown=True) == 2 * [" ".join(6 * ["<UNK>"])]


@pytest.mark.parametrize("prefix", ["", "w1 w2 w3"])
def test_a_sentence_is_cut_at_its_most_words(either, prefix):
    """Where it is cut does not change what comes before."""
    lm, found = peaked(load("runs/tiny"), end=-50), {}
    for most in (4, 5, 9):
        how = SamplingConfig(max_words=most)
        found[most] = sample(lm.model, lm.vocabulary, prefix, seed=1, number=0, config=how)
        assert not found[most].ended
        assert len(found[most].sentence.split()) == most
    assert found[9].sentence.split()[:5] == found[5].sentence.split()
    assert found[9].sentence.split()[:4] == found[4].sentence.split()


def test_a_sentence_may_end_where_it_would_be_cut(either):
    lm = peaked(load("runs/tiny"), end=50)
    drawn = sample(lm.model, lm.vocabulary, "w1 w2", seed=1, number=0, config=SamplingConfig(max_words=3))
    assert (drawn.sentence, drawn.ended) == ("w1 w2", True)
    assert drawn.log10 == pytest.approx(0, abs=1e-6)


def test_log10_is_what_score_says_of_the_words_drawn(trained, moe_lm, tmp_path):
    lines = moe_lm("sample", RUN, "json=true", "num=15", "temperature=1.5", "max_words=30").out.splitlines()
    ended = [one for one in map(json.loads, lines) if one["ended"] and one["sentence"]]
    assert len(ended) > 3
    (tmp_path / "all.txt").write_text("".join(f"{one['sentence']}\n" for one in ended))
    printed = [line.split("\t") for line in scored(moe_lm, str(tmp_path / "all.txt"), "words=false")["before"]]
    for one, (log10, sentence) in zip(ended, printed, strict=True):
        assert one["sentence"] == sentence
        assert one["log10"] == pytest.approx(float(log10), abs=1e-4)
    lm = load("runs/tiny")
    tries = (sample(lm.model, lm.vocabulary, "w1 w2", seed=1, number=n, config=SamplingConfig()) for n in range(10))
    drawn = next(one for one in tries if one.ended)  # within the most words that a sample has
    assert drawn.log10 == pytest.approx(sum(lm.score(drawn.sentence).log10_of_words[2:]), abs=1e-4)


def test_json_names_what_each_sentence_comes_from(trained, moe_lm):
    lines = moe_lm("sample", RUN, "json=true", "checkpoint=11", "seed=7", "num=3").out.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(one["run"], one["step"], one["seed"], one["number"]) for one in records] == [
        ("runs/tiny", 11, 7, number) for number in range(3)
    ]
    plain = moe_lm("sample", RUN, "checkpoint=11", "seed=7", "num=3").out.splitlines()
    assert [one["sentence"] for one in records] == plain


def test_pieces_are_spelt_as_words(subwords_once, monkeypatch):
    monkeypatch.chdir(subwords_once)
    lm = load("runs/tiny")
    for sentence in lm.sample("ü▁x \ue000 w1", num=3, max_words=10):
        assert sentence.startswith("ü▁x \ue000 w1")
        assert sentence.count("▁") == 1
        assert lm.vocabulary.decode(lm.vocabulary.encode(sentence)) == sentence


def test_pieces_that_never_end_a_word_are_cut(subwords_once, monkeypatch):
    monkeypatch.chdir(subwords_once)
    lm = peaked(load("runs/tiny"))
    piece = next(i for i in range(300) if lm.vocabulary.token(i).isalnum())
    with torch.no_grad():
        lm.model.softmax.bias_V[piece] += 1000
    drawn = sample(lm.model, lm.vocabulary, "w1", seed=1, number=0, config=SamplingConfig(max_words=3))
    assert (len(drawn.sentence.split()), drawn.ended) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["num=0"], "num=0: must be at least 1"),
        (["top=0"], "top=0: must be at least 1"),
        (["top=all"], "top=all: needs a whole number"),
        (["temperature=0"], "temperature=0.0: must be positive"),
        (["temperature=inf"], "temperature=inf"),
        (["temperature=nan"], "temperature=nan"),
        (["max_words=0"], "max_words=0: must be at least 1"),
        (["max_words=3", "prefix=w1 w2 w3"], "max_words=3: the prefix has 3 words; raise max_words"),
        (["machine.device=tpu"], "machine.device=tpu"),
    ],
)
def test_wrong_inputs_are_refused(trained, set_threads, capsys, arguments, expected):
    with pytest.raises(UserError, match=expected):
        command.main([RUN, *arguments])
    assert capsys.readouterr().out == ""


def test_a_refusal_is_one_line(trained, moe_lm):
    outcome = moe_lm("sample", RUN, "checkpoint=7")
    assert (outcome.code, outcome.out) == (2, "")
    assert_one_line(outcome, "no checkpoint 7")


def test_python_refuses_alike(trained):
    lm = load("runs/tiny")
    for wrong in ({"temperature": 0}, {"top": 0}, {"max_words": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            lm.sample(**wrong)
