"""What a process holds of a sharded model, and when it allocates it."""

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.cli.config import composed, resolved
from moe_lm.construction import build_model
from moe_lm.parallel import parallelize as module
from moe_lm.parallel.context import ParallelContext
from moe_lm.parallel.group import Group


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made on the CPU."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            self.numel = max(self.numel, made.numel())
        return made


def test_substitution_allocates_nothing(monkeypatch):
    """The second of two processes holds half of 6 experts and of 41 words, which the first has more of."""
    second = Group(1, 2)
    monkeypatch.setattr(module, "with_expert_groups", lambda parallel, *_: replace(parallel, experts=second))
    config = resolved(
        composed("train", ["model=moe_4", "model.width=8", "model.expert_hidden=4", "model.num_experts=6"])
    )
    with torch.device("meta"):
        model = build_model(config, 41)
    with Largest() as largest:
        parallel = module.parallelize(model, ParallelContext(world=second), torch.device("cpu"), vocab=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert largest.numel == 0
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["layers.middle.experts.w1_EDH"] == (3, 8, 4)
    assert shapes["embedding.weight_VD"] == shapes["softmax.weight_VD"] == (20, 8)
    assert {name: shard.total for name, shard in parallel.shards.items()} == {
        "layers.middle.experts.w1_EDH": 6,
        "layers.middle.experts.w2_EHD": 6,
        "embedding.weight_VD": 41,
        "softmax.weight_VD": 41,
        "softmax.bias_V": 41,
    }
