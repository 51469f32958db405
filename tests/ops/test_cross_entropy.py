"""Cross-entropy in chunks against PyTorch's, whole and in float64.

Shape suffixes: T tokens, D width, V vocabulary, C candidate words.
"""

import math

import pytest
import torch
from made import Made
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.ops.cross_entropy import candidate_nats, token_nats

NUM_TOKENS, WIDTH, SIZE = 23, 3, 17
CHUNKS = [1, SIZE, 5 * SIZE + 3, 10**9]  # one token at a time (twice), five with a rest, all at once


def make(dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    hidden_TD = (scale * torch.randn(NUM_TOKENS, WIDTH, dtype=dtype)).requires_grad_()
    weight_VD = torch.randn(SIZE, WIDTH, dtype=dtype).requires_grad_()
    bias_V = torch.randn(SIZE, dtype=dtype).requires_grad_()
    return hidden_TD, weight_VD, bias_V, torch.randint(SIZE, (NUM_TOKENS,))


def ours(hidden_TD, weight_VD, bias_V, target_T, chunk_logits):
    true_T = (hidden_TD * weight_VD[target_T]).sum(dim=1) + bias_V[target_T]
    return candidate_nats(hidden_TD, weight_VD, bias_V, true_T, target_T, chunk_logits)


class Sizes(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("chunk_logits", CHUNKS)
def test_sum_and_gradients_are_pytorchs(chunk_logits):
    """The sum and its gradients in hidden, weight and bias equal PyTorch's cross-entropy in float64."""
    *inputs, target_T = make()
    got = ours(*inputs, target_T, chunk_logits)
    want = F.cross_entropy(inputs[0] @ inputs[1].t() + inputs[2], target_T, reduction="sum")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(
        torch.autograd.grad(2.5 * got, inputs), torch.autograd.grad(2.5 * want, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk_logits", CHUNKS)
def test_token_nats_are_pytorchs(chunk_logits):
    """Each token's nats equal PyTorch's, in float64."""
    *inputs, target_T = make()
    want_T = F.cross_entropy(inputs[0] @ inputs[1].t() + inputs[2], target_T, reduction="none")
    torch.testing.assert_close(token_nats(*inputs, target_T, chunk_logits), want_T.detach())
    single_T = token_nats(*(x.float() for x in inputs), target_T, chunk_logits)
    assert single_T.dtype == torch.float64
    torch.testing.assert_close(single_T, want_T.detach(), rtol=1e-5, atol=1e-5)


def test_a_candidate_that_is_the_true_word_is_left_out():
    """The true word's own logit replaces its column; without a column (-1) it stands beside all candidates."""
    logits_TC = [[math.log(2), math.log(3), math.log(4)]] * 2
    nats = candidate_nats(
        torch.ones(2, 1, dtype=torch.float64),
        torch.tensor(logits_TC[0], dtype=torch.float64)[:, None],
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([5.0, 5.0], dtype=torch.float64).log(),
        torch.tensor([1, -1]),
        10**6,
    )
    # 5 / (2 + 5 + 4), and 5 / (2 + 3 + 4 + 5)
    assert nats.item() == pytest.approx(math.log(11 / 5) + math.log(14 / 5), rel=1e-12)


def test_a_lone_candidate_that_is_the_true_word_costs_nothing():
    """If the only candidate is the true word, its probability is 1 and every gradient 0."""
    inputs = [torch.randn(2, 3).requires_grad_(), torch.randn(1, 3).requires_grad_(), torch.zeros(1).requires_grad_()]
    true_T = torch.randn(2).requires_grad_()
    nats = candidate_nats(*inputs, true_T, torch.tensor([0, 0]), 100)
    assert nats.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(nats, [*inputs, true_T]))


def test_huge_logits_stay_finite():
    """Logits of thousands overflow no exponential, in value or gradient, in float32."""
    *inputs, target_T = make(torch.float32, scale=3000.0)
    got = ours(*inputs, target_T, 5 * SIZE)
    want = F.cross_entropy((inputs[0].double() @ inputs[1].double().t() + inputs[2]), target_T, reduction="sum")
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got, inputs))
    exact = token_nats(*inputs, target_T, 5 * SIZE).sum().item()
    assert exact == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("chunk_logits", CHUNKS)
def test_no_tokens_are_zero_nats(chunk_logits):
    """An empty micro-batch sums to 0 and has gradients of 0."""
    inputs = [torch.zeros(0, 3).requires_grad_(), torch.ones(5, 3).requires_grad_(), torch.ones(5).requires_grad_()]
    nats = ours(*inputs, torch.zeros(0, dtype=torch.int64), chunk_logits)
    assert nats.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(nats, inputs))
    assert token_nats(*inputs, torch.zeros(0, dtype=torch.int64), chunk_logits).shape == (0,)


@pytest.mark.parametrize("exact", [False, True], ids=["summed", "exact"])
def test_logits_never_exist_all_at_once(exact):
    """With 200 tokens, 300 words and chunk_logits = 3,000 no operation makes more than 3,000 numbers."""
    inputs = [torch.randn(200, 2).requires_grad_(), torch.randn(300, 2).requires_grad_(), torch.zeros(300)]
    target_T = torch.randint(300, (200,))
    with Sizes() as sizes:
        if exact:
            token_nats(*inputs, target_T, 3000)
        else:
            ours(*inputs, target_T, 3000).backward()
    assert 300 < sizes.largest <= 3000


