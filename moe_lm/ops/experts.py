"""Experts: feed-forward networks of two matrices with a ReLU between them and without biases (eq. 1, Appendix C.1).

The references define what is computed. On a CPU, and in float32 on a GPU, a loop of matrix products inside one autograd
node takes a block of experts at a time, so that their rows stay in the cache from the gather of tokens to the sum of
expert outputs; indexing stacked matrices inside autograd would cost a full-size gradient per expert. Only the hidden
activations are kept. A gate's gradient, grad . E(x), is computed as (grad W2^T) . h, which needs no expert outputs.

Shape suffixes: T tokens, A assignments, R rows of a block, D width, H expert hidden, E experts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.operation import operation
from moe_lm.ops.routing import segment_ends, segment_sizes
from moe_lm.thread_pool import run_parallel


@operation
def grouped_mlp(
    x_AD: Tensor,
    expert_A: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,  # noqa: ARG001
) -> Tensor:
    """Return y_AD, each row passed through its expert: y_a = ReLU(x_a W1_e) W2_e with e = `expert_A[a]`.

    `expert_A` is int64 and ascends. The result has the type of x. `recompute` saves memory: the hidden activations h_AH
    are not kept but recomputed in the backward pass, bit for bit (Appendix D). The reference ignores it.
    """
    x = x_AD.to(w1_EDH.dtype).split(segment_sizes(expert_A, len(w1_EDH)).tolist())
    y = [torch.relu(x_RD @ w1_DH) @ w2_HD for x_RD, w1_DH, w2_HD in zip(x, w1_EDH, w2_EHD, strict=True)]
    return torch.cat(y).to(x_AD.dtype) if y else x_AD


@operation
def moe_mlp(
    x_TD: Tensor,
    token_A: Tensor,
    expert_A: Tensor,
    gate_A: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,  # noqa: ARG001
) -> Tensor:
    """Return y_TD, the sum over a token's assignments of gate * ReLU(x W1_e) W2_e (eq. 1).

    Assignments (`token_A`, `expert_A`: int64) ascend by expert; a token without assignments gets zeros. The type of the
    result and `recompute` are as in `grouped_mlp`.
    """
    y_AD = grouped_mlp.reference(x_TD.index_select(0, token_A), expert_A, w1_EDH, w2_EHD) * gate_A.unsqueeze(1)
    return torch.zeros_like(x_TD).index_add(0, token_A, y_AD.to(x_TD.dtype))


def products_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which experts multiply x: the autocast type on a GPU, else the type of x."""
    return torch.get_autocast_dtype("cuda") if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


def _grouped_gemm_fits(x: Tensor, num_rows: int, w1_EDH: Tensor) -> bool:
    """Return whether grouped GEMM applies: autocast on a GPU, rows of a multiple of 16 bytes, and at least one row."""
    _, width, hidden = w1_EDH.shape
    return x.is_cuda and torch.is_autocast_enabled("cuda") and width % 8 == hidden % 8 == 0 and num_rows > 0


_BLOCK_BYTES = 4 << 20
"""Maximum size of a block's hidden activations, unless a single expert has more: they fit into a core's cache, and many
small experts share the cost of the operators between their products."""

_CHUNK_BYTES = 1 << 19
"""Size of the hidden activations that several operators pass over in turn; they fit, with gradients, into a cache."""

_MIN_PARALLEL_WORK = 1 << 29
"""Multiply-adds of a product (some milliseconds) from which the experts are divided among threads."""

_MAX_IMBALANCE = 1.25
"""Largest part of the rows that one thread may have, as a multiple of an equal share."""


class _Block(NamedTuple):
    """Consecutive experts that are computed together, and their rows among all assignments."""

    experts: slice
    rows: slice
    sizes: list[int]
    """Rows of each expert."""


Part = list[_Block]
"""The blocks of one thread."""


