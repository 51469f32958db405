"""The inspection as one html page that needs nothing else, in the look of a report's."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from moe_lm.analysis.experts import Context, Expert, InspectedLayer, Inspection, Word
from moe_lm.analysis.experts.tables import busiest, groups_table, layers_table, of_all, pairs_table
from moe_lm.report.formats import percent, plain, small
from moe_lm.report.page import bullets, captioned, html_table, whole_page

CSS = Path(__file__).with_name("page.css")
OPEN = 16
"""The most experts whose contexts are unfolded from the first."""
GLANCE = 8
"""Words that an expert shows while it is folded."""
LISTED = 20
"""Rows of the table of pairs."""
NOTES = (
    "Contexts: the places in the text where the expert's gate value, to the left, is largest; of equal values the "
    "earlier place. The gate decided at the underlined word, having read what stands before it in the sentence; the "
    "grey words after it are for the reader. What is read alike in several sentences is shown once.",
    "Characteristic words: the words at the decision, input words, that the expert serves more often than other words, "
    "by Dunning's log-likelihood ratio of the words it serves against all words of the text; the strongest first. "
    "Behind a word: how often the expert serves it, and the share that this is of the word's occurrences.",
    "Entropy, of a token's gate values: 0 bits where one expert has all the weight, log2 k where k share it equally.",
)
PIECES = "A word that begins with “·” is a piece that continues a word."
CAPTIONS = {
    "load": (
        "Load and importance",
        "Load is the number of tokens that an expert serves, importance the sum of its gate values; dashed: an even "
        "share. An expert with little importance for its load is mostly a token's lesser choice.",
    ),
    "pairs": (
        "Which experts serve the same tokens",
        "Lift: tokens that both serve, over what it would be on average if each served its tokens independently of the "
        "other. The stronger the colour, the more they go together; empty: hardly ever, or never.",
    ),
}


def to_html(inspection: Inspection, pictures: Mapping[str, Mapping[str, str]], most: int) -> str:
    """The whole page; `pictures` are svg documents by layer and name, `most` the experts of a layer in full."""
    read = (
        f"What each expert is for: step {plain(inspection.step)}, read on {plain(inspection.sentences)} sentences "
        f"({plain(inspection.words)} words with </S>) of the {inspection.split} split, in evaluation mode"
    )
    has_pieces = any(
        word.word.startswith("·") for layer in inspection.layers for expert in layer.experts for word in expert.words
    )
    body = [
        f"<h1>{escape(inspection.run)}</h1>",
        f'<p class="soft">{escape(read)}</p>',
        html_table(layers_table(inspection.layers)),
        "<h2>How to read the experts</h2>",
        bullets(map(escape, (*NOTES, PIECES) if has_pieces else NOTES), ' class="notes"'),
        *(part for layer in inspection.layers for part in layer_parts(layer, pictures[layer.layer], most)),
    ]
    return whole_page(f"Experts of {inspection.run}", body, CSS.read_text(encoding="utf-8"))


def layer_parts(layer: InspectedLayer, pictures: Mapping[str, str], most: int) -> Iterator[str]:
    """The parts of the page about one layer."""
    place = stem(layer.layer)
    shown = busiest(layer, most)
    tables = {"groups": groups_table(layer, most), "pairs": pairs_table(layer, LISTED)}
    names = ["experts", *(name for name, table in tables.items() if table)]
    yield f'<h2 id="{place}">Layer {escape(layer.layer)}</h2>'
    links = (f'<a href="#{place}-{name}">{name}</a>' for name in names)
    yield f"<nav>{''.join(links)}</nav>"
    captions = {f"{place}-{name}": text for name, text in CAPTIONS.items()}
    yield captioned(captions, {f"{place}-{name}": svg for name, svg in pictures.items()})
    yield f'<h3 class="list" id="{place}-experts">Experts{of_all(len(shown), layer.num_experts)}, by load</h3>'
    yield left_out(layer, len(shown))
    yield from (expert_details(expert, len(shown) <= OPEN) for expert in shown)
    for name, table in tables.items():
        if table:
            yield f'<section id="{place}-{name}">{html_table(table, "h3")}</section>'


def stem(layer: str) -> str:
    """The name of a layer as it stands in names of files and of places on the page."""
    return re.sub(r"\W", "_", layer)


def left_out(layer: InspectedLayer, shown: int) -> str:
    """What is to be said of tokens and experts that are not in the list."""
    lines = []
    if layer.unserved:
        share = percent(layer.unserved / layer.tokens)
        lines.append(f"{plain(layer.unserved)} of {plain(layer.tokens)} tokens ({share}) are served by no expert.")
    if layer.unused:
        lines.append(f"{plain(layer.unused)} of {plain(layer.num_experts)} experts serve no token of this text.")
    if hidden := layer.num_experts - layer.unused - shown:
        lines.append(f"{plain(hidden)} more with less load are in inspect.json.")
    return f'<p class="soft">{" ".join(lines)}</p>' if lines else ""


def expert_details(expert: Expert, is_open: bool) -> str:
    """A part to unfold for one expert; folded, it shows figures and words."""
    figures = [f"load {percent(expert.load_share)}", f"importance {percent(expert.importance_share)}"]
    figures.append(f"entropy {small(expert.entropy)} bits")
    if expert.group is not None:
        figures.insert(0, f"group {expert.group}")
    words = "".join(f"<b>{escape(word.word)}</b> " for word in expert.words[:GLANCE])
    glance = f"<q>{words}</q>" if words and not is_open else ""
    terms = f'<h4>Characteristic words</h4><ul class="terms">{"".join(map(term, expert.words))}</ul>'
    if not expert.words:
        terms = "<h4>No word that it serves more often than others</h4>"
    return (
        f'<details class="expert"{" open" if is_open else ""}>'
        f"<summary>Expert {expert.expert} <span>{' · '.join(figures)}</span>{glance}</summary>{terms}"
        f'<h4>Strongest contexts</h4><ol class="contexts">{"".join(map(context, expert.contexts))}</ol></details>'
    )


def term(word: Word) -> str:
    """A characteristic word with its count and share."""
    return f"<li>{escape(word.word)} <span>{plain(word.count)} · {100 * word.share:.0f} %</span></li>"


def context(place: Context) -> str:
    """A context with the word at which the gate decided marked."""
    before, word, after = escape(place.before), escape(place.word), escape(place.after)
    return f"<li><span>{place.gate:.3f}</span><span>{before}<mark>{word}</mark><i>{after}</i></span></li>"
