"""Shards a model over processes by substitution: modules are replaced by parallel ones with the same interface.

Constructors know nothing of processes. A model is built whole on the meta device, parallelized, materialised by
`to_empty` and initialised by `reset_parameters`, so that no process ever holds more than its shard.
"""

from dataclasses import replace

import torch
from torch import nn

from moe_lm.model.language_model import LanguageModel
from moe_lm.model.moe import Experts
from moe_lm.parallel import vocab_parallel
from moe_lm.parallel.context import ParallelContext, with_expert_groups
from moe_lm.parallel.expert_parallel import ExpertParallelExperts
from moe_lm.parallel.group import Group, shard_rows


def parallelize(
    model: LanguageModel,
    parallel: ParallelContext,
    device: torch.device,
    *,
    expert_size: int | None = None,
    vocab: bool = False,
) -> ParallelContext:
    """Shard the experts and, with `vocab`, embedding and softmax, in place; return the context with their shards.

    Each layer's experts are sharded over `expert_size` processes (default: see `expert_parallel_size`); other processes
    hold copies. Raises `UserError` if `expert_size` does not divide the number of processes.
    """
    most_experts = max((experts.num_experts for _, experts in _experts(model)), default=0)
    parallel = with_expert_groups(parallel, most_experts, expert_size, device)
    with model.device:
        if parallel.experts.size > 1:
            for layer, experts in _experts(model):
                shard = shard_rows(experts.num_experts, parallel.experts, experts.group_size)
                layer.experts = ExpertParallelExperts(experts, shard)
        if vocab and parallel.size > 1:
            _shard_vocabulary(model, parallel.world)
    shards = {
        f"{prefix}.{name}": module.shard
        for prefix, module in model.named_modules()
        if isinstance(module, (ExpertParallelExperts, *vocab_parallel.MODULES))
        for name, _ in module.named_parameters(recurse=False)
    }
    return replace(parallel, shards=shards)


def _experts(model: nn.Module) -> list[tuple[nn.Module, Experts]]:
    return [(layer, layer.experts) for layer in model.modules() if isinstance(getattr(layer, "experts", None), Experts)]


def _shard_vocabulary(model: LanguageModel, group: Group) -> None:
    shard = shard_rows(model.vocabulary_size, group)
    model.embedding = vocab_parallel.VocabParallelEmbedding(model.embedding, shard)
    model.softmax = vocab_parallel.parallel_softmax(model.softmax, shard)