def _moe_mlp_in_blocks(
    x_TD: Tensor,
    token_A: Tensor,
    expert_A: Tensor,
    gate_A: Tensor,
    w1_EDH: Tensor,
    w2_EHD: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """Compute `moe_mlp` in the type of the matrices."""
    x, gate_A = x_TD.to(w1_EDH.dtype), gate_A.to(w1_EDH.dtype)
    ends_E = segment_ends(expert_A, len(w1_EDH))
    return _MoEMLP.apply(x, token_A, gate_A, ends_E, w1_EDH, w2_EHD, recompute).to(x_TD.dtype)


def _grouped_mlp_in_blocks(
    x_AD: Tensor, expert_A: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, *, recompute: bool = False
) -> Tensor:
    """Compute `grouped_mlp` in the type of the matrices: each row is a token with a gate of 1."""
    if len(w1_EDH) == 0:
        return x_AD  # there are more processes than experts; this one has no rows either
    token_A = torch.arange(len(x_AD), device=x_AD.device)
    return _moe_mlp_in_blocks(x_AD, token_A, expert_A, w1_EDH.new_ones(len(x_AD)), w1_EDH, w2_EHD, recompute=recompute)


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_A, gate_A, ends_E, w1_EDH, w2_EHD, recompute):
        ctx.parts = _parts(ends_E.tolist(), w1_EDH)
        h_AH = None if recompute else x_TD.new_empty(len(token_A), w1_EDH.shape[2])
        saved = x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD
        y_TD = _sum_of_parts(partial(_add_outputs_, saved), ctx.parts, x_TD)
        ctx.save_for_backward(*saved)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint hands them out a single time
        x_TD, _, gate_A, _, *weights = saved
        grads = torch.empty_like(gate_A), *(torch.empty_like(weight) for weight in weights)
        grad_x_TD = _sum_of_parts(partial(_add_gradients_, saved, grad_TD, grads), ctx.parts, x_TD)
        return grad_x_TD, None, grads[0], None, *grads[1:], None


def _sum_of_parts(add_part_: Callable[[Part, Tensor], None], parts: list[Part], like_TD: Tensor) -> Tensor:
    """Return the sum of what all parts add to zeros, computed in parallel."""
    sums = [torch.zeros_like(like_TD) for _ in parts]
    if len(parts) == 1:
        add_part_(parts[0], sums[0])
        return sums[0]
    run_parallel([partial(add_part_, part, sum_TD) for part, sum_TD in zip(parts, sums, strict=True)])
    for sum_TD in sums[1:]:
        sums[0].add_(sum_TD)
    return sums[0]


@torch.inference_mode()  # operators cost less than under no_grad
def _add_outputs_(saved: Sequence[Tensor], part: Part, y_TD: Tensor) -> None:
    x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD = saved
    buffer_RD = _row_buffer(part, x_TD)
    for block, h_RH in _with_hidden(part, h_AH, w1_EDH):
        token_R = token_A[block.rows]
        x_RD = gather_rows(x_TD, token_R, buffer_RD)
        x, h = x_RD.split(block.sizes), h_RH.split(block.sizes)
        _products(x, w1_EDH[block.experts].unbind(), h)
        h_RH.relu_()
        _products(h, w2_EHD[block.experts].unbind(), x)  # expert outputs overwrite expert inputs
        add_rows_(y_TD, token_R, x_RD.mul_(gate_A[block.rows].unsqueeze(1)))


@torch.inference_mode()
def _add_gradients_(
    saved: Sequence[Tensor], grad_TD: Tensor, grads: Sequence[Tensor], part: Part, grad_x_TD: Tensor
) -> None:
    x_TD, token_A, gate_A, h_AH, w1_EDH, w2_EHD = saved
    grad_gate_A, grad_w1_EDH, grad_w2_EHD = grads
    buffers = _row_buffer(part, x_TD), _row_buffer(part, x_TD)
    hidden = _with_hidden(part, h_AH, w1_EDH), _with_hidden(part, None, w1_EDH)
    for (block, h_RH), (_, grad_h_RH) in zip(*hidden, strict=True):
        token_R, gate_R = token_A[block.rows], gate_A[block.rows]
        x_RD, grad_RD = gather_rows(x_TD, token_R, buffers[0]), gather_rows(grad_TD, token_R, buffers[1])
        x, grad, h, grad_h = (rows.split(block.sizes) for rows in (x_RD, grad_RD, h_RH, grad_h_RH))
        w1, w2 = w1_EDH[block.experts], w2_EHD[block.experts]
        if h_AH is None:
            _products(x, w1.unbind(), h)
            h_RH.relu_()
        _products(grad, w2.mT.unbind(), grad_h)
        hidden_gradient_(grad_h_RH, h_RH, gate_R, grad_gate_A[block.rows])
        grad_RD.mul_(gate_R.unsqueeze(1))
        _products(h_RH.t().split(block.sizes, dim=1), grad, grad_w2_EHD[block.experts].unbind())
        _products(x_RD.t().split(block.sizes, dim=1), grad_h, grad_w1_EDH[block.experts].unbind())
        _products(grad_h, w1.mT.unbind(), x)
        add_rows_(grad_x_TD, token_R, x_RD)


def gather_rows(x_TD: Tensor, token_R: Tensor, buffer_RD: Tensor) -> Tensor:
    """Return the tokens' rows in the first rows of the buffer."""
    return torch.index_select(x_TD, 0, token_R, out=buffer_RD[: len(token_R)])


