"""A vocabulary of subwords: exact round trips, ids by frequency, the same bytes every time, quiet."""

import json
import random
from collections import Counter

import pytest
from training_text import TrainingText

from moe_lm.data.vocabulary.subwords import Subwords
from moe_lm.errors import UserError

SIZE = 400


@pytest.fixture(scope="module")
def sentences():
    """Words of a few hundred stems and endings, drawn with unlike frequencies."""
    source = random.Random(0)
    stems = ["".join(source.choices("abcdefghiklmnoprstu", k=source.randint(2, 6))) for _ in range(200)]
    endings = ["", "s", "ed", "ing", "ly", "ness"]
    weights = [1 / (1 + rank) for rank in range(200)]
    return [
        " ".join(stem + source.choice(endings) for stem in source.choices(stems, weights, k=12)) + " ."
        for _ in range(1500)
    ]


@pytest.fixture(scope="module")
def vocabulary(sentences):
    return build(sentences)


def build(sentences, size=SIZE, max_sentences=100_000):
    return Subwords(size=size, max_sentences=max_sentences).build(TrainingText(sentences))


def test_training_text_comes_back_exactly(vocabulary, sentences):
    for sentence in sentences:
        assert vocabulary.decode(vocabulary.encode(sentence)) == sentence


def test_any_text_comes_back_exactly_and_nothing_is_unknown(vocabulary):
    source = random.Random(1)
    ranges = [(33, 126), (0xA1, 0x24F), (0x2010, 0x2027), (0x2580, 0x2590), (0x4E00, 0x9FFF), (0xE000, 0xE005)]
    for _ in range(500):
        words = ["".join(chr(source.randint(*source.choice(ranges))) for _ in range(5)) for _ in range(4)]
        sentence = " ".join(words)
        ids = vocabulary.encode(sentence)
        assert vocabulary.unknown not in ids
        assert vocabulary.decode(ids) == sentence


@pytest.mark.parametrize("sentence", ["<S> </S> <UNK>", "<0x41>", "▁ ▁a a▁b", "\ue000a \ue000b", "👍🏽 é"])
def test_what_looks_like_a_marker_or_a_piece_is_text(vocabulary, sentence):
    ids = vocabulary.encode(sentence)
    assert not {vocabulary.start, vocabulary.end, vocabulary.unknown} & set(ids)
    assert vocabulary.decode(ids) == sentence


def test_white_space_of_any_kind_separates_words(vocabulary):
    assert vocabulary.encode("  one\t two\u2028three \n") == vocabulary.encode("one two three")


def test_ids_come_by_decreasing_frequency_and_start_last(vocabulary, sentences):
    counts = Counter(index for sentence in sentences for index in [*vocabulary.encode(sentence), vocabulary.end])
    in_order = [counts[index] for index in range(vocabulary.size)]
    assert in_order == sorted(in_order, reverse=True)
    assert vocabulary.size == SIZE
    assert vocabulary.start == SIZE - 1
    assert counts[vocabulary.end] == len(sentences)


def test_every_id_has_a_token_of_its_own(vocabulary):
    tokens = [vocabulary.token(index) for index in range(vocabulary.size)]
    assert len(set(tokens)) == SIZE
    markers = [tokens[index] for index in (vocabulary.start, vocabulary.end, vocabulary.unknown)]
    assert markers == ["<S>", "</S>", "<UNK>"]


def test_decode_leaves_out_the_marks_of_a_sentence_and_shows_the_unknown(vocabulary, sentences):
    ids = vocabulary.encode(sentences[0])
    assert vocabulary.decode([vocabulary.start, *ids, vocabulary.end]) == sentences[0]
    assert vocabulary.decode([*ids, vocabulary.unknown]) == f"{sentences[0]} <UNK>"


def test_the_same_text_gives_the_same_bytes_and_no_line_on_the_console(sentences, vocabulary, tmp_path, capfd):
    for name, made in {"one": vocabulary, "two": build(sentences)}.items():
        (tmp_path / name).mkdir()
        made.save(tmp_path / name)
    assert capfd.readouterr() == ("", "")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["subwords.model", "subwords.order.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_saved_vocabulary_loads_as_it_was(vocabulary, sentences, tmp_path):
    vocabulary.save(tmp_path)
    again = Subwords(size=SIZE, max_sentences=1).load(tmp_path)
    assert [again.encode(sentence) for sentence in sentences] == [vocabulary.encode(sentence) for sentence in sentences]
    assert (again.start, again.end, again.unknown) == (vocabulary.start, vocabulary.end, vocabulary.unknown)


def test_a_cap_on_sentences_takes_them_evenly_spaced(sentences):
    capped = build(sentences, max_sentences=500)
    by_hand = build(sentences[::3])
    assert [capped.token(i) for i in range(SIZE)] == [by_hand.token(i) for i in range(SIZE)]


def test_damage_is_reported(vocabulary, tmp_path):
    recipe = Subwords(size=SIZE, max_sentences=1)
    with pytest.raises(UserError, match=r"missing or damaged \(.*No such file"):
        recipe.load(tmp_path)
    vocabulary.save(tmp_path)
    order = json.loads((tmp_path / "subwords.order.json").read_text())
    for wrong in (order[:-1], [order[1], *order[1:]], [*order, SIZE], {}, [None] * SIZE):
        (tmp_path / "subwords.order.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="missing or damaged"):
            recipe.load(tmp_path)
    vocabulary.save(tmp_path)
    (tmp_path / "subwords.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="missing or damaged"):
        recipe.load(tmp_path)


def test_a_size_too_large_names_the_largest_that_works(sentences):
    with pytest.raises(UserError, match=r"size=90000 is too large for this text; give \d+ or less") as caught:
        build(sentences, size=90_000)
    largest = int(str(caught.value).split("give ")[1].split()[0])
    assert build(sentences, size=largest).size == largest


def test_a_size_below_the_number_of_characters_names_the_smallest(sentences):
    with pytest.raises(UserError, match=r"size=262 is less than the characters of this text; give \d+ or more"):
        build(sentences, size=262)


@pytest.mark.parametrize(("size", "max_sentences", "key"), [(259, 10, "size=259"), (400, 0, "max_sentences=0")])
def test_impossible_settings_are_refused(size, max_sentences, key):
    with pytest.raises(ValueError, match=rf"vocabulary\.{key}"):
        Subwords(size=size, max_sentences=max_sentences)
