"""Two processes with a micro-batch each leave the statistics, and the adapted gates, of one process with both."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.multiprocessing import spawn

from moe_lm.cli.config import folder
from moe_lm.cli.machine import build
from moe_lm.data.sentences import Sentences
from moe_lm.loss.objective import add, statistics
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.moe import MoE

GATES = sorted(path.stem for path in (folder() / "gate").glob("*.yaml"))
WIDTH, EXPERTS, GROUPS = 6, 12, 3
SIZES = (40, 23)
"""Tokens of the two micro-batches."""


def layers():
    """Every gate alone and at both levels of a hierarchy, the same in every process."""
    torch.manual_seed(0)
    found = {}
    for name in GATES:
        gate = build(OmegaConf.to_container(OmegaConf.load(folder() / "gate" / f"{name}.yaml")))
        k = getattr(gate.func, "only_k", None) or 2
        sizes = {"width": WIDTH, "hidden": 4, "num_experts": EXPERTS, "k": k, "gate": gate}
        found[name] = MoE(**sizes)
        found[f"{name} at both levels"] = HierarchicalMoE(**sizes, num_groups=GROUPS, primary_gate=gate)
    for layer in found.values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    return found


@torch.no_grad()
def passed(layer, micro_batch):
    """The statistics of one micro-batch, with noise that depends on the micro-batch alone; kept and dropped too."""
    size = SIZES[micro_batch]
    x_TD = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(micro_batch))
    torch.manual_seed(100 + micro_batch)
    gating = layer(x_TD, Sentences(size, 1, None))[1]
    counts = {"num_requested": torch.tensor(gating.num_requested), "num_dropped": torch.tensor(gating.num_dropped)}
    return {"middle": statistics({"middle": gating})["middle"] | counts}


def work(rank, path):
    """One of the two processes: its own micro-batch, sums over both, then the gates adapt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for name, layer in layers().items():
        sums = passed(layer, rank)["middle"]
        for key in sorted(sums):
            dist.all_reduce(sums[key])
        layer.adapt(sums)
        found[name] = {"sums": sums, "state": layer.state_dict()}
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes ended with."""
    path = tmp_path_factory.mktemp("two")
    spawn(work, (str(path),), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", list(layers()))
def test_two_processes_are_one(two, name):
    """Sums over ranks are those of one process, and what adapts is identical on both and there."""
    layer = layers()[name]
    sums = add(passed(layer, 0), passed(layer, 1))["middle"]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.adapt(sums)
    assert two[0][name]["sums"].keys() == sums.keys()
    for key, value in sums.items():
        torch.testing.assert_close(two[0][name]["sums"][key], value, rtol=1e-6, atol=1e-6)
    for key, value in layer.state_dict().items():
        assert torch.equal(two[0][name]["state"][key], two[1][name]["state"][key])
        torch.testing.assert_close(two[0][name]["state"][key], value)
    if name.startswith(("loss_free", "expert_choice")):
        moved = [key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])]
        assert moved, "something adapts"
        assert not set(moved) & {key for key, _ in layer.named_parameters()}
