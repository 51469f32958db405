"""moe-lm describe: the figures of models of any size as a table and as JSON, and refused arguments."""

import json
import re
import time

import pytest
from tiny_training import assert_one_line

from moe_lm.cli import describe
from moe_lm.config_files import choices
from moe_lm.errors import UserError
from moe_lm.report.paper import paper_result

FACTORED = ["optimizer.experts=factored", "machine.recompute=true"]


@pytest.fixture
def described(capsys):
    """The figures that the command prints as JSON."""

    def run(*arguments):
        capsys.readouterr()
        assert describe.main(["json=true", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_counts_are_the_papers(described):
    figures = described("model=moe_256")
    assert figures["operations_per_timestep"] == 8_650_752
    assert figures["parameters_without_embedding_and_softmax"] == 272_891_904
    assert figures["vocabulary_size"] == 793_471
    # Forward and backward are 3 products, 2 FLOPs a multiply-add; 8192 words are sampled, and the target.
    assert figures["flops_per_word"] == 6 * (8_650_752 + 8193 * 512)
    assert figures["printed"]["parameters"] == "272.9"
    assert figures["printed"]["perplexity"] == 35.7


def test_memory_adds_up_to_the_peak(described):
    memory = described("model=moe_1024_h", "batch.words=5000", "batch.micro_words=2000")["memory"]
    parts = [
        memory[kind][what]
        for kind in ("experts", "vocabulary", "rest")
        for what in ("weights", "gradients", "optimizer")
    ]
    assert memory["total"] == sum(parts) + memory["activations"] + memory["logits"] + memory["second_gradients"]
    assert memory["experts"]["gradients"] == 4 * 1024 * 2 * 512 * 1024
    assert memory["second_gradients"] == memory["experts"]["gradients"] + memory["vocabulary"]["gradients"]
    assert memory["experts"]["bytes_per_parameter"] == pytest.approx(16, abs=1e-6)
    assert memory["activations"] > 2000 * 512 * 4


def test_a_model_of_137_billion_parameters_takes_seconds(described):
    begun = time.monotonic()
    figures = described("model=news100b_moe_131072_h", "num_processes=128", *FACTORED)
    assert time.monotonic() - begun < 10
    assert round(figures["parameters_total"] / 1e9, 1) == 137.7
    assert figures["vocabulary_size"] == 100_000
    experts = figures["memory"]["experts"]
    assert experts["parameters"] == 1024 * 2 * 512 * 1024
    assert 8.01 < experts["bytes_per_parameter"] < 8.02
    assert 10 * 2**30 < figures["memory"]["total"] < 12 * 2**30
    assert all(count > 0 for count in figures["sent"].values())


def test_recomputing_saves_the_hidden_activations(described):
    without, with_it = described("model=moe_32"), described("model=moe_32", "machine.recompute=true")
    saved = without["memory"]["activations"] - with_it["memory"]["activations"]
    assert saved == 8192 * 4 * 1024 * 4
    assert (without["recompute"], with_it["recompute"]) == (False, True)


@pytest.mark.parametrize("preset", ["moe_256", "news100b_moe_4096_h"])
def test_the_table_sets_the_papers_figures_beside_ours(moe_lm, preset):
    out = moe_lm("describe", f"model={preset}").out
    row = paper_result(preset)
    for line, figure in zip(out.splitlines()[1:4], (row.operations, row.parameters, row.total), strict=True):
        assert line.endswith(f"the paper prints {figure}")
    assert not re.search("sent", out)
    assert "16.00 bytes" in out


def test_a_changed_model_has_no_printed_figures_beside_it(moe_lm, described):
    for override in ("layer@model.layers.middle=feed_forward", "vocabulary_size=50"):
        assert described("model=moe_32", override)["printed"] is None
    assert "the paper" not in moe_lm("describe", "model.k=2").out
    assert described("model=moe_32", "batch.words=100")["printed"]["total"] == "0.9"


def test_the_table_shows_the_communication_of_several_processes(moe_lm):
    out = moe_lm("describe", "model=moe_4096_h", "num_processes=16", "machine.precision=bfloat16", *FACTORED).out
    assert "memory of each of 16 processes, 512 words at a time, bfloat16, hidden activations recomputed" in out
    assert re.search(r"rows to experts and back, all to all +[\d.]+ MiB", out)
    assert re.search(r"all-reduce +[\d.]+ [MG]iB", out)


def test_a_model_without_experts_has_none_in_the_table(moe_lm):
    assert re.search(r"experts +0 +0 B +0 B +0 B +-\n", moe_lm("describe", "model=lstm_2x8192_1024").out)


def test_help_offers_the_presets(moe_lm):
    out = moe_lm("describe", "--help").out
    assert all(f"model={preset}" in out for preset in choices("model"))
    assert "num_processes: 1" in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_processes=0"], "num_processes=0.*at least 1"),
        (["num_processes=9000"], "num_processes=9000.*batch.words=8192"),
        (["batch.micro_words=8193"], "batch.micro_words=8193.*micro_words <= words"),
        (["batch.words=0"], "batch.words=0"),
        (["vocabulary_size=0"], "vocabulary_size=0.*at least 1"),
        (["vocabulary_size=many"], "vocabulary_size=many.*a whole number"),
        (["machine.precision=float8"], "machine.precision=float8.*float32 or bfloat16"),
        (["model=lstm_2048_512", "model.lstm_units=0"], "model.lstm_units=0.*at least 1"),
        (["model.k=9"], "model.k=9.*model.num_experts=4"),
    ],
    ids=str,
)
def test_describe_refuses(overrides, words):
    with pytest.raises(UserError, match=words):
        describe.main(overrides)


def test_a_refusal_is_one_line(moe_lm):
    outcome = moe_lm("describe", "num_proceses=2")
    assert outcome.code == 2
    assert_one_line(outcome, "unknown key num_proceses", "num_processes")
