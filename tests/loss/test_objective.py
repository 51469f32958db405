"""The objective over several micro-batches against the objective of the batch in one piece.

Shape suffixes: T tokens, D width, G groups, E experts (with G, of a group).
"""

from functools import partial

import pytest
import torch

from moe_lm.data.batch import PaddedLayout
from moe_lm.gate import Gating
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.objective import Importance, Load, Objective, add_statistics, statistics_of
from moe_lm.model.hierarchical_moe import HierarchicalMoE

WIDTH, NUM_EXPERTS, NUM_WORDS = 4, 6, 50
CUTS = [slice(0, 7), slice(7, 8), slice(8, 40)]
OBJECTIVE = Objective({"importance": Importance(weight=3.0), "load": Load(weight=5.0)})


def make():
    """Two gates and 40 tokens with a sum of nats that depends on gates and tokens."""
    torch.manual_seed(0)
    gates = {
        name: NoisyTopK(width=WIDTH, num_experts=NUM_EXPERTS, k=2, noise_epsilon=0.01).double() for name in ("a", "b")
    }
    with torch.no_grad():
        for gate in gates.values():
            gate.gate_DE.normal_()
            gate.noise_DE.normal_()
    return gates, torch.randn(40, WIDTH, dtype=torch.float64)


@pytest.fixture
def fixed_noise(monkeypatch):
    """Every token draws the same noise in whatever micro-batch it comes; call with the tokens' rows."""
    noise_TE = torch.randn(40, NUM_EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def use(rows):
        monkeypatch.setattr(torch, "randn_like", lambda x: noise_TE[rows])

    return use


def passed(gates, x_TD):
    gatings = {name: gate(x_TD) for name, gate in gates.items()}
    nats = sum((g.gate_A.square() * (g.expert_A + 1) * x_TD[g.token_A, 0]).sum() for g in gatings.values())
    return nats, gatings


def gradients(gates):
    return [p.grad for gate in gates.values() for p in gate.parameters()]


def whole_batch(gates, x_TD, fixed_noise):
    fixed_noise(slice(None))
    nats, gatings = passed(gates, x_TD)
    loss, terms = OBJECTIVE(nats, NUM_WORDS, gatings)
    loss.backward()
    grads = [grad.clone() for grad in gradients(gates)]
    for gate in gates.values():
        gate.zero_grad()
    return loss, terms, gatings, grads


def in_pieces(gates, x_TD, fixed_noise, exact):
    global_stats = None
    if exact:
        for rows in CUTS:
            fixed_noise(rows)
            with torch.no_grad():
                global_stats = add_statistics(global_stats, statistics_of(passed(gates, x_TD[rows])[1]))
    all_terms = []
    for rows in CUTS:
        fixed_noise(rows)
        nats, gatings = passed(gates, x_TD[rows])
        loss, terms = OBJECTIVE(nats, NUM_WORDS, gatings, global_stats)
        loss.backward()
        all_terms.append(terms)
    return all_terms


def test_micro_batches_add_up_to_the_batch(fixed_noise):
    """With global statistics the micro-batches' gradients sum to the batch's, and each reports the batch's losses."""
    gates, x_TD = make()
    _, terms, _, want = whole_batch(gates, x_TD, fixed_noise)
    pieces = in_pieces(gates, x_TD, fixed_noise, exact=True)
    for mine, theirs in zip(gradients(gates), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for piece in pieces:
        assert {name: float(x) for name, x in piece.items()} == pytest.approx(
            {name: float(x) for name, x in terms.items()}, rel=1e-12
        )


def test_micro_batches_alone_are_something_else(fixed_noise):
    """Without them (balance.global_batch=false) the gradients differ widely: the exact sum above is no accident."""
    gates, x_TD = make()
    *_, want = whole_batch(gates, x_TD, fixed_noise)
    in_pieces(gates, x_TD, fixed_noise, exact=False)
    assert all(
        (mine - theirs).norm() > 0.1 * theirs.norm() for mine, theirs in zip(gradients(gates), want, strict=True)
    )


def test_a_micro_batch_alone_counts_by_its_share(fixed_noise):
    """Without global statistics the balance losses count by `share`; with them `share` changes nothing."""
    gates, x_TD = make()
    fixed_noise(slice(None))
    nats, gatings = passed(gates, x_TD)
    global_stats = statistics_of(gatings)
    full, quarter = (OBJECTIVE(nats, NUM_WORDS, gatings, share=share)[0].item() for share in (1.0, 0.25))
    per_word = nats.item() / NUM_WORDS
    assert quarter - per_word == pytest.approx((full - per_word) / 4, rel=1e-12)
    assert OBJECTIVE(nats, NUM_WORDS, gatings, global_stats, 0.25)[0].item() == pytest.approx(full, rel=1e-12)


def test_value_is_nats_per_word_plus_weighted_losses_of_every_layer(fixed_noise):
    """nats / words + 3 CV^2(importance) + 5 CV^2(load), summed over both gated layers, terms unweighted."""
    gates, x_TD = make()
    loss, terms, gatings, _ = whole_batch(gates, x_TD, fixed_noise)

    def squared(x_E):
        x = x_E.tolist()
        mean = sum(x) / len(x)
        return sum((v - mean) ** 2 for v in x) / len(x) / mean**2

    importance = sum(squared(g.importance_E) for g in gatings.values())
    load = sum(squared(g.load_E) for g in gatings.values())
    fixed_noise(slice(None))
    nats = passed(gates, x_TD)[0].item()
    assert loss.item() == pytest.approx(nats / NUM_WORDS + 3 * importance + 5 * load, rel=1e-9)
    assert float(terms["importance"]) == pytest.approx(importance, rel=1e-9)
    assert float(terms["load"]) == pytest.approx(load, rel=1e-9)
    assert not any(value.requires_grad for value in terms.values())


def test_a_stack_without_gates_pays_for_nats_alone():
    """Without gated layers the objective is nats per word and each term 0."""
    loss, terms = OBJECTIVE(torch.tensor(30.0).double(), 12, {})
    assert loss.item() == 2.5
    assert terms == {"importance": 0.0, "load": 0.0}


def gating_with(importance_E, **sums):
    empty = torch.zeros(0, dtype=torch.int64)
    load_E = torch.ones_like(importance_E)
    return Gating(empty, empty, torch.zeros(0), 0, importance_E, load_E, 0, sums=sums)


def test_statistics_are_detached_and_add_by_layer_and_name():
    """Importance, load and further sums are collected without gradients and added up layer by layer."""
    x_E = torch.tensor([1.0, 2.0], requires_grad=True)
    one, two = ({"a": gating_with(x_E, log_z=x_E.sum())}, {"a": gating_with(10 * x_E, log_z=x_E.sum() + 1)})
    total = add_statistics(add_statistics(None, statistics_of(one)), statistics_of(two))
    assert set(total) == {"a"}
    assert {name: value.tolist() for name, value in total["a"].items()} == {
        "importance_E": [11.0, 22.0],
        "load_E": [2.0, 2.0],
        "log_z": 7.0,
    }
    assert not any(value.requires_grad for value in total["a"].values())


def test_a_loss_reads_further_sums_globally():
    """A balance loss that reads `sums` sees the global value, with the gradient of its own part."""

    class LogZ:
        weight = 2.0

        def __call__(self, gating):
            return gating.sums["log_z"].square()

    x_E = torch.tensor([1.0, 2.0], requires_grad=True)
    gatings = {"a": gating_with(x_E, log_z=x_E.sum())}
    global_stats = {"a": {"importance_E": x_E.detach(), "load_E": x_E.detach(), "log_z": torch.tensor(10.0)}}
    loss, terms = Objective({"z": LogZ()})(torch.zeros(()), 1, gatings, global_stats)
    assert (loss.item(), float(terms["z"])) == (200.0, 100.0)
    loss.backward()
    assert x_E.grad.tolist() == [40.0, 40.0]


GROUPS, OF_GROUP = 3, 4
PIECES = [[slice(0, 40)], [slice(0, 15), slice(15, 40)], CUTS]


@pytest.fixture
def hierarchical(monkeypatch):
    """A hierarchical layer, 40 tokens, and its pass over some of their rows with the noise of each (token, group)."""
    torch.manual_seed(0)
    gate = partial(NoisyTopK, noise_epsilon=0.01)
    sizes = {"width": WIDTH, "hidden": 5, "num_experts": GROUPS * OF_GROUP, "num_groups": GROUPS, "k": 2}
    layer = HierarchicalMoE(**sizes, primary_gate=gate, gate=gate).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x_TD, noise_TG = torch.randn(40, WIDTH).double(), torch.randn(40, GROUPS).double()
    noise_TGE = torch.randn(40, GROUPS, OF_GROUP).double()
    draws = []
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.pop())

    def passed_over(rows):
        draws[:] = [noise_TG[rows]]
        hook = layer.primary_gate.register_forward_hook(
            lambda module, given, primary: draws.append(noise_TGE[rows][primary.token_A, primary.expert_A])
        )
        part_TD = x_TD[rows]
        y_TD, gating = layer(part_TD, PaddedLayout(len(part_TD), 1, None))
        hook.remove()
        return (y_TD * part_TD).square().sum(), {"middle": gating}

    return layer, passed_over


def collected(passed_over, cuts):
    """First pass: the sums of all pieces, without gradients."""
    global_stats = None
    for rows in cuts:
        with torch.no_grad():
            global_stats = add_statistics(global_stats, statistics_of(passed_over(rows)[1]))
    return global_stats


@pytest.mark.parametrize("cuts", PIECES, ids=len)
def test_micro_batches_of_a_hierarchical_layer_add_up_to_the_batch(hierarchical, cuts):
    """Losses and every gradient of both gates and the experts are those of the batch in one piece, also eq. 14's."""
    layer, passed_over = hierarchical
    nats, gatings = passed_over(slice(None))
    loss, terms = OBJECTIVE(nats, NUM_WORDS, gatings)
    want = torch.autograd.grad(loss, tuple(layer.parameters()))
    assert all(grad.abs().max() > 1e-3 for grad in want)
    global_stats, total = collected(passed_over, cuts), 0.0
    for rows in cuts:
        nats, gatings = passed_over(rows)
        part, values = OBJECTIVE(nats, NUM_WORDS, gatings, global_stats)
        part.backward()
        total += nats.item() / NUM_WORDS
        for name, value in terms.items():
            assert float(values[name]) == pytest.approx(float(value), rel=1e-12)
    weighted = 3 * float(terms["importance"]) + 5 * float(terms["load"])
    assert total + weighted == pytest.approx(loss.item(), rel=1e-12)
    for parameter, theirs in zip(layer.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-10, atol=1e-12)


def test_hierarchical_load_is_not_additive_but_its_sums_are(hierarchical):
    """Eq. 14 of the batch is not the sum of the micro-batches' loads; made of the added sums, it is exact."""
    _, passed_over = hierarchical
    whole = passed_over(slice(None))[1]["middle"]
    parts = [passed_over(rows)[1]["middle"] for rows in CUTS]
    apart_E = sum(part.load_E for part in parts)
    assert (apart_E - whole.load_E).abs().max() > 0.1
    global_stats = collected(passed_over, CUTS)["middle"]
    assert set(global_stats) == {"importance_E", "num_received_G"} | {
        f"{level}_{name}"
        for level in ("primary", "secondary")
        for name in ("load_E", "requested_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens")
    }
    for part in parts:
        together = part.with_statistics(global_stats)
        torch.testing.assert_close(together.load_E, whole.load_E, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.importance_E, whole.importance_E, rtol=1e-12, atol=1e-12)
        assert torch.equal(together.expert_A, part.expert_A)


def test_hierarchical_micro_batches_alone_are_something_else(hierarchical):
    """With the micro-batches' own statistics both gates' gradients differ widely: the exact sum is no accident."""
    layer, passed_over = hierarchical
    nats, gatings = passed_over(slice(None))
    matrices = (*layer.primary_gate.parameters(), *layer.gate.parameters())
    want = torch.autograd.grad(OBJECTIVE(nats, NUM_WORDS, gatings)[0], matrices)
    for rows in CUTS:
        nats, gatings = passed_over(rows)
        OBJECTIVE(nats, NUM_WORDS, gatings)[0].backward()
    assert all((p.grad - w).norm() > 0.1 * w.norm() for p, w in zip(matrices, want, strict=True))
