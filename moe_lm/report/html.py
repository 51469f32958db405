"""HTML pages from Jinja2 templates, each a single file with its plots, without scripts, in a light and a dark theme."""

import json
import re
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

# Colours of the plots and the theme's colours that replace them on the page. Blue is among them because thin blue lines
# are hard to see on a dark page.
COLOURS = {
    "#1f2328": "var(--ink)",
    "#d8dee4": "var(--grid)",
    "#ffffff": "var(--paper)",
    "#0072b2": "var(--blue)",
}


def inline_svg(svg: str, name: str, title: str) -> Markup:
    """Return an SVG document as an element of the page, in the theme's colours and with unique identifiers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"inline_svg": inline_svg, "pretty_json": partial(json.dumps, indent=2, ensure_ascii=False)}


def render(template: str, **context: object) -> str:
    """Return a page made from one of this folder's templates."""
    return TEMPLATES.get_template(template).render({"css": "", "body": ""} | context)
