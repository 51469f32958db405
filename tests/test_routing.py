"""Each gate trained from the command line: what is announced, logged, adapted, resumed and refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm.cli import audit
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.training import check
from moe_lm.config_files import choices
from moe_lm.errors import UserError

GATE = "gate@model.layers.middle.gate="
TRAINABLE = {
    "noisy_top_k": ["balance=[importance,load]"],
    "top_k": ["balance=[switch,z_loss]"],
    "gshard": ["balance=[gshard]"],
    "switch": ["balance=[switch,importance]", "model.k=1"],
    "expert_choice": ["balance=[z_loss]"],
    "hash": ["balance=[]"],
    "loss_free": ["balance=[switch]"],
    "sinkhorn": ["balance=[]"],
    "strictly_balanced": ["balance=[batchwise]"],
}
BY_BATCH = {"expert_choice", "gshard", "sinkhorn", "strictly_balanced", "switch"}

HIERARCHICAL = ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=9", "model.num_groups=3", "model.k=2"]
ADAPTS = {"loss_free": "bias_E", "expert_choice": "log_threshold_E"}
"""Buffers that move from their common start."""


@pytest.fixture
def prepared(trained_once, tmp_path, monkeypatch) -> Path:
    """The working directory holds the corpus and its prepared data."""
    for name in ("text", "data"):
        (tmp_path / name).symlink_to(trained_once / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chosen(gate, *more):
    return with_overrides(TRAINING, GATE + gate, *TRAINABLE[gate], *more)


def model_file(folder):
    [file] = max((folder / "checkpoints").glob("[0-9]*")).glob("model/*.safetensors")
    return file


def test_gates_tried_here_are_there():
    assert set(TRAINABLE) <= set(choices("gate"))


def metrics_of(name):
    """The lines of a run's metrics without times."""
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.mark.parametrize("gate", [*TRAINABLE, "hierarchical"])
def test_a_resumed_run_is_an_undisturbed_one(prepared, moe_lm, gate):
    """Same bytes of the model after a break, thresholds and biases included; noise, dropout, two micro-batches on."""
    own = HIERARCHICAL if gate == "hierarchical" else [GATE + gate, *TRAINABLE[gate]]
    arguments = with_overrides(TRAINING, *own, "training.num_words=1100")
    whole = moe_lm("train", *arguments, "name=whole")
    assert whole.code == 0, whole.err
    broken = Path("runs/broken")
    shutil.copytree("runs/whole", broken)
    for later in sorted((broken / "checkpoints").glob("[0-9]*"))[-2:]:
        shutil.rmtree(later)
    (broken / "result.json").unlink()
    outcome = moe_lm("train", *arguments, "name=broken")
    assert "runs/broken: resumed at step 4, " in outcome.err
    whole_model, broken_model = (load_file(model_file(Path("runs", name))) for name in ("whole", "broken"))
    assert whole_model.keys() == broken_model.keys()
    assert all(torch.equal(broken_model[name], tensor) for name, tensor in whole_model.items())
    results = [json.loads(Path(f"runs/{name}/result.json").read_text()) for name in ("whole", "broken")]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert metrics_of("whole") == metrics_of("broken")
    assert gate != "hierarchical" or any("balance_load" in line and line["cv_load"] > 0 for line in metrics_of("whole"))
    assert ("not causal in training" in whole.err) == (gate in BY_BATCH)
    assert sum("model.layers.middle.gate, not causal" in line for line in whole.err.splitlines()) == (gate in BY_BATCH)
    if gate in ADAPTS:
        assert len(whole_model[f"layers.middle.gate.{ADAPTS[gate]}"].unique()) > 1


@pytest.mark.parametrize(("gate", "drops"), [("switch", True), ("gshard", True), ("top_k", False)])
def test_dropped_tokens_are_told(prepared, moe_lm, gate, drops):
    """metrics.jsonl has their share of the choices asked for."""
    less = [f"model.layers.middle.gate.capacity_factor={0.3}"] if drops else []
    assert moe_lm("train", *chosen(gate, *less, "training.num_words=1100")).code == 0
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    shares = [line["dropped_fraction"] for line in lines if "split" not in line]
    alone = [line["unrouted_fraction"] for line in lines if "split" not in line]
    assert len(shares) > 1
    if gate == "gshard":  # the other expert may still serve the token
        assert all(0 < one < share for one, share in zip(alone, shares, strict=True))
    else:
        assert alone == pytest.approx(shares)
    # With capacity 0.3 at most 0.3 of the choices find a place, but for rounding up to whole tokens.
    assert all(0.6 < share < 0.75 for share in shares) if drops else all(share == 0 for share in shares)


NONSENSE = [
    ([GATE + "switch"], ["the gate switch sends a token to 1 expert, not 2: model.k=1"]),
    ([GATE + "gshard", "model.k=3"], ["the gate gshard sends a token to 2 experts, not 3: model.k=2"]),
    ([GATE + "top_k", "model.k=1"], ["learns nothing", "switch"]),
    ([GATE + "top_k"], ["the balance loss load has no gradient", "'balance=[importance]'", "gshard, importance"]),
    ([GATE + "expert_choice", "balance=[switch]"], ["the balance loss switch has no gradient", "'balance=[]'"]),
    ([GATE + "switch", "model.k=1", "balance=[switch]", "model.layers.middle.gate.capacity_factor=0"], ["positive"]),
    ([GATE + "switch", "model.k=1", "balance=[switch]", "model.layers.middle.gate.jitter=1"], ["below 1"]),
    ([GATE + "expert_choice", "balance=[]", "model.layers.middle.gate.max_experts=1"], ["at least the 2 experts"]),
    ([GATE + "expert_choice", "balance=[]", "model.layers.middle.gate.capacity_factor=9"], ["at most as many"]),
    ([GATE + "expert_choice", "balance=[]", "model.layers.middle.gate.max_experts=x"], ["needs a whole number"]),
    ([GATE + "loss_free", "balance=[]", "model.layers.middle.gate.bias_update_rate=-1"], ["at least 0"]),
    ([GATE + "sinkhorn", "balance=[]", "model.layers.middle.gate.max_iterations=0"], ["at least 1"]),
]


