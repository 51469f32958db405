"""moe-lm inspect: what each expert of a run is for, as the paper's Table 9 shows it."""

import sys
from pathlib import Path

from moe_lm.analysis.experts import Inspection
from moe_lm.analysis.experts.reading import first_sentences, gated_layers, read
from moe_lm.analysis.experts.summary import summarized
from moe_lm.analysis.experts.tables import busiest_table, layers_table
from moe_lm.analysis.experts.texts import Texts
from moe_lm.analysis.experts.write import to_json, write_inspection
from moe_lm.checkpoint.export_io import beside
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_of
from moe_lm.cli.result import measuring_bar
from moe_lm.data.corpus import SPLITS
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel, load
from moe_lm.report.writing import markdown_table

HELP = "what each expert of a run is for: its contexts, words and load"

BUSIEST = 8
"""Experts of a layer that the console shows."""


def main(arguments: list[str]) -> int:
    """Write <run>/inspect/ (beside an export) and print a summary and the paths, or the whole record as JSON."""
    config = resolved(composed("inspect", arguments))
    _check(config)
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    if not gated_layers(trained.model, trained.vocabulary.start):
        raise UserError(
            f"{config['run']} is a dense model: no layer of it has a gate, so there are no experts to inspect"
        )
    inspection = _inspected(config, trained)
    paths = write_inspection(beside(Path(config["run"]), "inspect"), inspection, config["experts"])
    print(to_json(inspection) if config["json"] else _summary(inspection, paths))
    return 0


def _check(config: dict) -> None:
    if config["split"] not in SPLITS:
        raise UserError(f"split={config['split']}: choose {', '.join(SPLITS)}")
    for key in ("max_words", "contexts", "words", "experts"):
        if config[key] is not None and config[key] < 1:
            raise UserError(f"{key}={config[key]}: must be at least 1")


def _inspected(config: dict, trained: LoadedModel) -> Inspection:
    name, batch = config["split"], config["batch"]
    split = data_of(trained, config["run"], config["data"], _say).splits[name]
    sentences = first_sentences(split, config["max_words"])
    with measuring_bar(name, int(split.words[:sentences].sum())) as bar:
        reading = read(
            trained.model,
            split,
            start=trained.vocabulary.start,
            sentences=sentences,
            contexts=config["contexts"],
            max_sentences=batch["sentences"],
            max_words=batch["words"],
            watch=bar.update,
        )
    return Inspection(
        run=str(trained.config.get("name") or Path(config["run"]).resolve().name),
        step=trained.step,
        split=name,
        sentences=reading.sentences,
        words=reading.words,
        tokens=reading.tokens,
        distinct_words=int((reading.count_V > 0).sum()),
        layers=summarized(reading, Texts(trained.vocabulary, split), config["words"]),
    )


def _summary(inspection: Inspection, paths: tuple[Path, ...]) -> str:
    tables = [layers_table(inspection.layers), *(busiest_table(layer, BUSIEST) for layer in inspection.layers)]
    read = (
        f"{inspection.run} step {inspection.step}, {inspection.split}: {inspection.words:,} words with </S>, "
        f"{inspection.sentences:,} sentences"
    )
    return "\n".join([read, *(f"\n{table.heading}\n\n{markdown_table(table)}" for table in tables), *map(str, paths)])


def _say(line: str) -> None:
    print(line, file=sys.stderr)
