"""What processes send in a step, counted, beside what a count by hand of the same step expects."""

from collections import Counter

import torch
from updating import trainer_for

from moe_lm.optim import parameter_groups
from moe_lm.parallel import grad_reduce as gradients


def sent_in_a_step(parallel, cases) -> dict:
    """Of each case: what this process sent by purpose, and what it should have, by what its gates and words were."""
    return {case.name: _counted(trainer_for(case, config, parallel), parallel) for case, config in cases}


def _counted(trainer, parallel) -> dict:
    model, shares = trainer.model, trainer.parallel.shards
    expected: Counter = Counter()
    for layer in model.layers.values():
        if hasattr(layer, "experts"):
            layer.register_forward_hook(lambda layer, _, found: expected.update(tokens=_away(layer, found[1])))
    merge = gradients.merged

    def merging(part, group):
        owner_U = part.row_U % group.size
        row = part.value_UD[:1].numel() * part.value_UD.element_size() + part.row_U.element_size()
        whole = merge(part, group)
        most = (whole.row_U % group.size).bincount(minlength=group.size).max().item()
        expected["rows"] += row * (int((owner_U != group.rank).sum()) + (group.size - 1) * most)
        return whole

    gradients.merged = merging
    try:
        parallel.sent.clear()
        trainer.train_step(trainer.prefetcher.batches.step(0), 0, 1e-3)
    finally:
        gradients.merged = merge
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        if groups[name] != "vocabulary" and name not in shares:
            ring = 2 * (parallel.size - 1) / parallel.size
            expected["gradients"] += ring * parameter.numel() * parameter.element_size()
    return {"sent": dict(parallel.sent), "expected": dict(expected)}


def _away(layer, gating) -> int:
    """Bytes of this process's assignments that leave it, there and back; twice where a backward pass follows."""
    rows = torch.tensor(list(layer.experts.held))
    away = int((~torch.isin(gating.expert_A, rows)).sum())
    return away * layer.experts.w1_EDH.shape[1] * 4 * (4 if torch.is_grad_enabled() else 2)
