"""Writes an inspection: the page, the record as JSON and the pictures, in `<run>/inspect/`."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from moe_lm.analysis.experts import Inspection
from moe_lm.analysis.experts.page import stem, to_html
from moe_lm.analysis.experts.pictures import draw_pictures
from moe_lm.atomic_io import replace_files


def write_inspection(folder: Path, inspection: Inspection, most: int) -> tuple[Path, ...]:
    """Write `folder`, with at most `most` experts of a layer on the page; the same record gives the same bytes.

    Raises `UserError` where the folder cannot be written.
    """
    pictures = {layer.layer: draw_pictures(layer) for layer in inspection.layers}
    vectors = {
        layer: {name: formats["svg"].decode() for name, formats in drawn.items()} for layer, drawn in pictures.items()
    }
    contents = {
        "index.html": to_html(inspection, vectors, most).encode(),
        "inspect.json": f"{to_json(inspection)}\n".encode(),
    }
    for layer, drawn in pictures.items():
        for name, formats in drawn.items():
            contents |= {f"{stem(layer)}-{name}.{kind}": data for kind, data in formats.items()}
    earlier = [path.name for path in folder.glob("*-*") if re.search(r"-(load|pairs)\.(png|svg)$", path.name)]
    return replace_files(folder, contents, earlier)


def to_json(inspection: Inspection) -> str:
    """The record as JSON, a key for each field of `Inspection`."""
    return json.dumps(asdict(inspection), ensure_ascii=False, indent=1)
