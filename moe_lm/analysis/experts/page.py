"""Write an inspection to `<run>/inspect/` as an HTML page, JSON and pictures, or return its tables as text."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moe_lm.analysis.experts import Expert, InspectedLayer, Inspection
from moe_lm.analysis.experts.pictures import draw_pictures, inline_svg
from moe_lm.atomic_io import replace_files

MAX_OPEN = 16
"""Contexts are unfolded initially if the page shows at most this many experts of the layer."""
MAX_PAIRS = 20
"""Maximum number of pairs of experts in a layer's table."""
LAYER_COLUMNS = (
    *("layer", "experts", "experts a token", "tokens without an expert", "unused experts"),
    *("effective experts (load)", "entropy of load (bits)", "effective experts (importance)"),
    *("entropy of a token's gates (bits)", "largest load share"),
)
EXPERT_COLUMNS = ("expert", "share of load", "share of importance", "entropy (bits)", "most characteristic words")


def write_inspection(folder: Path, inspection: Inspection, max_experts: int) -> tuple[Path, ...]:
    """Write all files and return their paths; the page shows at most `max_experts` experts per layer.

    The same record gives the same bytes. Raises `UserError` where the folder cannot be written.
    """
    pictures = {layer.layer: draw_pictures(layer) for layer in inspection.layers}
    svgs = {layer: {name: data["svg"].decode() for name, data in drawn.items()} for layer, drawn in pictures.items()}
    contents = {
        "index.html": to_html(inspection, svgs, max_experts).encode(),
        "inspect.json": f"{to_json(inspection)}\n".encode(),
    }
    for layer, drawn in pictures.items():
        for name, formats in drawn.items():
            contents |= {f"{_slug(layer)}-{name}.{kind}": data for kind, data in formats.items()}
    earlier = [path.name for path in folder.glob("*-*") if re.search(r"-(load|pairs)\.(png|svg)$", path.name)]
    return replace_files(folder, contents, earlier)


def to_json(inspection: Inspection) -> str:
    """Return the record as JSON, with a key for each field of `Inspection`."""
    return json.dumps(asdict(inspection), ensure_ascii=False, indent=1)


def to_text(inspection: Inspection, max_experts: int = 8, max_words: int = 6) -> str:
    """Return tables of the layers and of their busiest experts as Markdown."""
    lines = ["Layers with a gate\n", _markdown(LAYER_COLUMNS, map(_layer_row, inspection.layers))]
    for layer in inspection.layers:
        experts = busiest(layer, max_experts)
        lines.append(f"Experts of {layer.layer}{fraction(len(experts), layer.num_experts)}\n")
        lines.append(_markdown(EXPERT_COLUMNS, [_expert_row(expert, max_words) for expert in experts]))
    return "\n".join(lines)


def to_html(inspection: Inspection, svgs: Mapping[str, Mapping[str, str]], max_experts: int) -> str:
    """Return the page; `svgs` holds the pictures as SVG documents, by layer and name."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"count": count, "decimal": decimal, "percent": percent}
    experts = [expert for layer in inspection.layers for expert in layer.experts]
    return environment.get_template("page.html.j2").render(
        inspection=inspection,
        layer_columns=LAYER_COLUMNS,
        layer_rows=map(_layer_row, inspection.layers),
        layers=[_layer_view(layer, svgs[layer.layer], max_experts) for layer in inspection.layers],
        has_pieces=any(word.word.startswith("·") for expert in experts for word in expert.words),
        fraction=fraction,
    )


def _layer_view(layer: InspectedLayer, svgs: Mapping[str, str], max_experts: int) -> dict:
    """Return what the template shows of one layer."""
    slug, experts = _slug(layer.layer), busiest(layer, max_experts)
    titles = {"load": "Load and importance", "pairs": "Experts that serve the same tokens"}
    pictures = [(name, titles[name], inline_svg(svg, f"{slug}-{name}", titles[name])) for name, svg in svgs.items()]
    return {
        "record": layer,
        "slug": slug,
        "experts": experts,
        "hidden": layer.num_experts - layer.unused - len(experts),
        "open": len(experts) <= MAX_OPEN,
        "pictures": [(name, title, Markup(svg)) for name, title, svg in pictures],
        "groups": sorted(layer.groups, key=lambda group: (-group.load, group.group))[:max_experts],
        "pairs": layer.pairs.most_frequent[:MAX_PAIRS],
    }


def _layer_row(layer: InspectedLayer) -> tuple[str, ...]:
    return (
        *(layer.layer, count(layer.num_experts), decimal(layer.assignments / layer.tokens), count(layer.unrouted)),
        *(count(layer.unused), decimal(layer.load_spread.effective), decimal(layer.load_spread.entropy)),
        *(decimal(layer.importance_spread.effective), decimal(layer.entropy)),
        percent(max(expert.load_share for expert in layer.experts)),
    )


def _expert_row(expert: Expert, max_words: int) -> tuple[str, ...]:
    words = "  ".join(word.word for word in expert.words[:max_words])  # without commas, as a comma may be a word
    shares = percent(expert.load_share), percent(expert.importance_share)
    return (f"expert {expert.expert}", *shares, decimal(expert.entropy), words)


def busiest(layer: InspectedLayer, most: int) -> list[Expert]:
    """Return at most `most` of the experts that serve any token, by descending load."""
    used = [expert for expert in layer.experts if expert.load]
    return sorted(used, key=lambda expert: (-expert.load, expert.expert))[:most]


def count(value: float) -> str:
    """Format a whole number with thousands separators."""
    return f"{value:,.0f}"


def decimal(value: float | None) -> str:
    """Format a number with two decimals, or with two significant digits where two decimals would show only zeros."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def percent(value: float) -> str:
    """Format a fraction as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def fraction(shown: int, total: int) -> str:
    """Return a heading's suffix for a list that is not complete."""
    return "" if shown == total else f" ({shown:,} of {total:,})"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are padded for the console; the first column names the rows."""
    body = [(f"`{name}`", *cells) for name, *cells in rows]
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
    lines = ([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in (columns, rule, *body))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _slug(layer: str) -> str:
    """Return a layer's name in a form that suits file names and HTML identifiers."""
    return re.sub(r"\W", "_", layer)
