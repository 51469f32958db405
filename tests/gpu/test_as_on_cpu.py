"""A GPU makes the updates that a CPU makes: the same model, data and noise, in float32."""

import pytest
import torch

from moe_lm.ops import lstm_mixed
from moe_lm.ops.sparse_rows import row_grad

CPU = torch.device("cpu")
STEPS = 3
CASES = {
    "noisy_top_k": [],
    "hierarchical": ["layer@model.layers.middle=hierarchical_moe", "model.num_experts=12", "model.num_groups=4"],
    "dense_full": ["softmax=full", "optimizer.vocabulary=dense"],
    "factored": ["optimizer.experts=factored"],
    "top_k": ["gate@model.layers.middle.gate=top_k", "balance=[switch,z_loss]"],
    "switch": ["gate@model.layers.middle.gate=switch", "model.k=1", "balance=[switch]"],
    "gshard": ["gate@model.layers.middle.gate=gshard", "balance=[gshard]"],
    "expert_choice": ["gate@model.layers.middle.gate=expert_choice", "balance=[]"],
    "loss_free": ["gate@model.layers.middle.gate=loss_free", "balance=[]"],
    "sinkhorn": ["gate@model.layers.middle.gate=sinkhorn", "balance=[]"],
    "strictly_balanced": ["gate@model.layers.middle.gate=strictly_balanced", "balance=[batchwise]"],
    "hash": ["gate@model.layers.middle.gate=hash", "balance=[]"],
    "recipe": ["recipe=small_batch"],
    "shared_experts": ["model.num_shared_experts=2"],
    "recompute": ["machine.recompute=true"],
    "one_micro_batch": ["batch.micro_words=200"],
}


def updates(trainer) -> dict[str, torch.Tensor]:
    """Losses, norms, gradients of each step and parameters after the last, on the CPU."""
    found, optimizer = {}, trainer.optimizer

    def note():
        for name, parameter in trainer.model.named_parameters():
            whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            if (touched := row_grad(parameter)) is not None:
                whole.index_add_(0, touched.row_U, touched.value_UD)
            found[f"{trainer.progress.step} {name}"] = whole.cpu()

    clip = optimizer.clip  # what an update does next
    optimizer.clip = lambda *arguments: [note(), clip(*arguments)]
    trainer.model.train()
    for step in range(STEPS):
        trainer.progress.step = step
        done = trainer.train_step(trainer.prefetcher.batches.step(step), step, 1e-3)
        assert done.updated
        found |= {f"{step} nats": done.nats.cpu(), f"{step} norm": done.grad_norm.cpu()}
        found |= {f"{step} {name}": term.detach().cpu() for name, term in done.balance.items()}
    return found | {name: tensor.detach().cpu() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_same_updates(trainer, gpu, same_noise, overrides):
    """To 1e-3 of each tensor's norm: products of float32 on a GPU need not round as on a CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = updates(trainer(CPU, *overrides)), updates(trainer(gpu, *overrides))
    assert here.keys() == there.keys()
    for name, want in here.items():
        want, got = want.double(), there[name].double()
        assert (got - want).norm() <= 1e-3 * want.norm() + 1e-6, name


@pytest.mark.parametrize("overrides", [CASES["noisy_top_k"], CASES["recompute"]], ids=["kept", "recomputed"])
def test_bfloat16_is_near_float32(trainer, gpu, same_noise, monkeypatch, overrides):
    """The loss to a hundredth; gradients point where those of float32 point. With the LSTM of large batches."""
    monkeypatch.setattr(lstm_mixed, "_MIN_SENTENCES_MIXED", 1)
    want, got = updates(trainer(CPU, *overrides)), updates(trainer(gpu, *overrides, precision="bfloat16"))
    assert float(got["0 nats"]) == pytest.approx(float(want["0 nats"]), rel=0.01)
    for name, ours in got.items():
        if name.startswith("0 ") and ours.dim() and want[name].norm() > 1e-6:
            cosine = torch.nn.functional.cosine_similarity(ours.double().flatten(), want[name].double().flatten(), 0)
            assert cosine > 0.9, name
