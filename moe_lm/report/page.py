"""The report as one html page that needs nothing else: pictures inside, no script, light and dark."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from moe_lm.report import RunRecord, Table
from moe_lm.report.captions import SECTIONS
from moe_lm.report.writing import cells, remark

CSS = Path(__file__).with_name("page.css")
# The colours that `plots` draws with, and the theme's that stand for them on the page; blue is among
# them because a thin line of it is lost on a dark page.
COLOURS = {
    "#1f2328": "var(--ink)",
    "#d8dee4": "var(--grid)",
    "#ffffff": "var(--paper)",
    "#0072b2": "var(--blue)",
}


def to_html(
    title: str,
    study: str,
    notes: Sequence[str],
    runs: Sequence[RunRecord],
    tables: Sequence[Table],
    unfinished: Sequence[tuple[str, str]],
    plots: Mapping[str, str],
) -> str:
    """The whole page; the first table is the main one, `plots` are svg documents by name."""
    finished = sum(run.result is not None for run in runs)
    count = f"{finished} finished run{'' if finished == 1 else 's'}"
    count += f", {len(unfinished)} unfinished" if unfinished else ""
    count += f"; {study}" if study else ""
    main, *others = tables
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(count)}</p>',
        bullets(map(escape, notes), ' class="notes"'),
        html_table(main),
        unfinished_list(unfinished),
        *map(html_table, others),
        *(section(heading, names, plots) for heading, names in SECTIONS.items()),
        "<h2>Runs</h2>",
        *map(run_details, runs),
        f"<footer>{''.join(f'<p>{escape(line)}</p>' for line in made_with(runs))}</footer>",
    ]
    return whole_page(title, body)


def whole_page(title: str, body: Iterable[str], css: str = "") -> str:
    """The parts of a body, the empty ones left out, as a page that needs nothing else; `css` follows the report's."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS.read_text(encoding='utf-8')}{css}</style>"
    )
    text = "\n".join(part for part in body if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def html_table(table: Table, heading_tag: str = "h2") -> str:
    """A table under its heading, which scrolls sideways on a narrow screen while the names stay."""
    heading = f"<{heading_tag}>{escape(table.heading)}</{heading_tag}>"
    if not table.rows:
        return f"{heading}<p>No run has finished yet.</p>"
    printed = [' class="printed"' if column.is_printed else "" for column in table.formats]
    heads = f'<th scope="col">{escape(table.names)}</th>' + "".join(
        f'<th scope="col"{look}>{escape(column.heading)}</th>'
        for column, look in zip(table.formats, printed, strict=True)
    )
    body = "\n".join(
        f'<tr class="{row.kind}"><th scope="row">{escape(row.name + remark(row))}</th>'
        + "".join(f"<td{look}>{escape(cell)}</td>" for cell, look in zip(cells(table, row), printed, strict=True))
        + "</tr>"
        for row in table.rows
    )
    label = escape(table.heading)
    return (
        f'{heading}<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
        f'<p class="soft">{escape(table.text)}</p>'
    )


def unfinished_list(unfinished: Sequence[tuple[str, str]]) -> str:
    """The runs without a result, and how far they are."""
    if not unfinished:
        return ""
    lines = (f"<strong>{escape(name)}</strong>: {escape(state)}" for name, state in unfinished)
    return "<h3>Unfinished</h3>" + bullets(lines)


def bullets(lines: Iterable[str], attributes: str = "") -> str:
    """A list of lines that are html already, or nothing."""
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul{attributes}>{items}</ul>" if items else ""


def section(heading: str, captions: Mapping[str, tuple[str, str]], plots: Mapping[str, str]) -> str:
    """A heading and its plots, or nothing where the runs have no figures for them."""
    figures = captioned(captions, plots)
    return f"<h2>{heading}</h2>{figures}" if figures else ""


def captioned(captions: Mapping[str, tuple[str, str]], plots: Mapping[str, str]) -> str:
    """The plots that there are, side by side, each under its title and above its text; nothing where there is none."""
    pictures = [
        f"<figure><h3>{escape(title)}</h3>{inline_svg(plots[name], name, title)}"
        f"<figcaption><p>{escape(text)}</p></figcaption></figure>"
        for name, (title, text) in captions.items()
        if name in plots
    ]
    return f'<div class="plots">{"".join(pictures)}</div>' if pictures else ""


def inline_svg(svg: str, name: str, title: str) -> str:
    """An svg document as an element of the page: in the theme's colours, its identifiers its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def run_details(run: RunRecord) -> str:
    """A part to unfold for one run: its result and its whole configuration."""
    state = "finished" if run.result is not None else "unfinished"
    result = ""
    if run.result is not None:
        text = json.dumps(run.result, indent=2, ensure_ascii=False)
        result = f"<h3>result.json</h3><pre>{escape(text)}</pre>"
    return (
        f"<details><summary>{escape(run.name)} <span>{state}</span></summary>{result}"
        f"<h3>config.yaml</h3><pre>{escape(run.config)}</pre></details>"
    )


def made_with(runs: Sequence[RunRecord]) -> list[str]:
    """A line for each combination of device and versions, with the runs made on it."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.result is not None:
            versions = run.result.get("versions") or {}
            stack = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            where = f"{run.result.get('num_processes', 1)} × {run.result.get('device', 'unknown device')}"
            groups.setdefault(f"{where}; {stack}", []).append(run.name)
    if len(groups) == 1:
        return [f"All runs: {line}" for line in groups]
    return [f"{', '.join(names)}: {line}" for line, names in groups.items()]
