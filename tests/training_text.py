"""Training text in memory, as a vocabulary recipe sees it, and the sentences of a corpus."""

from collections import Counter


def sentences(corpus, split):
    """Stream all sentences of a split, part after part."""
    for part in corpus.parts(split):
        yield from part.sentences()


class TrainingText:
    """A list of sentences; the lines that a recipe logs are kept in `logged`."""

    def __init__(self, lines=()):
        self.lines, self.logged = list(lines), []
        self.log = self.logged.append

    def sentences(self):
        return iter(self.lines)

    def count_words(self):
        counts = Counter()
        for line in self.lines:
            for word in line.split():
                counts[word] += 1
        return counts, sum(1 for line in self.lines if line.split())


class Unread(TrainingText):
    """Text that must not be read."""

    def sentences(self):
        raise AssertionError("the text must not be read")

    count_words = sentences