def add_rows_(y_TD: Tensor, token_R: Tensor, y_RD: Tensor) -> None:
    """Add each row of y_RD to its token's row of y_TD."""
    y_TD.index_add_(0, token_R, y_RD)


def _products(a: Iterable[Tensor], b: Iterable[Tensor], out: Iterable[Tensor]) -> None:
    """Fill each expert's part of `out` with the product of its parts of a and b; zeros if the sum has no terms."""
    for a_expert, b_expert, out_expert in zip(a, b, out, strict=True):
        torch.mm(a_expert, b_expert, out=out_expert)


def hidden_gradient_(grad_RH: Tensor, h_RH: Tensor, gate_R: Tensor, grad_gate_R: Tensor) -> None:
    """Fill each gate's gradient, grad . h, then replace grad by gate * grad where h > 0, else by 0."""
    rows = max(1, len(h_RH) if h_RH.is_cuda else _CHUNK_BYTES // (h_RH.shape[1] * h_RH.element_size()))
    chunks = (x.split(rows) for x in (grad_RH, h_RH, gate_R.unsqueeze(1), grad_gate_R))
    for grad, h, gate, grad_gate in zip(*chunks, strict=True):
        torch.linalg.vecdot(grad, h, out=grad_gate)
        torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad).mul_(gate)


def _parts(ends: list[int], w1_EDH: Tensor) -> list[Part]:
    """Divide the experts among threads; return a single part where dividing them would not be faster."""
    threads, row_bytes = torch.get_num_threads(), w1_EDH.shape[2] * w1_EDH.element_size()
    if w1_EDH.is_cuda or threads == 1 or ends[-1] * w1_EDH[0].numel() < _MIN_PARALLEL_WORK:
        return [_blocks(ends, _BLOCK_BYTES // row_bytes)]
    blocks = _blocks(ends, min(_BLOCK_BYTES // row_bytes, ends[-1] // (4 * threads)))
    parts: list[Part] = [[] for _ in range(threads)]
    for block in blocks:
        middle = (block.rows.start + block.rows.stop) // 2
        parts[min(middle * threads // ends[-1], threads - 1)].append(block)
    largest = max(sum(sum(block.sizes) for block in part) for part in parts)
    # All threads wait for the largest part: if it is too large, they had better share each product.
    return [part for part in parts if part] if largest * threads <= _MAX_IMBALANCE * ends[-1] else [blocks]


def _blocks(ends: list[int], max_rows: int) -> Part:
    """Cut the experts into blocks of at most `max_rows` rows, or of a single expert."""
    blocks, first, start = [], 0, 0
    sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    for expert, end in enumerate(ends, start=1):
        if expert == len(ends) or ends[expert] - start > max_rows:
            blocks.append(_Block(slice(first, expert), slice(start, end), sizes[first:expert]))
            first, start = expert, end
    return blocks


def _row_buffer(part: Part, like_TD: Tensor) -> Tensor:
    """Return memory for the rows of the largest block: every block finds it in the cache."""
    return like_TD.new_empty(max(sum(block.sizes) for block in part), like_TD.shape[1])


def _with_hidden(blocks: list[_Block], h_AH: Tensor | None, w1_EDH: Tensor) -> Iterator[tuple[_Block, Tensor]]:
    """Yield each block with its rows of h_AH or, without h_AH, with a view of a buffer that all blocks share.

    The last bits of a product depend on the alignment of its memory, so each view starts as far past a multiple of
    64 bytes (a cache line, at which PyTorch's allocations begin) as the block's slice of a whole h_AH would.
    """
    if h_AH is not None:
        yield from ((block, h_AH[block.rows]) for block in blocks)
        return
    hidden, line = w1_EDH.shape[2], 64 // w1_EDH.element_size()
    memory = w1_EDH.new_empty(max(sum(block.sizes) for block in blocks) * hidden + line)
    for block in blocks:
        yield block, memory.as_strided((sum(block.sizes), hidden), (hidden, 1), block.rows.start * hidden % line)


grouped_mlp.register(
    "moe_lm.ops.experts_gpu:grouped_mlp",
    when=lambda x_AD, expert_A, w1_EDH, *_, **__: _grouped_gemm_fits(x_AD, len(expert_A), w1_EDH),
)
grouped_mlp.register(_grouped_mlp_in_blocks, when=lambda *_, **__: True)
moe_mlp.register(
    "moe_lm.ops.experts_gpu:moe_mlp",
    when=lambda x_TD, token_A, _expert_A, _gate_A, w1_EDH, *_, **__: _grouped_gemm_fits(x_TD, len(token_A), w1_EDH),
)
moe_mlp.register(_moe_mlp_in_blocks, when=lambda *_, **__: True)