@pytest.mark.parametrize("chunk_logits", [34, 47, 48, 200])
def test_whole_cache_lines_stay_within_chunk_logits(chunk_logits):
    """33 words and the true one take 34 columns, or 48 in three lines if they fit; the sum is PyTorch's."""
    hidden_TD, weight_VD, bias_V = torch.randn(7, 2), torch.randn(33, 2), torch.randn(33)
    target_T = torch.randint(33, (7,))
    want = F.cross_entropy(hidden_TD.double() @ weight_VD.double().t() + bias_V, target_T, reduction="sum")
    for exact in (False, True):
        with Sizes() as sizes:
            got = (token_nats if exact else ours)(hidden_TD, weight_VD, bias_V, target_T, chunk_logits).sum()
        assert sizes.largest <= max(chunk_logits, weight_VD.numel())
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_exact_evaluation_of_few_words_is_one_product_a_chunk():
    """33 words are one product, not one of 32 words and one of the last word."""
    hidden_TD, weight_VD, bias_V = torch.randn(200, 2), torch.randn(33, 2), torch.zeros(33)
    with Made() as made:
        token_nats(hidden_TD, weight_VD, bias_V, torch.zeros(200, dtype=torch.int64), 100_000)
    assert made.calls[torch.ops.aten.addmm.out] == 1


def test_on_a_cpu_a_chunk_in_training_has_at_most_512_tokens():
    """1,200 tokens and 30 words, in two cache lines, take 512 rows at a time; the sum is right."""
    hidden_TD, weight_VD, bias_V = torch.randn(1200, 2), torch.randn(30, 2), torch.zeros(30)
    target_T = torch.randint(30, (1200,))
    with Sizes() as sizes:
        got = ours(hidden_TD, weight_VD, bias_V, target_T, 10**9)
    assert sizes.largest == 512 * 32
    want = F.cross_entropy(hidden_TD.double() @ weight_VD.double().t(), target_T, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_nats_of_improbable_words_are_right():
    """Far below float32's smallest probability, about it, above it, and NaN; with a candidate left out or not."""
    torch.manual_seed(0)
    hidden_TD, weight_CD, bias_C = torch.randn(9, 4), torch.randn(30, 4), torch.randn(30)
    true_T = torch.tensor([0.0, -50.0, -65.0, -69.0, -80.0, -95.0, -1e3, -1e9, torch.nan])
    hit_T = torch.tensor([3, -1, 4, 29, 0, -1, 7, 8, 9])
    logits_TC = hidden_TD.double() @ weight_CD.double().t() + bias_C.double()
    logits_TC[hit_T >= 0, hit_T[hit_T >= 0]] = -torch.inf
    want_T = -torch.cat([logits_TC, true_T.double().unsqueeze(1)], dim=1).log_softmax(dim=1)[:, -1]
    for t in range(9):
        one = slice(t, t + 1)
        leaves = [x.clone().requires_grad_() for x in (hidden_TD[one], weight_CD, bias_C, true_T[one])]
        total = candidate_nats(*leaves, hit_T[one], 1000)
        torch.testing.assert_close(total, want_T[t], rtol=1e-6, atol=2e-6, equal_nan=True)
        assert all(x.isfinite().all() == (t < 8) for x in torch.autograd.grad(total, leaves))
    both = candidate_nats(hidden_TD[:8], weight_CD, bias_C, true_T[:8], hit_T[:8], 1000)
    torch.testing.assert_close(both, want_T[:8].sum(), rtol=1e-6, atol=0)


def test_bfloat16_products_change_little_and_keep_float32_gradients():
    """Under bfloat16 autocast sum and gradients agree with float32 to bfloat16's three digits."""
    *inputs, target_T = make(torch.float32)
    want = ours(*inputs, target_T, 5 * SIZE)
    wanted = torch.autograd.grad(want, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(*inputs, target_T, 5 * SIZE)
    given = torch.autograd.grad(got, inputs)
    assert got.item() == pytest.approx(want.item(), rel=0.01)
    assert got.item() != want.item()
    for mine, theirs in zip(given, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_the_references_are_the_versions():
    """The plain references, which hold all logits, give the same values and gradients, candidates left out or not."""
    *inputs, target_T = make()
    true_T = torch.randn(NUM_TOKENS, dtype=torch.float64, requires_grad=True)
    hit_T = torch.where(torch.arange(NUM_TOKENS) % 3 == 0, -1, target_T)
    results = []
    for version in (candidate_nats, candidate_nats.reference):
        total = version(*inputs, true_T, hit_T, 5 * SIZE)
        assert total.dtype == torch.float64
        results.append([total, *torch.autograd.grad(total, [*inputs, true_T])])
    results.append([token_nats(*inputs, target_T, 5 * SIZE)])
    results.append([token_nats.reference(*inputs, target_T, 5 * SIZE)])
    for pair in (results[:2], results[2:]):
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs)
