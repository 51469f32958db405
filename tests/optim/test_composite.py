"""The optimizers of one model together: who updates what, the norm of all gradients, and what they cost."""

import itertools

import pytest
import torch

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.ops import adam
from moe_lm.ops.sparse_rows import row_grad
from moe_lm.optim import EXPERTS, parameter_groups
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam

SIZES = ["model.width=8", "model.expert_hidden=12", "model.num_experts=4", "model.k=2", "model.dropout=0"]
VOCABULARY = 50


def setting(*overrides):
    """A small model with its optimizers after one backward pass."""
    sampled = [] if "softmax=full" in overrides else ["softmax.num_sampled=10"]
    config = resolved(composed("train", ["model=moe_4", *sampled, *SIZES, *overrides]))
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)
    recipe = build(config["optimizer"])
    optimizer = recipe.build(model)
    backward(model)
    return model, recipe, optimizer


def backward(model, seed=3):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCABULARY, (30,), generator=draw).to(torch.int32).numpy()
    split = Split(tokens, torch.tensor([0, 12, 30]).numpy(), torch.tensor([12, 18]).to(torch.uint32).numpy())
    [(_, batch)] = iter_eval_batches(split, start=0, max_sentences=9, max_words=99)
    model.train()
    torch.manual_seed(seed)
    nats, _ = model(batch, 7)
    nats.backward()


def held(part):
    return {id(p) for group in part.param_groups for p in group["params"]}


@pytest.mark.parametrize("experts", ["adam", "factored"])
@pytest.mark.parametrize("vocabulary", ["lazy", "dense"])
def test_every_parameter_has_its_rule(experts, vocabulary):
    """Experts, vocabulary and the rest go where the configuration says; nothing is left out or held twice."""
    model, _, optimizer = setting(f"optimizer.experts={experts}", f"optimizer.vocabulary={vocabulary}")
    kinds = {kind: set() for kind in ("experts", "vocabulary", "rest")}
    for name, parameter in model.named_parameters():
        own = name.split(".")[-1]
        kind = "experts" if own[:2] in ("w1", "w2") else "rest"
        kinds["vocabulary" if own in ("weight_VD", "bias_V") else kind].add(id(parameter))
    of_type = {type(part): held(part) for part in optimizer.parts}
    assert of_type.get(FactoredAdam, set()) == (kinds["experts"] if experts == "factored" else set())
    assert of_type.get(LazyAdam, set()) == (kinds["vocabulary"] if vocabulary == "lazy" else set())
    everything = list(itertools.chain(*(held(part) for part in optimizer.parts)))
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_the_norm_is_that_of_all_gradients():
    """Row gradients included."""
    (_, _, lazy), (dense, _, other) = (setting(f"optimizer.vocabulary={rule}") for rule in ("lazy", "dense"))
    norm = sum(p.grad.double().square().sum() for p in dense.parameters()).sqrt().item()
    assert lazy.norm().item() == pytest.approx(norm, rel=1e-5)
    assert other.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("softmax", ["sampled", "full"])
@pytest.mark.parametrize("experts", ["adam", "factored"])
@pytest.mark.parametrize("vocabulary", ["lazy", "dense"])
def test_clipping_scales_all_gradients_of_one_step(experts, vocabulary, softmax, monkeypatch):
    """Weights and state are bit for bit those of gradients that were multiplied before; the next step's are whole."""
    monkeypatch.setattr(adam, "_CHUNK_ON_CPU", 30)  # several parts of each matrix
    overrides = [f"optimizer.experts={experts}", f"optimizer.vocabulary={vocabulary}", f"softmax={softmax}"]
    results = []
    for by_hand in (False, True):
        model, _, optimizer = setting(*overrides)
        for step in range(3):
            backward(model, seed=step)
            if step == 1:
                norm = optimizer.norm().item()
                limit = 0.3 * norm
                if by_hand:
                    for parameter in model.parameters():
                        touched = row_grad(parameter)
                        for grad in (parameter.grad, touched and touched.value_UD):
                            if grad is not None:
                                grad.mul_(limit / norm)
                else:
                    optimizer.clip(limit, norm)
            optimizer.step()
            optimizer.zero_grad()
        states = [x for p in model.parameters() for x in optimizer.state[p].values()]
        results.append([*(p.detach() for p in model.parameters()), *states])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("between", ["zero_grad", "clip"])
def test_a_scale_is_of_one_gradient(between):
    """Who drops a clipped gradient, or clips it anew and need not, does not scale the next one."""
    results = []
    for clipped in (False, True):
        model, _, optimizer = setting("optimizer.experts=factored", "optimizer.vocabulary=lazy")
        parts = optimizer.parts[:] if between == "zero_grad" else [p for p in optimizer.parts if hasattr(p, "scale")]
        optimizer.parts = parts  # torch's own are scaled where they are
        if clipped:
            optimizer.clip(0.5, 1.0)
            if between == "clip":
                optimizer.clip(1.0, 0.5)
        if between == "zero_grad":
            optimizer.zero_grad()
            backward(model)
        optimizer.step()
        results.append([p.detach().clone() for p in optimizer.parameters])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_short_gradient_is_left_alone():
    """A norm above the gradient's changes no bit of it, nor one above that of a gradient of zeros."""
    model, _, optimizer = setting()
    before = [row_grad(p).value_UD.clone() if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.clip(1e9, optimizer.norm().item())
    optimizer.clip(1.0, 0.0)
    assert all(getattr(part, "scale", 1) == 1 for part in optimizer.parts)
    after = [row_grad(p).value_UD if p.grad is None else p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("experts", ["adam", "factored"])
@pytest.mark.parametrize("vocabulary", ["lazy", "dense"])
def test_stated_bytes_are_the_real_ones(experts, vocabulary):
    """Gradient and state of each parameter take what the recipe says."""
    model, recipe, optimizer = setting(f"optimizer.experts={experts}", f"optimizer.vocabulary={vocabulary}")
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        touched = row_grad(parameter)
        stored = [parameter.grad] if touched is None else [*touched[:2]]
        rows = 0 if touched is None else len(touched.row_U)
        assert recipe.gradient_bytes(groups[name], parameter, rows) == _bytes(stored), name
    optimizer.step()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert recipe.state_bytes(groups[name], parameter) == _bytes(state.values()), name


def _bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_bytes_a_parameter_at_the_papers_size():
    """An expert parameter costs 16 bytes with Adam and 8.01 with the factored moment, weight and gradient included."""
    w1_EDH = torch.empty(256, 512, 1024, device="meta")
    for experts, expected in (("adam", 16.0), ("factored", 8.0 + 4 / 512 + 4 / 1024)):
        recipe = build(resolved(composed("train", [f"optimizer.experts={experts}"]))["optimizer"])
        total = 4 * w1_EDH.numel() + recipe.gradient_bytes(EXPERTS, w1_EDH, 0) + recipe.state_bytes(EXPERTS, w1_EDH)
        assert total / w1_EDH.numel() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(8.01, abs=0.01)


def test_training_goes_on_from_stored_state():
    """State taken over by name makes the next update the same bit for bit."""
    models = [setting("optimizer.experts=factored") for _ in range(2)]
    for _, _, optimizer in models:
        optimizer.step()
        optimizer.zero_grad()
    (first, _, optimizer), (second, recipe, _) = models
    fresh = recipe.build(second)
    state = optimizer.state
    names = {name: state[p] for name, p in first.named_parameters()}
    fresh.load({p: {k: v.clone() for k, v in names[name].items()} for name, p in second.named_parameters()})
    for model, its in ((first, optimizer), (second, fresh)):
        backward(model, seed=5)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
