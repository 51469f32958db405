"""Old names in runs, exports and commands of commit 5ce4160, and the names that replaced them.

Only this version still reads old names, with a notice. It also writes them where a folder's name or its identity
depends on their spelling (`stored_key`, `stored_targets`).
"""

import os
import sys

TARGETS = {
    "moe_lm.balance.batchwise.Batchwise": "moe_lm.loss.objective.Batchwise",
    "moe_lm.balance.gshard.GShard": "moe_lm.loss.objective.GShardLoss",
    "moe_lm.balance.importance.Importance": "moe_lm.loss.objective.Importance",
    "moe_lm.balance.load.Load": "moe_lm.loss.objective.Load",
    "moe_lm.balance.switch.Switch": "moe_lm.loss.objective.SwitchLoss",
    "moe_lm.balance.z_loss.ZLoss": "moe_lm.loss.objective.ZLoss",
    "moe_lm.corpus.lm1b.Lm1b": "moe_lm.data.corpus.lm1b.Lm1b",
    "moe_lm.corpus.sotu.Sotu": "moe_lm.data.corpus.sotu.Sotu",
    "moe_lm.corpus.text.Text": "moe_lm.data.corpus.text.Text",
    "moe_lm.layer.feed_forward.FeedForward": "moe_lm.model.feed_forward.FeedForward",
    "moe_lm.layer.hierarchical_moe.HierarchicalMoE": "moe_lm.model.hierarchical_moe.HierarchicalMoE",
    "moe_lm.layer.lstm.Lstm": "moe_lm.model.lstm.Lstm",
    "moe_lm.layer.lstm.ProjectedLstm": "moe_lm.model.lstm.ProjectedLstm",
    "moe_lm.layer.moe.MoE": "moe_lm.model.moe.MoE",
    "moe_lm.optimizer.adam.Adam": "moe_lm.optim.adam.Adam",
    "moe_lm.schedule.InverseSquareRoot": "moe_lm.optim.schedule.InverseSquareRoot",
    "moe_lm.softmax.full.FullSoftmax": "moe_lm.loss.softmax.FullSoftmax",
    "moe_lm.softmax.sampled.SampledSoftmax": "moe_lm.loss.softmax.SampledSoftmax",
    "moe_lm.vocabulary.subwords.Subwords": "moe_lm.data.vocabulary.subwords.Subwords",
    "moe_lm.vocabulary.words.Words": "moe_lm.data.vocabulary.words.Words",
}
KEYS = {
    "balance.exact": "balance.global_batch",
    "init": "init_from",
    "machine.divide_vocabulary": "parallel.vocab",
    "machine.expert_processes": "parallel.expert_size",
    "softmax.max_logits": "softmax.chunk_logits",
    "training.max_skipped": "training.max_skipped_steps",
}
METRICS = {"dropped": "dropped_fraction", "unserved": "unrouted_fraction"}
PARAMETERS = {"embedding_VD": "embedding.weight_VD"}
"""Names of parameters in checkpoints and exports."""

_MIXTURE = {
    "gate_init_std": None,
    "gate_noise_scale": 1.0,
    "gate_temperature": 1.0,
    "output_activation": "sigmoid",
    "output_init_scale": 1.0,
    "num_shared_experts": 0,
    "identical_experts": False,
}
_MODEL = {
    "output_activation": "sigmoid",
    "output_init_scale": 1.0,
    "num_shared_experts": 0,
    "gate_init_std": None,
    "gate_noise_scale": 1.0,
}
_TOP = {"init_noise": 0.3, "init_optimizer": False}
ARGUMENTS = {
    "moe_lm.optim.adam.Adam": {
        "rates": {"experts": 1.0, "gates": 1.0, "feed_forward": 1.0, "vocabulary": 1.0, "rest": 1.0},
        "sparsity_exponent": 0.0,
        "average_decay": 0.0,
    },
    "moe_lm.gate.noisy_top_k.NoisyTopK": {"noise_schedule": "constant"},
    "moe_lm.model.feed_forward.FeedForward": {"output_activation": "sigmoid", "output_init_scale": 1.0},
    "moe_lm.model.hierarchical_moe.HierarchicalMoE": _MIXTURE,
    "moe_lm.model.moe.MoE": _MIXTURE,
    "moe_lm.optim.schedule.InverseSquareRoot": {"max_warmup_fraction": None, "decay_fraction": 0.0},
}
"""Arguments that earlier configurations lack, by target, with the values that change nothing."""

_STORED_KEYS = {new: old for old, new in KEYS.items()}
_STORED_TARGETS = {new: old for old, new in TARGETS.items()}


def current_key(key: str) -> str:
    """Return this version's name of a dotted configuration key."""
    return KEYS.get(key, key)


def current_parameter(name: str) -> str:
    """Return this version's name of a stored parameter or buffer."""
    return PARAMETERS.get(name, name)


def current_metrics(line: dict) -> dict:
    """Return a line of metrics.jsonl, or the sums of an interrupted interval, under this version's names."""
    return {METRICS.get(name, name): value for name, value in line.items()}


def current_config(config: dict) -> dict:
    """Return a copy of a stored configuration with this version's keys and targets; values are not checked."""
    config = {**_TOP, **_with_arguments(_with_targets(config, TARGETS))}
    if isinstance(config.get("model"), dict):
        config["model"] = {**_MODEL, **config["model"]}
    for old, new in KEYS.items():
        *path, name = old.split(".")
        group = config.get(path[0]) if path else config
        if isinstance(group, dict) and name in group:
            value = group.pop(name)
            *path, name = new.split(".")
            place = config.setdefault(path[0], {}) if path else config
            if isinstance(place, dict):
                place.setdefault(name, value)
    return config


def current_overrides(overrides: list[str]) -> list[str]:
    """Return overrides of a command line with this version's keys; log one line for each old key."""
    given = [text.partition("=") for text in overrides]
    for old in dict.fromkeys(key for key, equals, _ in given if equals and key in KEYS):
        log_deprecation(f"{old} is deprecated, use {KEYS[old]}")
    return [f"{current_key(key)}{equals}{value}" if equals else key for key, equals, value in given]


def log_deprecation(line: str) -> None:
    """Print a line to stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"moe-lm: {line}", file=sys.stderr, flush=True)


def stored_key(key: str) -> str:
    """Return the key as 5ce4160 spelled it: default names of run directories keep that spelling."""
    return _STORED_KEYS.get(key, key)


def stored_targets(config: dict) -> dict:
    """Return a copy of a configuration with the targets of 5ce4160: prepared data are identified by them."""
    return _with_targets(config, _STORED_TARGETS)


def _with_targets(node: object, targets: dict[str, str]) -> object:
    if isinstance(node, list):
        return [_with_targets(value, targets) for value in node]
    if not isinstance(node, dict):
        return node
    copy = {key: _with_targets(value, targets) for key, value in node.items()}
    if isinstance(copy.get("_target_"), str):
        copy["_target_"] = targets.get(copy["_target_"], copy["_target_"])
    return copy


def _with_arguments(node: object) -> object:
    if isinstance(node, list):
        return [_with_arguments(value) for value in node]
    if not isinstance(node, dict):
        return node
    target = node.get("_target_")
    added = ARGUMENTS.get(target, {}) if isinstance(target, str) else {}
    return {key: _with_arguments(value) for key, value in node.items()} | {
        key: value for key, value in added.items() if key not in node
    }
