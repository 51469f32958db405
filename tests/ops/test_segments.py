"""Order, ends, sizes and sums of segments, by PyTorch's operators and by Triton's interpreter.

Shape suffixes: A rows, S segments, D width.
"""

import pytest
import torch
from row_cases import SEGMENTS

from moe_lm.gate import Gating
from moe_lm.ops import routing as segments


@pytest.fixture(params=["torch", "triton"])
def version(request):
    """Which version computes the sums."""
    if request.param == "triton":
        request.getfixturevalue("triton_on_cpu")
    return request.param


@pytest.mark.parametrize("bound", [1, 2**15, 2**15 + 1, 2**31, 2**31 + 1, 2**40])
def test_sorted(bound):
    """Numbers at both ends of the range are sorted; equal ones keep their order."""
    x_A = torch.tensor([bound - 1, 0, bound // 2, bound - 1, 0])
    sorted_A, order_A = segments.stable_sort_below(x_A, bound)
    want = sorted(range(5), key=lambda place: (int(x_A[place]), place))
    assert order_A.tolist() == want
    assert sorted_A.tolist() == [int(x_A[place]) for place in want]
    assert sorted_A.dtype == torch.int64


def numbers(counts):
    """Return the segment of each row."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))


def test_ends_and_sizes():
    """Ends and sizes are right, also of empty segments and of no segments."""
    for counts in SEGMENTS:
        segment_A = numbers(counts)
        assert segments.segment_sizes(segment_A, len(counts)).tolist() == counts
        assert segments.segment_ends(segment_A, len(counts)).tolist() == torch.tensor(counts).cumsum(0).tolist()


@pytest.mark.parametrize("width", [(5,), ()], ids=["rows", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums(dtype, width, version):
    """A segment's sum is that of its rows, zeros without rows; a row's gradient is its segment's."""
    torch.manual_seed(0)
    by_kernel = version == "triton" and dtype == torch.float32
    for counts in [*SEGMENTS, [2050, 0, 1]]:
        segment_A = numbers(counts)
        x = torch.randn(len(segment_A), *width, dtype=dtype, requires_grad=True)
        total = segments.segment_sum(x, segment_A, len(counts))
        assert (total.dtype, total.shape) == (dtype, (len(counts), *width))
        assert ("_SegmentSum" in total.grad_fn.name()) == by_kernel
        for own, part in zip(total, x.split(counts), strict=True):
            torch.testing.assert_close(own.double(), part.double().sum(dim=0), rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(total)
        total.backward(grad)
        torch.testing.assert_close(x.grad, grad[segment_A])


def test_more_than_16_bits():
    """More experts than 16 bits can number are sorted by all their bits."""
    gating = Gating.from_choices(torch.tensor([[39_999], [7_231]]), torch.ones(2, 1), 40_000)
    assert gating.expert_A.tolist() == [7_231, 39_999]
    assert gating.token_A.tolist() == [1, 0]
