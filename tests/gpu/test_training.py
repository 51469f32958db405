"""The commands on a GPU: train, stop, go on, evaluate there and on the CPU, and torchrun with NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.ops import grouped_gemm

ON_GPU = with_overrides(TRAINING, "machine.device=cuda", "model.width=16", "model.expert_hidden=32")


def lines(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


def test_trains_and_evaluates_on_either_device(workspace, moe_lm):
    """Perplexity falls; the checkpoint gives the same one on the CPU, to what bfloat16 is coarser."""
    assert moe_lm("train", *ON_GPU).code == 0
    found = [line["perplexity"] for line in lines("tiny") if line.get("split") == "valid"]
    assert found[-1] < found[0]
    on = [
        json.loads(moe_lm("evaluate", "run=runs/tiny", "json=true", f"machine.device={device}").out)["perplexity"]
        for device in ("cuda", "cpu")
    ]
    assert on[0] == pytest.approx(on[1], rel=0.01)


def test_goes_on_where_it_stopped(workspace, moe_lm):
    """A run in two parts makes the losses of one in one part, to a GPU's rounding."""
    assert moe_lm("train", *with_overrides(ON_GPU, "name=whole")).code == 0
    assert moe_lm("train", *with_overrides(ON_GPU, "training.num_words=1000")).code == 0
    assert "resumed" in moe_lm("train", *ON_GPU).err
    whole, parts = (
        [line["nats_per_word"] for line in lines(run) if "nats_per_word" in line] for run in ("whole", "tiny")
    )
    assert parts == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("max_torch_experts", [0, 1023])
@pytest.mark.parametrize("layer", ["moe", "hierarchical_moe", "feed_forward"])
def test_forward_and_backward_wait_for_nothing(trainer, gpu, monkeypatch, layer, max_torch_experts):
    """CUDA itself would say so; tests/train/test_waits.py says it of what runs without a GPU."""
    monkeypatch.setattr(grouped_gemm, "max_torch_experts", max_torch_experts)
    sizes = ["model.num_experts=16", *(["model.num_groups=4"] if layer == "hierarchical_moe" else [])]
    overrides = [f"layer@model.layers.middle={layer}", *sizes, "optimizer.experts=factored"]
    made = trainer(gpu, *overrides, precision="bfloat16")
    made.model.train()
    for step in range(2):
        assert made.train_step(made.prefetcher.batches.step(step), step, 1e-3).updated
    batch = made.prefetcher.batches.step(2)
    try:
        torch.cuda.set_sync_debug_mode("error")
        made.train_step._forward_backward(batch, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_whose_gradient_is_not_finite_changes_nothing(trainer, gpu):
    """And the next step updates."""
    made = trainer(gpu, "optimizer.experts=factored", precision="bfloat16")
    made.model.train()
    assert made.train_step(made.prefetcher.batches.step(0), 0, 1e-3).updated
    state = [x for kept in made.optimizer.state.values() for x in kept.values()]
    before = [x.detach().clone() for x in (*made.model.state_dict().values(), *state)]
    hook = made.model.layers["middle"].experts.w1_EDH.register_hook(lambda grad: grad * float("nan"))
    assert not made.train_step(made.prefetcher.batches.step(1), 1, 1e-3).updated
    hook.remove()
    state = [x for kept in made.optimizer.state.values() for x in kept.values()]
    for now, then in zip((*made.model.state_dict().values(), *state), before, strict=True):
        assert torch.equal(now, then)
    assert made.train_step(made.prefetcher.batches.step(2), 2, 1e-3).updated


def test_torchrun_of_one(workspace):
    """NCCL begins and ends, whoever else there is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "moe_lm"]
    done = subprocess.run([*command, "train", *ON_GPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("runs/tiny/result.json").is_file()
