"""What was counted against what is published of a corpus."""

_MARKERS = 3


def compare(published: dict[str, int], statistics: dict[str, dict], vocabulary_size: int) -> dict[str, dict[str, int]]:
    """Return `expected` and `found` for each published count: `<split>.<statistic>`, or `vocabulary`."""
    found = {f"{split}.{name}": count for split, counts in statistics.items() for name, count in counts.items()}
    found["vocabulary"] = vocabulary_size
    return {name: {"expected": count, "found": found[name]} for name, count in published.items()}


def report(figures: dict[str, dict[str, int]]) -> list[str]:
    """Return lines for people: one where all agree, a loud warning of several where one does not."""
    if not figures:
        return []
    wrong = {name: each for name, each in figures.items() if each["expected"] != each["found"]}
    if not wrong:
        counts = ", ".join(f"{_words(name)} {each['found']:,}" for name, each in figures.items())
        compared = {name.partition(".")[0] for name in figures}
        what = "the test split, all that was compared, " if compared == {"test"} else ""
        return [f"{what}agrees with the published figures: {counts}"]
    lines = ["*" * 72, "WARNING: counts differ from the published figures"]
    for name, each in wrong.items():
        off = each["found"] - each["expected"]
        lines.append(f"  {_words(name)}: {each['found']:,}, published {each['expected']:,} ({off:+,})")
    vocabulary = wrong.get("vocabulary", {"expected": 0, "found": 0})
    if 0 < abs(vocabulary["found"] - vocabulary["expected"]) <= _MARKERS:
        lines.append("  A difference this small may be the markers', counted otherwise.")
    if wrong.keys() != {"vocabulary"}:
        lines.append("This is NOT the text that they belong to: no perplexity on it can be set beside published ones.")
    return [*lines, "*" * 72]


def _words(name: str) -> str:
    if name == "vocabulary":
        return "vocabulary with <S>, </S> and <UNK>"
    split, _, statistic = name.partition(".")
    return f"{split} {statistic}{' with </S>' if statistic == 'words' else ''}"