@pytest.mark.parametrize(("overrides", "words"), NONSENSE, ids=str)
def test_what_makes_no_sense_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        check(resolved(composed("train", with_overrides(TRAINING, *overrides))))
    [line] = str(caught.value).splitlines()
    for word in words:
        assert word in line


def test_a_refused_gate_is_one_line_and_leaves_no_run(prepared, moe_lm):
    overrides, words = NONSENSE[0]
    outcome = moe_lm("train", *with_overrides(TRAINING, *overrides))
    assert outcome.code == 2
    assert_one_line(outcome, *words)
    assert not Path("runs").exists()


def test_a_fraction_of_an_expert_counts_as_operations(prepared, moe_lm):
    """Expert choice with c = 1.5: 1.5 experts' operations a word, and the gate's."""
    gate = ["balance=[]", "model.layers.middle.gate.capacity_factor=1.5"]
    outcome = moe_lm("train", *with_overrides(TRAINING, GATE + "expert_choice", *gate, "training.num_words=300"))
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("runs/tiny/result.json").read_text())
    assert result["operations_per_timestep"] == 2 * 8 * 8 * 8 + 1.5 * 2 * 8 * 8 + 8 * 4


def test_a_switch_behind_a_primary_gate_of_two_groups(prepared, moe_lm):
    """primary_k sets the groups a token apart from k, the experts in each."""
    overrides = [
        "model=moe_256_h",
        "model.num_groups=4",
        "model.num_experts=8",
        GATE + "switch",
        "balance=[importance]",
    ]
    overrides += ["model.k=1", "model.layers.middle.primary_k=2"]
    outcome = moe_lm("train", *with_overrides(TRAINING, *overrides, "training.num_words=300", "training.log_every=1"))
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["model"]["layers"]["middle"]
    assert (config["primary_k"], config["k"]) == (2, 1)
    line = json.loads(Path("runs/tiny/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["dropped_fraction"] < 0.5


def test_the_audit_prints_and_keeps_what_it_found(own_trained, moe_lm):
    outcome = moe_lm("audit", "run=runs/tiny", "probes=8")
    assert outcome.code == 0, outcome.err
    [largest] = re.findall(r"evaluation: causal, a prediction changes by at most (\S+) bits", outcome.out)
    kept = json.loads((own_trained / "runs/tiny/audit.json").read_text())
    assert largest == f"{kept['evaluation']['largest_bits']:.1e}"
    assert 0 <= float(largest) < 1e-9
    printed = json.loads(moe_lm("audit", "run=runs/tiny", "probes=8", "json=true").out)
    assert printed == kept
    assert kept["causal"] is True
    assert kept["training"]["largest_bits"] < 1e-9
    assert kept["batch_words"] == 100
    assert kept["gates"] == {"model.layers.middle.gate": None}


def test_the_audit_fails_a_run_that_peeks(own_trained, moe_lm, monkeypatch):
    """A noisy top-k gate that reads its neighbour's row: one line, exit code 3."""
    from moe_lm.gate.noisy_top_k import NoisyTopK

    honest = NoisyTopK.logits
    monkeypatch.setattr(NoisyTopK, "logits", lambda self, x_TD, groups: honest(self, 9 * x_TD.roll(-1, 0), groups))
    outcome = moe_lm("audit", "run=runs/tiny", "probes=8")
    assert outcome.code == 3
    assert "NOT CAUSAL" in outcome.out
    assert_one_line(outcome, "is not causal", "its perplexities mean nothing")
    assert json.loads((own_trained / "runs/tiny/audit.json").read_text())["causal"] is False


def test_an_audit_that_cannot_be_kept_is_told_all_the_same(own_trained, moe_lm):
    (own_trained / "runs/tiny/audit.json").mkdir()
    outcome = moe_lm("audit", "run=runs/tiny", "probes=4")
    assert outcome.code == 2
    assert "evaluation: causal" in outcome.out
    assert_one_line(outcome, "cannot write runs/tiny")


def test_an_audit_of_the_best_step_stands_beside_the_last(own_trained, moe_lm):
    assert moe_lm("audit", "run=runs/tiny", "probes=4", "checkpoint=best").code == 0
    [kept] = (own_trained / "runs/tiny").glob("audit*.json")
    assert kept.name == f"audit-{json.loads(kept.read_text())['step']}.json"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["split=train2"], "choose train, valid, test"), (["probes=0"], "at least 1"), (["batch.words=0"], "at least 1")],
    ids=str,
)
def test_a_wrong_audit_is_refused(trained, set_threads, arguments, words):
    with pytest.raises(UserError, match=words):
        audit.main(["run=runs/tiny", *arguments])
    assert not (trained / "runs/tiny/audit.json").exists()


def test_a_refused_audit_is_one_line(trained, moe_lm):
    outcome = moe_lm("audit", "run=runs/none")
    assert outcome.code == 2
    assert_one_line(outcome, "does not exist")
