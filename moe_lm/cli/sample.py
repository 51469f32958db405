"""moe-lm sample: sentences drawn from a model; the same seed gives the same sentences."""

import json
import sys

from moe_lm.analysis.sample import SamplingConfig, sample, unknown_words
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.score import allow_any_letter
from moe_lm.errors import UserError
from moe_lm.inference import load


def main(arguments: list[str]) -> int:
    """Print sentences, each as text or as a JSON object."""
    config = resolved(composed("sample", arguments))
    if config["num"] < 1:
        raise UserError(f"num={config['num']}: must be at least 1")
    sampling = SamplingConfig(**{key: config[key] for key in ("temperature", "top", "max_words", "unknown")})
    on = make.ready_to_read(config)
    trained = load(config["run"], str(config["checkpoint"]), on)
    vocabulary, prefix, seed = trained.vocabulary, config["prefix"], config["seed"]
    if unknown := unknown_words(vocabulary, prefix):
        print(f"unknown to the model, which reads <UNK> instead: {' '.join(unknown)}", file=sys.stderr)
    allow_any_letter()
    for number in range(config["num"]):
        drawn = sample(trained.model, vocabulary, prefix, seed=seed, number=number, config=sampling)
        if config["json"]:
            of_run = {"run": config["run"], "step": trained.step, "seed": seed, "number": number}
            found = {"sentence": drawn.sentence, "ended": drawn.ended, "log10": drawn.log10}
            print(json.dumps(of_run | found), flush=True)
        else:
            print(drawn.sentence, flush=True)
    return 0
