"""The host waits for a GPU once in a step, for loss and norm: seen on a CPU, by following what a device would hold.

Kernels run in Triton's interpreter. An operator on the device's tensors gives the device's tensors; one whose result's
size, or whose Python number, depends on their values is what a host would wait for. Copies are not seen here, neither
from the device nor, out of memory that is not pinned, to it.
"""

import os

import pytest
import torch
from made import Made
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu asks the GPU itself", allow_module_level=True)

from moe_lm.data.batch import MicroBatch
from moe_lm.loss import softmax as sampled
from moe_lm.loss.objective import Objective
from moe_lm.ops import experts, grouped_gemm, operation
from moe_lm.ops import sparse_rows as rows
from moe_lm.parallel.grad_reduce import GradReducer
from moe_lm.train.step import _Sums

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "equal",
    "repeat_interleave",
}


class Device(TorchDispatchMode):
    """Follows tensors that would be a GPU's, and notes what a host would wait for."""

    def __init__(self):
        super().__init__()
        self.waits, self._here = [], {}

    def put(self, tensor):
        """Say that this tensor is the device's."""
        storage = tensor.untyped_storage()
        self._here[storage._cdata] = storage  # kept, so that no other one gets its address
        return tensor

    def has(self, tensor):
        """Whether it is the device's."""
        return tensor.untyped_storage()._cdata in self._here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(self.has(x) for x in given)
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given[1:])
        if on_device and (name in WAITS or by_mask) and (kwargs or {}).get("output_size") is None:
            self.waits.append(name)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if on_device and isinstance(tensor, torch.Tensor):
                self.put(tensor)
        return made


@pytest.fixture
def device(monkeypatch):
    """All that would be a GPU's work is its kernels', in float32, and the batch's copies lie there."""
    found = Device()
    monkeypatch.setattr(operation, "triton_devices", ("cpu",))
    monkeypatch.setattr(experts, "_grouped_gemm_fits", lambda x, num_rows, w1_EDH: num_rows > 0)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float32)
    for module in (rows, sampled):
        monkeypatch.setattr(module, "copy_to_device", lambda x, device: found.put(x.clone()))

    def copied(self, device):
        _ = self.inputs.unique  # as the prefetcher does
        return self.map(lambda x: found.put(x.clone()))

    monkeypatch.setattr(MicroBatch, "to", copied)
    tolist = torch.Tensor.tolist  # which on a CPU is no operator

    def listed(self):
        found.waits += ["tolist"] if found.has(self) else []
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    return found


def waits_of(trainer, device):
    """What the host waited for in the second update, once its optimizer's state is there."""
    for tensor in trainer.model.state_dict().values():
        device.put(tensor)
    with device:
        for step in range(2):
            device.waits.clear()
            done = trainer.train_step(trainer.prefetcher.batches.step(step), step, 1e-3)
    waits = device.waits[:]
    assert done.updated
    return waits


DECISION = ["_local_scalar_dense"] * 2
"""Whether loss and norm are finite, and then, without a further wait, the norm."""
SMALL = ["batch.words=60", "batch.micro_words=30"]
HIERARCHICAL = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=12", "model.num_groups=4"]
CASES = {
    "flat": (False, []),
    "flat, many experts": (True, []),
    "hierarchical": (False, HIERARCHICAL),
    "hierarchical, many experts": (True, HIERARCHICAL),
    "top_k, one micro-batch": (
        False,
        ["batch.micro_words=60", "gate@model.layers.middle.gate=top_k", "balance=[switch,z_loss]"],
    ),
    "loss_free, recomputed": (
        False,
        ["machine.recompute=true", "gate@model.layers.middle.gate=loss_free", "balance=[]"],
    ),
    "dense": (False, ["layer@model.layers.middle=feed_forward"]),
}


@pytest.mark.parametrize(("many_experts", "overrides"), CASES.values(), ids=CASES)
def test_once_in_a_step(trainer, device, many_experts, overrides, monkeypatch):
    """The host waits to decide by loss and norm; also with more experts than torch's products take."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        if many_experts:
            monkeypatch.setattr(grouped_gemm, "max_torch_experts", 0)
        made = trainer(torch.device("cpu"), *SMALL, "optimizer.experts=factored", *overrides)
        assert waits_of(made, device) == DECISION
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_losses_of_a_dense_model_are_not_copied_to_the_device():
    """It has no gate, so they are the host's numbers."""
    nats = torch.zeros((), dtype=torch.float64, device="meta")
    for global_stats in (None, {}):
        seen = _Sums(nats.device)
        with Made() as made:
            for _ in range(2):
                _, values = Objective({"importance": None, "load": None})(nats, 3, {}, global_stats)
                seen.add(nats, {}, {}, values, 0.5, counts=True)
            seen.reduce(GradReducer(torch.nn.Linear(1, 1)), global_stats)
        assert not made.calls[torch.ops.aten._to_copy.default]
        assert list(seen.balance) == ["importance", "load"]


def test_what_waits_is_seen(trainer, device, monkeypatch):
    """Without the host's own words the distinct rows are asked of the device, of both vocabulary matrices."""

    def without(self, row_T, host_T=None, unique=None):
        self.row_T, self._host_T = row_T, None

    monkeypatch.setattr(rows.UniqueIndices, "__init__", without)
    made = trainer(torch.device("cpu"), "batch.words=60", "batch.micro_words=60")
    assert waits_of(made, device) == ["_unique2", "_unique2", *DECISION]
