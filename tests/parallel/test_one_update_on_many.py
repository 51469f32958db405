"""One to four processes make the same updates on the same global batch, with noise and dropout on (section 3.1)."""

import numpy as np
import pytest
import torch
from tiny_training import TRAINING, call, with_overrides, working_in, write_corpus
from updating import HIERARCHY, SIZES, Case, Held, configuration, whole

STEPS = 3
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
    "hash": gate("hash", "balance=[]"),
    "shared_experts": ("model.num_shared_experts=2",),
    "recipe": ("recipe=small_batch",),
    "recipe_hierarchical": ("recipe=small_batch", *HIERARCHY, FACTORED),
    "averaged": ("parallel.vocab=true", "optimizer.average_decay=0.6", FACTORED),
    "loss_free": gate("loss_free", "balance=[]"),
    "sinkhorn": gate("sinkhorn", "balance=[]"),
    "strictly_balanced": gate("strictly_balanced", "balance=[batchwise]"),
}
IN_FLOAT32 = (
    "flat",
    "flat_full",
    "full_lazy",
    "hierarchical",
    "hierarchical_full",
    "factored",
    "divided_vocabulary",
    "divided_full",
)
"""Kinds that between them call every operation and optimizer; a type changes what these compute, not who sends what."""
IN_FLOAT64 = [
    Case(name, overrides, torch.float64, over_all=name == "fewer_experts_than_processes")
    for name, overrides in KINDS.items()
]
CASES = IN_FLOAT64 + [Case(f"{name}_32", KINDS[name], torch.float32) for name in IN_FLOAT32]


@pytest.fixture(scope="module")
def found(tmp_path_factory, ranks):
    """What one, two, three and four processes made of every case; in float32, one and four."""
    folder = tmp_path_factory.mktemp("many")
    write_corpus(folder / "text")
    with working_in(folder):  # so that none of the processes has to prepare the text
        assert call("train", *with_overrides(TRAINING, *SIZES, "training.num_words=1", "name=first")) == 0
    configs = {case.overrides: configuration(case) for case in IN_FLOAT64}
    chosen = {size: CASES if size in (1, 4) else IN_FLOAT64 for size in (1, 2, 3, 4)}
    arguments = {size: ([(case, configs[case.overrides]) for case in cases], STEPS) for size, cases in chosen.items()}
    return {size: ranks.run(size, "updating:updates", argument, folder) for size, argument in arguments.items()}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_same_updates(found, case):
    """Loss terms, norms, every gradient of every step, parameters, buffers and moments after the last one."""
    [one] = (rank[case.name] for rank in found[1])
    sizes = [size for size in (2, 3, 4) if case.name in found[size][0]]
    assert sizes == ([2, 3, 4] if case in IN_FLOAT64 else [4])
    assert len(one["losses"]) == len(one["gradients"]) == STEPS
    for size in sizes:
        many = [rank[case.name] for rank in found[size]]
        assert all(rank["losses"] == many[0]["losses"] for rank in many), f"{size} processes do not agree"
        compare_losses(many[0]["losses"], one["losses"], case.dtype, size)
        for step in range(STEPS):
            where = f"{size} processes, step {step}, gradient"
            compare([rank["gradients"][step] for rank in many], one["gradients"][step], case.dtype, where)
        for kind in ("parameters", "moments"):
            compare([rank[kind] for rank in many], one[kind], case.dtype, f"{size} processes, {kind}")


def compare_losses(ours: list[dict], theirs: list[dict], dtype: torch.dtype, size: int) -> None:
    """To 1e-9 in float64, to 1e-5 in float32."""
    rel, least = (1e-9, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our == pytest.approx(their, rel=rel, abs=least), f"{size} processes, step {step}"


def compare(held: list[Held], one: Held, dtype: torch.dtype, where: str) -> None:
    """Element by element to 1e-9 in float64; in float32 to 1e-5 of each tensor's norm."""
    try:
        ours, theirs = whole(held), whole([one])
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None
    assert ours.keys() == theirs.keys(), where
    for name, array in theirs.items():
        assert ours[name].shape == array.shape, f"{where}: {name}"
        difference = ours[name] - array
        if dtype == torch.float64:
            assert (np.abs(difference) <= 1e-9 * (1 + np.abs(array))).all(), f"{where}: {name}"
        else:
            assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(array) + 1e-9, f"{where}: {name}"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("dense",)])
def test_every_expert_is_reached(found, name):
    """The comparison says something about each expert: all had tokens in some step, and gradients that are not zero."""
    [one] = (rank[name] for rank in found[1])
    for layer in one["loads"][0]:
        assert (sum(step[layer] for step in one["loads"]) > 0).all()
    gradients = [whole([step]) for step in one["gradients"]]
    of_experts = [key for key in gradients[0] if key.endswith("w1_EDH")]
    assert of_experts
    for key in of_experts:
        assert (sum(np.abs(step[key]) for step in gradients).sum(axis=(1, 2)) > 0).all()
