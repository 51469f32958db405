"""What the tests of the gates share: gates and tokens of known numbers, tables, and comparisons with loops.

References are written out as loops over tokens and experts, without any of the gates' own arithmetic.

Shape suffixes: T tokens, D width, E experts (of a group), A assignments, G groups.
"""

import functools
import inspect
from contextlib import nullcontext

import torch
from omegaconf import OmegaConf

from moe_lm.cli.machine import build
from moe_lm.config_files import folder

ZERO = torch.zeros((), dtype=torch.float64)
SUMS = ("requested_E", "first_choice_E", "probability_E", "log_z_squared", "num_tokens")
"""The sums of a gate whose tokens choose experts."""
CONSTANT = ("requested_E", "first_choice_E", "above_E", "share_E", "num_tokens")
"""Sums without a gradient."""


def each(names, values):
    """Run a test for each of these values inside one test; like `pytest.mark.parametrize`, without a test for each.

    A failure names its values. What a case sets by `monkeypatch` is undone after the case.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def decorated(test):
        @functools.wraps(test)
        def looped(**given):
            for value in values:
                case = dict(zip(names, value if len(names) > 1 else [value], strict=True))
                patch = given.get("monkeypatch")
                with patch.context() if patch else nullcontext() as own:
                    try:
                        test(**given | ({"monkeypatch": own} if patch else {}) | case)
                    except Exception as error:
                        error.add_note(f"in the case {case}")
                        raise

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in names]
        looped.__signature__ = signature.replace(parameters=left)
        return looped

    return decorated


def partial_of(name):
    """The gate as its YAML describes it, for the layer to complete."""
    return build(OmegaConf.to_container(OmegaConf.load(folder() / "gate" / f"{name}.yaml")))


def randomized(gate, seed=0, deviation=1.0):
    """The gate with a random matrix, as after some training."""
    with torch.no_grad():
        gate.gate_DE.normal_(std=deviation, generator=torch.Generator().manual_seed(seed))
    return gate


def reading_logits(gate):
    """The gate with a matrix that makes its tokens the logits."""
    with torch.no_grad():
        gate.gate_DE.copy_(torch.eye(len(gate.gate_DE)))
    return gate


def tokens(num_tokens, width=5, seed=1, dtype=torch.float64):
    """Random tokens."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def groups(rows):
    """The group of each token where each group has so many rows."""
    return torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))


def dense(gating):
    """The gate values as a table, tokens by experts."""
    table = gating.gate_A.new_zeros(gating.num_tokens, gating.num_experts)
    return table.index_put((gating.token_A, gating.expert_A), gating.gate_A)


def logits(x_D, w_DE):
    """The products of one token with each expert's column."""
    return [sum(x_D[d] * w_DE[d, i] for d in range(len(x_D))) for i in range(w_DE.shape[1])]


def stacked(rows, num_experts):
    """Rows of numbers as a table, also where there are none."""
    return torch.stack([torch.stack(row) for row in rows]) if rows else torch.zeros(0, num_experts).double()


def sums_of(requested_E, first_E, probability_E, log_z_squared, num_tokens):
    """The sums of a gate whose tokens choose experts, by name."""
    counts = [torch.tensor(x).double() for x in (requested_E, first_E)]
    values = [*counts, torch.stack(probability_E), log_z_squared, torch.tensor(float(num_tokens)).double()]
    return dict(zip(SUMS, values, strict=True))


def in_groups(by_hand, parts, *options):
    """The table, a block for each group, and the sums, where `parts` are lists of what each group has of its own."""
    tables, sums = zip(*(by_hand(*own, *options) for own in zip(*parts, strict=True)), strict=True)
    together = {
        name: torch.cat([one[name] for one in sums]) if name.endswith("_E") else sum(one[name] for one in sums)
        for name in sums[0]
    }
    return torch.block_diag(*tables), together


def check_order(gating):
    """Assignments ascend by expert, then by token, and none is there twice."""
    pairs = list(zip(gating.expert_A.tolist(), gating.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))


def check(gating, table_TE, sums, num_requested, train):
    """Everything in the gating is that of the loops; in evaluation there are no sums."""
    torch.testing.assert_close(dense(gating), table_TE)
    torch.testing.assert_close(gating.importance_E, table_TE.sum(dim=0))
    assert gating.load_E.tolist() == (table_TE > 0).sum(dim=0).tolist()
    assert not gating.load_E.requires_grad
    assert gating.num_requested == num_requested == len(gating.token_A) + gating.num_dropped
    assert len(gating.token_A) == int((table_TE > 0).sum())
    check_order(gating)
    assert set(gating.sums) == (set(sums) if train else set())
    for name, value in gating.sums.items():
        torch.testing.assert_close(value, sums[name])
        assert not (name in CONSTANT and value.requires_grad)


def check_gradients(what, gating, table_TE, sums, inputs):
    """Gradients through the gate values, the importance or the sum of this name are those of the loops."""
    factor_TE = torch.randn(table_TE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if what == "gate":
        got, want = (dense(gating) * factor_TE).sum(), (table_TE * factor_TE).sum()
    elif what == "importance":
        got, want = (gating.importance_E * factor_TE[0]).sum(), (table_TE.sum(dim=0) * factor_TE[0]).sum()
    else:
        got, want = (gating.sums[what] * factor_TE[0]).sum(), (sums[what] * factor_TE[0]).sum()
    same_gradients(got, want, inputs)


def same_gradients(got, want, inputs):
    """Two numbers have the same gradients to the inputs, and depend on each of them."""
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().max() > 1e-6
