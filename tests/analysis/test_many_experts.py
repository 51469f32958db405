"""Thousands of experts: memory, page and console stay small, the record has all of them."""

import tracemalloc

import numpy as np
import pytest
import torch
from html_page import Page
from known_gates import inspection_of, random_model, split_of, vocabulary_of

from moe_lm.analysis.experts.page import busiest, to_html, write_inspection
from moe_lm.analysis.experts.tally import InputTokens, Tally
from moe_lm.errors import UserError
from moe_lm.gate import Gating

EXPERTS, GROUPS = 4096, 64


def gating_of(num_tokens: int, num_experts: int, k: int) -> Gating:
    """Random assignments, ascending by expert and then by token."""
    draw = np.random.default_rng(4)
    expert_TK = np.sort(draw.integers(0, num_experts - k + 1, (num_tokens, k)), axis=1) + np.arange(k)  # distinct
    order = np.argsort(expert_TK.reshape(-1), kind="stable")
    expert_A = torch.from_numpy(expert_TK.reshape(-1)[order])
    return Gating(
        token_A=torch.from_numpy(np.arange(num_tokens).repeat(k)[order]),
        expert_A=expert_A,
        gate_A=torch.full((len(order),), 1 / k),
        num_tokens=num_tokens,
        importance_E=torch.zeros(num_experts),
        load_E=torch.zeros(num_experts),
        num_requested=len(order),
    )


def test_counting_takes_memory_for_what_occurs_only():
    num_tokens, num_experts = 8192, 50_000
    tally = Tally(num_experts=num_experts, num_groups=100, vocabulary_size=800_000, num_contexts=4)
    gating = gating_of(num_tokens, num_experts, k=4)
    word_T = np.random.default_rng(1).integers(0, 800_000, num_tokens)
    tokens = InputTokens(word_T, np.arange(num_tokens), np.arange(num_tokens, dtype=np.uint64))
    tracemalloc.start()
    tally.add(gating, tokens)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6  # a byte for every token and expert would be 410 MB, for every word and expert 40 GB
    assert int(tally.load_E.sum()) == 4 * num_tokens
    assert int(tally.pairs.result()[1].sum()) == 6 * num_tokens


@pytest.fixture(scope="module")
def inspection():
    vocabulary = vocabulary_of(" ".join(f"w{i}" for i in range(40)))
    draw = np.random.default_rng(6)
    sentences = [" ".join(f"w{i}" for i in draw.integers(0, 40, 12)) for _ in range(150)]
    model = random_model(vocabulary, "hierarchical", gate="noisy_top_k", num_experts=EXPERTS, k=2, groups=GROUPS)
    return inspection_of(model, vocabulary, split_of(vocabulary, sentences))


def test_the_record_has_every_expert_and_group(inspection):
    for layer in inspection.layers:
        assert [expert.expert for expert in layer.experts] == list(range(EXPERTS))
        assert {expert.group for expert in layer.experts} == set(range(GROUPS))
        assert sum(expert.load for expert in layer.experts) == 4 * layer.tokens == layer.assignments
        assert layer.unused == sum(expert.load == 0 for expert in layer.experts) > 0
        assert len(layer.pairs.most_frequent) == min(layer.pairs.distinct, 2016)


def test_the_page_shows_those_with_most_load(inspection, tmp_path):
    paths = write_inspection(tmp_path / "inspect", inspection, 5)
    names = {path.name for path in paths}
    assert names == {
        "index.html",
        "inspect.json",
        *(f"{n}-load.{kind}" for n in ("one", "two") for kind in ("png", "svg")),
    }
    html = (tmp_path / "inspect/index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("details") == 2 * 5
    assert len(html) < 300_000
    for layer in inspection.layers:
        loads = sorted((expert.load for expert in layer.experts), reverse=True)
        assert f"{EXPERTS - layer.unused - 5:,} more with less load are in inspect.json" in page.text
        assert [expert.load for expert in busiest(layer, 3)] == loads[:3]


def test_gate_values_that_are_not_finite_are_refused():
    tally = Tally(num_experts=10, num_groups=None, vocabulary_size=5, num_contexts=1)
    gating = gating_of(3, 10, k=2)
    gating.gate_A[1] = torch.nan
    zeros = np.zeros(3, np.int64)
    with pytest.raises(UserError, match="the training diverged"):
        tally.add(gating, InputTokens(zeros, zeros, zeros.astype(np.uint64)))


def test_odd_words_and_names_are_escaped():
    vocabulary = vocabulary_of("<script>alert(1)</script> & \"'")
    split = split_of(vocabulary, ["<script>alert(1)</script> & \"'"])
    model = random_model(vocabulary, "flat", gate="noisy_top_k", num_experts=3, k=2)
    found = inspection_of(model, vocabulary, split, run="</style><img src=x>")
    pictures = {"one": {}, "two": {}}
    page = Page(to_html(found, pictures, 3))
    assert not {"script", "img"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert "</style><img src=x>" in page.text
