"""The README.md of an export: what the model is, what it was trained on and measured as, and how to open it."""

import shlex
from collections.abc import Iterator, Mapping

_HEAD = """\
---
library_name: moe-lm
pipeline_tag: text-generation
tags: [language-model, lstm, mixture-of-experts]
---"""
_CITATION = """\
@inproceedings{shazeer2017outrageously,
  title = {Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer},
  author = {Shazeer, Noam and Mirhoseini, Azalia and Maziarz, Krzysztof and Davis, Andy and Le, Quoc and
            Hinton, Geoffrey and Dean, Jeff},
  booktitle = {International Conference on Learning Representations},
  year = {2017},
  note = {arXiv:1701.06538}
}"""


def card(record: Mapping, config: Mapping) -> str:
    """Return the page as Markdown, from what export.json holds of the model and from the run's configuration."""
    name, run = record["name"], shlex.quote(f"run={record['name']}")
    parts = [
        _HEAD,
        f"# {name}",
        _what(record, config),
        _sizes(record),
        "## Training",
        _training(record, config),
        "## Perplexity",
        "\n".join(_perplexity(record)),
        "## How to open it",
        f"With moe-lm {record['versions']['moe-lm']} installed, this folder being `{name}`:",
        f"```sh\nmoe-lm score {run} sentences.txt\nmoe-lm sample {run}\nmoe-lm evaluate {run} split=test\n"
        f"moe-lm inspect {run} split=valid\n```",
        "`evaluate` and `inspect` need the text of the training, or the token ids prepared from it. In Python:",
        f"```python\nimport moe_lm\n\nlm = moe_lm.load({name!r})\n"
        'print(lm.perplexity(["A sentence of words ."]), lm.log10("A sentence of words ."))\n```',
        "`export.json` has a checksum of every file; opening the folder checks them.",
        "## Limits",
        _limits(record),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _what(record: Mapping, config: Mapping) -> str:
    model = config["model"]
    layers = [model["layers"][name] for name in model["order"]]
    preset = f" (preset `{record['preset']}`)" if "preset" in record else ""
    experts = f", {model['num_experts']:,} experts, k = {model['k']}" if any("gate" in one for one in layers) else ""
    return (
        f"A language model{preset} after Shazeer et al. 2017: embedding, {len(layers)} layers with residual sums "
        f"({', '.join(map(_layer, layers))}), softmax over {record['vocabulary']['size']:,} {_tokens(record)}. "
        f"Width {model['width']:,}{experts}. "
        "It reads a sentence from a zero state and predicts word after word and the sentence's end."
    )


def _layer(config: Mapping) -> str:
    gates = [config[key]["_target_"].split(".")[-2] for key in ("primary_gate", "gate") if key in config]
    return f"`{config['_target_'].split('.')[-2]}`" + (f" with gate `{'`, `'.join(gates)}`" if gates else "")


def _tokens(record: Mapping) -> str:
    return "pieces of words" if record["vocabulary"]["kind"] == "subwords" else "words"


def _sizes(record: Mapping) -> str:
    return (
        "| operations a timestep (multiply-adds, softmax excluded) | parameters without embedding and softmax | "
        "parameters |\n|---:|---:|---:|\n"
        f"| {record['operations_per_timestep']:,} | {record['parameters_without_embedding_and_softmax']:,} | "
        f"{record['parameters_total']:,} |"
    )


def _training(record: Mapping, config: Mapping) -> str:
    corpus = config["corpus"]
    told = {key: value for key, value in corpus.items() if not key.startswith("_") and value not in (None, [])}
    keys = "; ".join(f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in told.items())
    return (
        f"{record['words']:,} predicted words in {record['step']:,} steps, seed {config['seed']}, on the training "
        f"split of corpus `{corpus['_target_'].split('.')[-2]}` ({keys}); data fingerprint `{record['data']}`. "
        "`config.yaml` has every setting."
    )


def _perplexity(record: Mapping) -> Iterator[str]:
    if "perplexity" not in record:
        yield "Not measured at this step: `moe-lm evaluate` does it."
        return
    yield "| split | perplexity | predicted words with `</S>` | of a unigram model |\n|---|---:|---:|---:|"
    for split, value in record["perplexity"].items():
        unigram = record["unigram_perplexity"].get(split)
        shown = "" if unigram is None else f"{unigram:.1f}"
        yield f"| {split} | {value:.2f} | {record['predicted_words'][split]:,} | {shown} |"
    yield ""
    pieces = ", not per piece of a word" if record["vocabulary"]["kind"] == "subwords" else ""
    yield (
        f"Per word{pieces}: nats of every sentence of the split by the exact softmax, divided once by its words, each "
        "sentence's end counted as one. Comparable only over the same text"
        + ("." if pieces else " and the same vocabulary: a word outside it counts as `<UNK>`.")
    )


def _limits(record: Mapping) -> str:
    unknown = "" if record["vocabulary"]["kind"] == "subwords" else "Words outside its vocabulary are `<UNK>` to it. "
    return (
        "It knows the text named above and nothing else: other subjects, spellings and ways of splitting text into "
        f"words cost perplexity. {unknown}Sentences are read one by one, without what stood before. What it writes "
        "is drawn from word statistics, may repeat its training text, and states no facts. Nothing was done against "
        "what is biased or offensive in that text, whose licence may bind the model's use too."
    )
