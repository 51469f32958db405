"""moe-lm evaluate: exact perplexity of a run on a split."""

import json
import sys

from moe_lm.commands import build as make
from moe_lm.commands.configuration import composed, resolved
from moe_lm.commands.data import existing_data, prepared_data
from moe_lm.commands.load import load
from moe_lm.commands.result import measuring_bar
from moe_lm.corpus import SPLITS
from moe_lm.mistake import Mistake
from moe_lm.perplexity import measure

HELP = "exact perplexity of a run on a split"


def main(arguments: list[str]) -> int:
    """Print perplexity, nats and predicted words of every sentence of the split."""
    config = resolved(composed("evaluate", arguments))
    split, batch = config["split"], config["batch"]
    if split not in SPLITS:
        raise Mistake(f"split={split}: choose {', '.join(SPLITS)}")
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    settings = trained.config | {"data": config["data"] or str(trained.config.get("data", "data"))}
    # The token ids it was trained on, if they are there: then the text itself may have gone or changed.
    data = existing_data(settings, trained.fingerprint)
    if data is None:
        _say(f"the token ids of its training are not in {settings['data']}: preparing them there")
        data = prepared_data(settings, say=_say)
    if data.fingerprint != trained.fingerprint:
        raise Mistake(f"{config['run']} was trained on other data than those in {settings['data']}: the text changed")
    part = data.splits[split]
    with measuring_bar(split, part.num_words) as bar:
        measured = measure(
            trained.model,
            part,
            start=trained.vocabulary.start,
            max_sentences=batch["sentences"],
            max_words=batch["words"],
            watch=bar.update,
        )
    figures = {"run": config["run"], "step": trained.step, "split": split, "sentences": measured.sentences}
    figures |= measured.line()
    if config["json"]:
        print(json.dumps(figures))
    else:
        print(
            f"{config['run']} step {trained.step}, {split}: perplexity {measured.perplexity:.4f} "
            f"({measured.nats:.3f} nats, {measured.words:,} words with </S>, {measured.sentences:,} sentences)"
        )
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
