"""One to four processes make the same updates on the same global batch, with noise and dropout on (section 3.1)."""

import pytest
import torch
from several import run_several
from tiny_training import TRAINING, call, with_overrides, working_in, write_corpus
from updating import HIERARCHY, SIZES, Case, configuration

STEPS = 5
FULL = "softmax=full"
DENSE, FACTORED = "optimizer.vocabulary=dense", "optimizer.experts=factored"


def gate(name: str, *more: str) -> tuple[str, ...]:
    """The overrides that put a gate into the middle layer."""
    return (f"gate@model.layers.middle.gate={name}", *more)


KINDS = {
    "flat": (),
    "flat_full": (FULL, DENSE),
    "full_lazy": (FULL,),
    "hierarchical": tuple(HIERARCHY),
    "hierarchical_full": (*HIERARCHY, FULL, FACTORED),
    "four_groups": (*HIERARCHY, "model.num_experts=12", "model.num_groups=4", "balance.global_batch=false"),
    "factored": (FACTORED, "optimizer.clip_norm=0.05"),
    "own_balance": ("balance.global_batch=false",),
    "no_balance": ("balance=[]",),
    "fewer_experts": ("model.num_experts=2", "model.k=1", "balance=[importance]"),
    "fewer_experts_than_processes": ("model.num_experts=3", "model.k=2"),
    "three_micro_batches": ("batch.words=180",),
    "one_micro_batch": ("batch.micro_words=240",),
    "dense": ("model=moe_1_wide",),
    "divided_vocabulary": ("parallel.vocab=true",),
    "divided_dense": ("parallel.vocab=true", DENSE),
    "divided_full": ("parallel.vocab=true", FULL, DENSE, "softmax.chunk_logits=500"),
    "divided_full_lazy": ("parallel.vocab=true", FULL, "batch.words=180"),
    "divided_fewer_experts": (
        "parallel.vocab=true",
        "model.num_experts=2",
        "model.k=1",
        "balance=[importance]",
    ),
    "top_k": gate("top_k", "balance=[switch,z_loss]"),
    "gshard": gate("gshard", "balance=[gshard]"),
    "switch": gate("switch", "model.k=1", "balance=[switch]"),
    "expert_choice": gate("expert_choice", "balance=[]"),
    "loss_free": gate("loss_free", "balance=[]"),
    "sinkhorn": gate("sinkhorn", "balance=[]"),
    "strictly_balanced": gate("strictly_balanced", "balance=[batchwise]"),
}
CASES = [
    Case(f"{name}_{str(dtype)[-2:]}", overrides, dtype, over_all=name == "fewer_experts_than_processes")
    for name, overrides in KINDS.items()
    for dtype in (torch.float64, torch.float32)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one, two, three and four processes made of every case."""
    folder = tmp_path_factory.mktemp("many")
    write_corpus(folder / "text")
    with working_in(folder):  # so that none of the processes has to prepare the text
        assert call("train", *with_overrides(TRAINING, *SIZES, "training.num_words=1", "name=first")) == 0
    cases = [(case, configuration(case)) for case in CASES]
    return {size: run_several(size, "updating:updates", (cases, STEPS), folder)[0] for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_same_updates(found, case, size):
    """Loss terms, norms, every gradient of every step, parameters, buffers and moments after the last one."""
    one, many = found[1][case.name], found[size][case.name]
    tight = case.dtype == torch.float64
    for ours, theirs in zip(many["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9 if tight else 1e-5, abs=1e-12 if tight else 1e-6)
    for kind in ("parameters", "moments"):
        compare(many[kind], one[kind], tight)
    for ours, theirs in zip(many["gradients"], one["gradients"], strict=True):
        compare(ours, theirs, tight)


def compare(ours: dict, theirs: dict, tight: bool) -> None:
    """Element by element to 1e-9 in float64; in float32 to 1e-5 of each tensor's norm."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if tight:
            assert ((ours[name] - tensor).abs() <= 1e-9 * (1 + tensor.abs())).all(), name
        else:
            assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("dense",)])
def test_every_expert_is_reached(found, name):
    """The comparison says something about each expert: all had tokens in some step, and gradients that are not zero."""
    one = found[1][f"{name}_64"]
    for layer in one["loads"][0]:
        assert (sum(step[layer] for step in one["loads"]) > 0).all()
    of_experts = [key for key in one["gradients"][0] if key.endswith("w1_EDH")]
    assert of_experts
    for key in of_experts:
        assert (sum(step[key].abs() for step in one["gradients"]).flatten(1).sum(dim=1) > 0).all()
