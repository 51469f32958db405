"""A run that starts from one with fewer experts, or from one with a dense layer in place of the mixture."""

import json
from pathlib import Path

import pytest
import torch
from shards import whole
from tiny_training import TRAINING, assert_one_line, call, with_overrides, working_in

from moe_lm.cli import train

HIERARCHY = ["layer@model.layers.middle=hierarchical_moe", "model.num_groups=2"]
STEPS = 12
"""Of the finished runs."""


@pytest.fixture(scope="module")
def sources(trained_once, tmp_path_factory) -> Path:
    """The finished run tiny (4 experts of 8 hidden units, k = 2), dense ones and a hierarchical one."""
    folder = tmp_path_factory.mktemp("growth")
    (folder / "runs").mkdir()
    for name in ("text", "data", "runs/tiny"):
        (folder / name).symlink_to(trained_once / name)
    dense = [argument for argument in TRAINING if not argument.startswith(("model.num_experts", "model.k="))]
    with working_in(folder):
        for hidden in (8, 16):
            assert call("train", *with_overrides(dense, "model=moe_1_wide", *of_run(f"dense_{hidden}", hidden))) == 0
        factored = [*of_run("factored", 8), "optimizer.experts=factored"]
        assert call("train", *with_overrides(dense, "model=moe_1_wide", *factored)) == 0
        assert call("train", *with_overrides(TRAINING, *HIERARCHY, "name=hierarchical", "model.k=1")) == 0
    return folder


def of_run(name: str, hidden: int) -> list[str]:
    return [f"model.expert_hidden={hidden}", f"name={name}"]


@pytest.fixture
def grown(sources, moe_lm, monkeypatch):
    """Start a training and make one tiny update, so that its weights stay those that it starts from."""
    monkeypatch.chdir(sources)

    def start(name: str, source: str, *overrides: str):
        return moe_lm("train", *arguments(name, source, *overrides))

    return start


def arguments(name: str, source: str, *overrides: str) -> list[str]:
    small = [
        "schedule.warmup_steps=1",
        "optimizer.learning_rate=1e-12",
        "training.num_words=1",
        "checkpoint.every_seconds=1000",
        "seed=9",
    ]
    return with_overrides(TRAINING, *small, f"name={name}", f"init_from={source}", *overrides)


def tensors(name: str, part: str = "model") -> dict[str, torch.Tensor]:
    return whole(max(Path("runs", name, "checkpoints").glob("[0-9]*")) / part)


def perplexity(name: str) -> float:
    return json.loads(Path("runs", name, "result.json").read_text())["perplexity"]["test"]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ("dense_8", ["model.num_experts=6", "model.k=3"]),  # each expert is the dense layer, and gate values sum to 1
        ("dense_8", [*HIERARCHY, "model.num_experts=6", "model.k=2"]),
        ("dense_16", ["model.num_experts=2", "model.k=2"]),  # W_g begins at zero: each half has the gate value 1/2
        ("tiny", [*HIERARCHY, "model.num_experts=8", "model.layers.middle.primary_k=1"]),  # each group is the mixture
        ("hierarchical", [*HIERARCHY, "model.k=1", "model.num_groups=2", "init_noise=0"]),  # as large as before
    ],
    ids=str,
)
def test_the_larger_model_computes_what_the_smaller_one_did(grown, source, overrides):
    name = f"same_{source}_{len(overrides)}"
    outcome = grown(name, f"runs/{source}", *overrides)
    assert outcome.code == 0, outcome.err
    assert perplexity(name) == pytest.approx(perplexity(source), rel=1e-5)


def test_experts_and_gate_columns_are_cloned(grown):
    assert grown("eight", "runs/tiny", "model.num_experts=8", "init_noise=0").code == 0
    ours, theirs = tensors("eight"), tensors("tiny")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        kind = name.rpartition(".")[2]
        for expert in range(8):
            if kind in ("w1_EDH", "w2_EHD"):
                assert_equal(tensor[expert], theirs[name][expert % 4])
            elif kind in ("gate_DE", "noise_DE"):
                assert_equal(tensor[:, expert], theirs[name][:, expert % 4])
        if tensor.shape == theirs[name].shape:
            assert_equal(tensor, theirs[name])


@pytest.mark.parametrize(("groups", "experts"), [(4, 8), (2, 8), (4, 16)])
def test_groups_and_their_experts_are_cloned(grown, groups, experts):
    name, size = f"grown_{groups}_{experts}", experts // groups
    sizes = [f"model.num_groups={groups}", f"model.num_experts={experts}", "model.k=1", "init_noise=0"]
    assert grown(name, "runs/hierarchical", HIERARCHY[0], *sizes).code == 0
    ours, theirs = (
        {key[len("layers.middle.") :]: x for key, x in tensors(run).items()} for run in (name, "hierarchical")
    )
    for group in range(groups):
        assert_equal(ours["primary_gate.gate_DE"][:, group], theirs["primary_gate.gate_DE"][:, group % 2])
        for place in range(size):
            column = theirs["gate.gate_DE"][group % 2, :, place % 2]
            assert_equal(ours["gate.gate_DE"][group, :, place], column)
            before = theirs["experts.w1_EDH"][group % 2 * 2 + place % 2]
            assert_equal(ours["experts.w1_EDH"][group * size + place], before)


