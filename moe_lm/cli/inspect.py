"""moe-lm inspect: what each expert of a run is for, as the paper's Table 9 shows it."""

from pathlib import Path

from moe_lm.analysis.experts import Inspection
from moe_lm.analysis.experts.page import to_json, to_text, write_inspection
from moe_lm.analysis.experts.summary import Texts, summarize
from moe_lm.analysis.experts.tally import first_sentences, gated_layers, read
from moe_lm.checkpoint.export import output_path
from moe_lm.cli import log
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_of
from moe_lm.cli.result import measuring_bar
from moe_lm.data.corpus import SPLITS
from moe_lm.errors import UserError
from moe_lm.inference import LoadedModel, load


def main(arguments: list[str]) -> int:
    """Write <run>/inspect/ (beside an export) and print a summary with the paths, or the whole record as JSON."""
    config = resolved(composed("inspect", arguments))
    _check(config)
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    if not gated_layers(trained.model, trained.vocabulary.start):
        raise UserError(
            f"{config['run']} is a dense model: no layer of it has a gate, so there are no experts to inspect"
        )
    inspection = _inspected(config, trained)
    paths = write_inspection(output_path(Path(config["run"]), "inspect"), inspection, config["experts"])
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
    split = data_of(trained, config["run"], config["data"], log).splits[name]
    sentences = first_sentences(split, config["max_words"])
    with measuring_bar(name, int(split.words[:sentences].sum())) as bar:
        reading = read(
            trained.model,
            split,
            start=trained.vocabulary.start,
            sentences=sentences,
            num_contexts=config["contexts"],
            max_sentences=batch["sentences"],
            max_words=batch["words"],
            on_progress=bar.update,
        )
    return Inspection(
        run=str(trained.config.get("name") or Path(config["run"]).resolve().name),
        step=trained.step,
        split=name,
        sentences=reading.sentences,
        words=reading.words,
        tokens=reading.tokens,
        distinct_words=int((reading.count_V > 0).sum()),
        layers=summarize(reading, Texts(trained.vocabulary, split), config["words"]),
    )


def _summary(inspection: Inspection, paths: tuple[Path, ...]) -> str:
    read = (
        f"{inspection.run} step {inspection.step}, {inspection.split}: {inspection.words:,} words with </S>, "
        f"{inspection.sentences:,} sentences"
    )
    return "\n".join([f"{read}\n", to_text(inspection), *map(str, paths)])
