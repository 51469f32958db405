"""Bytes counted in a step against a count of every assignment and row by hand, and against what `describe` predicts."""

import pytest
import torch
from counting import sent_in_a_step  # noqa: F401
from tiny_training import TRAINING, call, with_overrides, working_in, write_corpus
from updating import HIERARCHY, SIZES, Case, configuration

from moe_lm.analysis.memory import StepSizes
from moe_lm.analysis.traffic import bytes_sent
from moe_lm.construction import build, build_model

BATCH = ("batch.words=960", "model.num_experts=12", "model.k=3", "model.width=16", "model.expert_hidden=16")
CASES = [
    Case("one_turn", (*BATCH, "batch.micro_words=240", "softmax.num_sampled=8"), torch.float32),
    Case("several_turns", (*BATCH, "batch.micro_words=80", "softmax.num_sampled=8"), torch.float32),
    Case("hierarchical", (*HIERARCHY, *BATCH, "model.num_groups=4", "batch.micro_words=240"), torch.float32),
    Case("dense", (*BATCH, "model=moe_1_wide", "batch.micro_words=240"), torch.float32),
]
DIVIDED = [
    Case(name, (*BATCH, "parallel.vocab=true", "batch.micro_words=240", *more), torch.float32)
    for name, more in {"divided": ["softmax.num_sampled=8"], "divided_full": ["softmax=full"]}.items()
]


@pytest.fixture(scope="module")
def found(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("bytes")
    write_corpus(folder / "text")
    with working_in(folder):
        assert call("train", *with_overrides(TRAINING, *SIZES, "training.num_words=1", "name=first")) == 0
    cases = [(case, configuration(case)) for case in CASES + DIVIDED]
    return {size: ranks.run(size, "counting:sent_in_a_step", cases, folder) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_counted(found, case, size):
    """Activations twice each way for an assignment that leaves, rows as they were touched, dense gradients once."""
    records = [rank[case.name] for rank in found[size]]
    sent, expected = ({key: sum(r[kind].get(key, 0) for r in records) for key in KEYS} for kind in ("sent", "expected"))
    assert sent["tokens"] == expected["tokens"]
    assert sent["gradients"] == pytest.approx(expected["gradients"])
    of_sizes = 4 * 3 * 2 * size * size * 8  # how many rows follow, said before they do: numbers of 8 bytes
    assert expected["rows"] <= sent["rows"] <= expected["rows"] + of_sizes


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES + DIVIDED, ids=[case.name for case in CASES + DIVIDED])
def test_predicted(found, case, size):
    """What is said before anything runs: tokens to the noise of routing and batch size, dense gradients to the byte."""
    config = configuration(case)
    with torch.device("meta"):
        model = build_model(config, 53)
    sizes = {"words": config["batch"]["words"], "micro_words": config["batch"]["micro_words"]}
    sizes["vocab_parallel"] = config["parallel"]["vocab"]
    predicted = bytes_sent(model, build(config["optimizer"]), StepSizes(**sizes, num_processes=size))
    mean = {key: sum(rank[case.name]["sent"].get(key, 0) for rank in found[size]) / size for key in KEYS}
    assert mean["tokens"] == pytest.approx(predicted["tokens"], rel=0.12)
    assert mean["gradients"] == pytest.approx(predicted["gradients"])
    assert 0 < mean["rows"] <= 1.1 * predicted["rows"]
    if case.name == "divided_full":  # nearly all are of tokens, whatever the words are
        assert mean["rows"] == pytest.approx(predicted["rows"], rel=0.2)


KEYS = ("tokens", "gradients", "rows")
