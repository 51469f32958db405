"""The State of the Union addresses: sentences and tokens worked out by hand, and splits that keep apart."""

import subprocess
import sys
from itertools import chain

import pytest
from training_text import sentences

from moe_lm.data.corpus import SPLITS
from moe_lm.data.corpus.sotu import Sotu, split_sentences, tokenize


@pytest.fixture(scope="module")
def corpus():
    return Sotu(max_words=256, seed=1)


@pytest.fixture(scope="module")
def splits(corpus):
    return {split: list(sentences(corpus, split)) for split in SPLITS}


TOKENS = {
    "It's 5% of $1,000.50, isn't it?": "It 's 5 % of $ 1,000.50 , isn 't it ?",
    'Mr. Smith said, "We don\'t."': 'Mr. Smith said , " We don \'t . "',
    "The U.S. and U.S.-led forces left at 9 p.m. on May 1.": "The U.S. and U.S.-led forces left at 9 p.m. on May 1 .",
    "A 12-year-old boy (from St. Louis) spoke.": "A 12-year-old boy ( from St. Louis ) spoke .",
    "Farmers' 1980's prices; and/or 1/2.": "Farmers ' 1980 's prices ; and / or 1 / 2 .",
    "We went... and -- I think -- won!": "We went ... and -- I think -- won !",
    "General W. T. Sherman, Jr., wrote No. 5.": "General W. T. Sherman , Jr. , wrote No. 5 .",
    "He answered no. It is so.": "He answered no . It is so .",
    "AT&T paid John O'Neill [twice].": "AT & T paid John O 'Neill [ twice ] .",
    "This is about you and I.": "This is about you and I .",
}


@pytest.mark.parametrize(("sentence", "tokens"), TOKENS.items())
def test_tokens_are_those_of_the_benchmark(sentence, tokens):
    assert tokenize(sentence) == tokens


SENTENCES = {
    "We met Mr. Smith. He left. ": ["We met Mr. Smith.", "He left."],
    "The U.S. Army won in Washington, D. C. It did.": ["The U.S. Army won in Washington, D. C. It did."],
    "Why? Because! So it is...": ["Why?", "Because!", "So it is..."],
    'He said: "We can. We will." All agreed.': ['He said: "We can.', 'We will."', "All agreed."],
    "It failed--twice—and then- well, won.": [
        "It failed -- twice -- and then -- well, won.",
    ],
    "Thank you. [Laughter] It's funny—[laughter]—is it not?": ["Thank you.", "It's funny -- is it not?"],
    "The President. Good evening. Mr. Speaker, sit.": ["Good evening.", "Mr. Speaker, sit."],
    "Audience members. Boo!": ["Boo!"],
    "THE DEPARTMENT OF STATE.": [],
    "Child Health Assessment": [],
    "1940 67 66.4 61 72 41 37 26 88.0.": [],
    "Receipts ...... 2 ...... 16 million.": [],
    "See No. 5 of 1920. Then sec. 3 applies.": ["See No. 5 of 1920.", "Then sec. 3 applies."],
    "• (3) It lies in our past.The rest follows.": ["It lies in our past.", "The rest follows."],
    "Low- and middle-income families gain.": ["Low- and middle-income families gain."],
    "The law (see [the States]) holds.": ["The law (see [the States]) holds."],
}


@pytest.mark.parametrize(("paragraph", "sentences"), SENTENCES.items())
def test_sentences_end_where_they_should(paragraph, sentences):
    assert split_sentences(paragraph) == sentences


def test_the_whole_corpus_has_its_known_size_and_shares(splits):
    sizes = {split: len(sentences) for split, sentences in splits.items()}
    total = sum(sizes.values())
    assert total > 60_000
    assert sum(len(sentence.split()) for sentence in chain(*splits.values())) > 2_000_000
    assert sizes["valid"] / total == pytest.approx(0.03, abs=0.003)
    assert sizes["test"] / total == pytest.approx(0.05, abs=0.004)


def test_no_sentence_comes_twice_in_any_split(splits):
    sentences = list(chain(*splits.values()))
    assert len(set(sentences)) == len(sentences)


def test_tokens_are_separated_by_single_spaces_and_every_sentence_has_a_letter(splits):
    for sentence in chain(*splits.values()):
        assert sentence == " ".join(sentence.split())
        assert any(letter.isalpha() for letter in sentence)


def test_marks_never_stick_to_words(splits):
    words = {word for sentence in chain(*splits.values()) for word in sentence.split()}
    assert not [word for word in words if len(word) > 1 and (word[0] in '("[$,;' or word[-1] in '),;:?!"]%')]
    assert not [word for word in words if "laughter]" in word.lower()]


def test_a_second_corpus_gives_the_same_and_the_seed_moves_no_sentence_to_another_split(splits, monkeypatch):
    import sotu

    # A fifth of the text, so that the third pass stays short: the splits must not depend on the rest.
    some = sotu.fileids()[::5]
    monkeypatch.setattr(sotu, "fileids", lambda: some)
    one, same, other = (Sotu(max_words=256, seed=seed) for seed in (1, 1, 2))
    for split in SPLITS:
        found = list(sentences(one, split))
        assert found == list(sentences(same, split))
        assert found != list(sentences(other, split))
        assert sorted(found) == sorted(sentences(other, split))
        assert set(found) <= set(splits[split])
    order = {sentence: index for index, sentence in enumerate(splits["train"])}
    places = [order[sentence] for sentence in sentences(one, "train")]
    assert places == sorted(places)  # nor does the order of two sentences depend on the others


def test_the_text_is_read_once(corpus, splits, monkeypatch):
    import sotu

    monkeypatch.setattr(sotu, "raw", lambda address: pytest.fail("read again"))
    assert list(sentences(corpus, "valid")) == splits["valid"]


def test_importing_the_module_imports_neither_pandas_nor_the_text():
    code = "import sys, moe_lm.data.corpus.sotu; print(sorted({'pandas', 'sotu'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_inputs_name_the_version_of_the_text(corpus, monkeypatch):
    before = corpus.inputs()
    monkeypatch.setattr("moe_lm.data.corpus.sotu.version", lambda package: "99")
    assert corpus.inputs() == before | {"sotu": "99"} != before


def test_max_words_below_one_is_refused():
    with pytest.raises(ValueError, match=r"corpus\.max_words=0"):
        Sotu(max_words=0, seed=1)
