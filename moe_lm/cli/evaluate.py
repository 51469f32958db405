"""moe-lm evaluate: exact perplexity of a run on a split."""

import json

from moe_lm.analysis.perplexity import evaluate
from moe_lm.cli import log
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import data_of
from moe_lm.cli.result import measuring_bar
from moe_lm.data.corpus import SPLITS
from moe_lm.errors import UserError
from moe_lm.inference import load


def main(arguments: list[str]) -> int:
    """Print perplexity, nats and predicted words of every sentence of the split."""
    config = resolved(composed("evaluate", arguments))
    split, batch = config["split"], config["batch"]
    if split not in SPLITS:
        raise UserError(f"split={split}: choose {', '.join(SPLITS)}")
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    part = data_of(trained, config["run"], config["data"], log).splits[split]
    with measuring_bar(split, part.num_words) as bar:
        result = evaluate(
            trained.model,
            part,
            start=trained.vocabulary.start,
            max_sentences=batch["sentences"],
            max_words=batch["words"],
            on_progress=bar.update,
        )
    figures = {"run": config["run"], "step": trained.step, "split": split, "sentences": result.sentences}
    figures |= result.metrics()
    if config["json"]:
        print(json.dumps(figures))
    else:
        print(
            f"{config['run']} step {trained.step}, {split}: perplexity {result.perplexity:.4f} "
            f"({result.nats:.3f} nats, {result.words:,} words with </S>, {result.sentences:,} sentences)"
        )
    return 0