def test_noise_on_gate_columns_has_the_asked_size(grown):
    """Of 64 clones of 4 columns of 8 numbers, so that the deviation is known to 3 %."""
    assert grown("noisy", "runs/tiny", "model.num_experts=256", "init_noise=0.3").code == 0
    name = "layers.middle.gate.gate_DE"
    ours, theirs = tensors("noisy")[name], tensors("tiny")[name].repeat(1, 64)
    relative = (ours - theirs) / theirs.square().mean(dim=0).sqrt()
    assert relative.std().item() == pytest.approx(0.3, rel=0.1)
    assert abs(relative.mean().item()) < 0.03
    noise = "layers.middle.gate.noise_DE"
    assert_equal(tensors("noisy")[noise], tensors("tiny")[noise].repeat(1, 64))


@pytest.mark.parametrize(
    ("source", "overrides"), [("tiny", ["model.num_experts=12"]), ("tiny", []), ("dense_8", ["model.num_experts=3"])]
)
def test_the_optimizer_state_comes_along(grown, monkeypatch, source, overrides):
    seen = {}
    start_from = train.start_from

    def watched(config, model, optimizer, *more):
        start_from(config, model, optimizer, *more)
        for name, parameter in model.named_parameters():
            seen.update({f"{kind}/{name}": x.clone() for kind, x in optimizer.state.get(parameter, {}).items()})

    monkeypatch.setattr(train, "start_from", watched)
    name = f"state_{source}_{len(overrides)}"
    assert grown(name, f"runs/{source}", *overrides, "init_optimizer=true").code == 0
    stored = tensors(source, "optimizer")
    for key, tensor in seen.items():
        kind, _, parameter = key.partition("/")
        before = stored[
            key
            if source == "tiny"
            else key.replace("experts.w1_EDH", "weights.0").replace("experts.w2_EHD", "weights.1")
        ]
        if kind == "step":
            assert tensor == STEPS
        elif "experts." in parameter:
            for expert, moment in enumerate(tensor):
                assert_equal(moment, before[expert % 4] if source == "tiny" else before)
        elif parameter.endswith(("gate_DE", "noise_DE")):
            for expert in range(tensor.shape[1]):
                assert_equal(tensor[:, expert], before[:, expert % 4])
        else:
            assert_equal(tensor, before)
    fresh = tensors(name, "optimizer").keys() - seen.keys()
    assert all("gate." in key for key in fresh)
    assert bool(fresh) == (source == "dense_8")


def test_two_processes_start_from_the_same_weights(grown, ranks, sources):
    alone, shared = (
        arguments(name, "runs/tiny", "model.num_experts=8", "parallel.vocab=true", "init_optimizer=true")
        for name in ("alone", "shared")
    )
    assert call("train", *alone) == 0
    ranks.run(2, "resuming:run_commands", [["train", *shared]], sources, meet=False)
    for part in ("model", "optimizer"):
        ours, theirs = tensors("shared", part), tensors("alone", part)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name


def test_an_export_grows_too(grown, moe_lm):
    assert grown("eight_of_run", "runs/tiny", "model.num_experts=8").code == 0
    assert moe_lm("export", "run=runs/tiny", "to=tiny_export").code == 0
    assert grown("eight_of_export", "tiny_export", "model.num_experts=8").code == 0
    ours, theirs = tensors("eight_of_export"), tensors("eight_of_run")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    outcome = grown("refused", "tiny_export", "model.num_experts=8", "init_optimizer=true")
    assert_one_line(outcome, "init_optimizer=true", "is an export, which has no optimizer state")


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("tiny", ["model.num_experts=6"], ["layer middle has 4 experts there, of which 6 experts are no multiple"]),
        ("tiny", ["model.num_experts=2"], ["4 experts there, of which 2 experts"]),
        ("tiny", ["model.num_experts=8", "model.expert_hidden=4"], ["does not fit", "experts.w1_EDH of this size"]),
        ("tiny", ["model.num_experts=8", "model.width=16"], ["does not fit", "of this size"]),
        (
            "tiny",
            ["model.num_experts=8", "gate@model.layers.middle.gate=top_k", "balance=[importance]"],
            ["another gate"],
        ),
        ("hierarchical", ["model.num_experts=8"], ["has 2 groups of 2 experts there, of which 8 experts"]),
        ("dense_16", ["model.expert_hidden=12"], ["dense layers of [16] hidden units", "experts of 12"]),
        ("tiny", ["model.num_experts=8", "init_noise=-1"], ["init_noise=-1.0: must be at least 0"]),
        ("tiny", ["init_optimizer=true", "optimizer.experts=factored"], ["optimizer.experts=adam", "has factored"]),
        (
            "factored",
            ["init_optimizer=true", "optimizer.experts=factored"],
            ["has a dense layer", "optimizer.experts=adam"],
        ),
    ],
    ids=str,
)
def test_what_cannot_grow_is_refused(grown, source, overrides, words):
    assert_one_line(grown("refused", f"runs/{source}", *overrides), *words)


def test_state_without_a_source_is_refused(workspace, training, moe_lm):
    assert_one_line(moe_lm("train", *training, "init_optimizer=true"), "init_optimizer=true: name the run")
