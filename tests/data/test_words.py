"""A vocabulary of words: order, markers and counts worked out by hand."""

import random
from collections import Counter

import pytest
from training_text import TrainingText, Unread

from moe_lm.data.vocabulary.words import Words
from moe_lm.errors import UserError

TEXT = ["b a a", "a b c", "", "c d <UNK> <S>"]  # a 3, b 2, c 2, d 1; three sentences; two markers as words


def words(file=None, min_count=1, max_size=None):
    return Words(file=file, min_count=min_count, max_size=max_size)


def tokens(vocabulary):
    return [vocabulary.token(index) for index in range(vocabulary.size)]


def build(sentences, **options):
    return words(**options).build(TrainingText(sentences))


def from_file(tmp_path, content, **options):
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return words(file=str(path), **options).build(Unread())


def test_counted_words_come_by_count_then_by_spelling_with_the_markers_in_their_places():
    vocabulary = build(TEXT)
    # </S> 3 sorts before a 3; <UNK> counts the two markers of the text and sorts before b 2.
    assert tokens(vocabulary) == ["</S>", "a", "<UNK>", "b", "c", "d", "<S>"]
    assert (vocabulary.end, vocabulary.unknown, vocabulary.start, vocabulary.size) == (0, 2, 6, 7)


def test_cut_words_are_counted_as_unknown(tmp_path):
    vocabulary = build(TEXT, min_count=2)
    vocabulary.save(tmp_path)
    lines = (tmp_path / "vocabulary.txt").read_text().splitlines()
    assert lines == ["</S>\t3", "<UNK>\t3", "a\t3", "b\t2", "c\t2", "<S>\t0"]


def test_max_size_counts_the_markers_and_keeps_the_first_of_a_tie():
    assert tokens(build(TEXT, max_size=5)) == ["<UNK>", "</S>", "a", "b", "<S>"]  # c, c, d and two markers: 5


def test_counts_agree_with_counting_by_hand_on_random_text():
    random.seed(0)
    sentences = [" ".join(random.choices("abcdefghij", [2**i for i in range(10)], k=9)) for _ in range(300)]
    by_hand = Counter()
    for sentence in sentences:
        for word in sentence.split(" "):
            by_hand[word] += 1
    vocabulary = build(sentences, min_count=20)
    expected = {word for word, count in by_hand.items() if count >= 20}
    assert set(tokens(vocabulary)) == expected | {"<S>", "</S>", "<UNK>"}
    counts = [by_hand[token] for token in tokens(vocabulary) if token in expected]
    assert counts == sorted(counts, reverse=True)


def test_encode_splits_at_any_white_space_and_other_words_and_markers_are_unknown():
    vocabulary = build(TEXT)
    a, b, unknown = 1, 3, 2
    assert vocabulary.encode(" a \u2028b\tzebra  <S> </S> <UNK>\r\n") == [a, b, *[unknown] * 4]
    assert vocabulary.encode("  ") == []


def test_decode_leaves_out_the_marks_of_a_sentence_only():
    vocabulary = build(TEXT)
    ids = [vocabulary.start, *vocabulary.encode("c a zebra d"), vocabulary.end]
    assert vocabulary.decode(ids) == "c a <UNK> d"


@pytest.mark.parametrize("options", [{}, {"min_count": 2}])
def test_a_saved_vocabulary_loads_as_it_was(tmp_path, options):
    vocabulary = build(TEXT, **options)
    vocabulary.save(tmp_path)
    again = words(**options).load(tmp_path)
    assert tokens(again) == tokens(vocabulary)
    assert (again.start, again.end, again.unknown) == (vocabulary.start, vocabulary.end, vocabulary.unknown)
    before = (tmp_path / "vocabulary.txt").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "vocabulary.txt").read_bytes() == before


def test_the_forms_of_the_published_file(tmp_path):
    """`1b_word_vocab.txt` has counts and two markers, `vocab-2016-09-10.txt` all three and a line that is no word."""
    with_counts = "<S> 60602056\nthe 37\n<UNK> 9\n, 8\ncaf\u00a0e 3\n"
    assert tokens(from_file(tmp_path, with_counts)) == ["</S>", "<S>", "the", "<UNK>", ",", "caf\u00a0e"]
    without = "</S>\n<S>\n<UNK>\nthe\n,\n!!!MAXTERMID\n"
    assert tokens(from_file(tmp_path, without)) == ["</S>", "<S>", "<UNK>", "the", ","]


def test_what_a_file_lacks_is_logged(tmp_path):
    path = tmp_path / "words.txt"
    bare, full = "the\n", "<S>\n</S>\n<UNK>\nthe\n"
    for content, expected in ((bare, "1 tokens, <S>, </S>, <UNK> added"), (full, "4 tokens, the markers among them")):
        path.write_text(content)
        text = Unread()
        words(file=str(path), min_count=5).build(text)
        (logged,) = text.logged
        assert expected in logged
        assert logged.endswith("vocabulary.min_count does not apply to a file")


def test_min_count_is_given_only_where_it_alone_decides(tmp_path):
    assert words(min_count=3).min_count == 3
    assert words(min_count=3, max_size=9).min_count is None
    assert words(file=str(tmp_path / "words.txt"), min_count=3).min_count is None


def test_a_file_keeps_its_order_and_gets_the_markers_it_lacks(tmp_path):
    vocabulary = from_file(tmp_path, "the 9\nof\n<S>\ncafé\t3\n\n")
    assert tokens(vocabulary) == ["</S>", "<UNK>", "the", "of", "<S>", "café"]
    assert tokens(from_file(tmp_path, "the\nof")) == ["</S>", "<UNK>", "the", "of", "<S>"]
    vocabulary.save(tmp_path)
    assert tokens(words().load(tmp_path)) == tokens(vocabulary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", r"words\.txt, line 3: a is already on line 1"),
        (b"a\n\xff\n", r"words\.txt, line 2: not UTF-8"),
        ("", r"words\.txt holds no word"),
        ("<S>\n</S>\n", r"words\.txt holds no word"),
        ("a\nb 1 2\n", r"line 2: expected a word, and perhaps its count, not 3 fields"),
        ("a b\n", r"line 1: expected a word"),
    ],
)
def test_a_bad_file_is_reported_with_its_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        from_file(tmp_path, content)


def test_a_missing_file_is_reported(tmp_path):
    for ask in (lambda recipe: recipe.inputs(), lambda recipe: recipe.build(Unread())):
        with pytest.raises(UserError, match=r"nowhere\.txt cannot be read: No such file"):
            ask(words(file=str(tmp_path / "nowhere.txt")))


def test_a_damaged_saved_vocabulary_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary\.txt cannot be read"):
        words().load(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("a\t3\n</S>\t2\n")
    with pytest.raises(UserError, match=r"damaged: it lacks <S>, <UNK>"):
        words().load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 0}, r"vocabulary\.min_count=0"),
        ({"max_size": 3}, r"vocabulary\.max_size=3"),
        ({"file": "x", "max_size": 10}, r"max_size does not apply to vocabulary\.file"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        words(**options)


def test_a_minimum_count_that_nothing_reaches_is_refused():
    with pytest.raises(UserError, match=r"none of the 4 training words occurs vocabulary\.min_count=9 times"):
        build(TEXT, min_count=9)


def test_inputs_change_with_the_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a\n")
    before = words(file=str(path)).inputs()
    path.write_text("a\nb\n")
    assert words(file=str(path)).inputs() != before
    assert words().inputs() == {"file": None}
