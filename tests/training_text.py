"""Training text in memory, as a vocabulary's recipe sees it, and the sentences of a corpus."""

from collections import Counter


def sentences(corpus, split):
    """Stream all sentences of a split, part after part."""
    for part in corpus.parts(split):
        yield from part.sentences()


class TrainingText:
    """A list of sentences; what a recipe says is kept in `said`."""

    def __init__(self, lines=()):
        self.lines, self.said = list(lines), []
        self.say = self.said.append

    def sentences(self):
        return iter(self.lines)

    def count_words(self):
        counts = Counter()
        for line in self.lines:
            for word in line.split():
                counts[word] += 1
        return counts, sum(1 for line in self.lines if line.split())


class Unread(TrainingText):
    """Text that need not be read."""

    def sentences(self):
        raise AssertionError("the text need not be read")

    count_words = sentences
