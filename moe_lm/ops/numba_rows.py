"""The loops of `moe_lm.ops.cpu_rows`.

Shape suffixes: T tokens, D width, H expert hidden, R rows.
"""

from torch import Tensor

from moe_lm.ops.compiled import compiled


def add_(y_TD: Tensor, token_R: Tensor, y_RD: Tensor, gate_R: Tensor | None) -> None:
    """Add rows to those of their tokens, weighted where there are gates."""
    if gate_R is None:
        _add(y_TD.numpy(), token_R.numpy(), y_RD.numpy())
    else:
        _add_weighted(y_TD.numpy(), token_R.numpy(), y_RD.numpy(), gate_R.numpy())


def hidden_gradient_(grad_RH: Tensor, h_RH: Tensor, gate_R: Tensor, grad_gate_R: Tensor) -> None:
    """Fill each row's grad . h; make the gradient gate * grad where h > 0, in its place."""
    _mask_and_dot(grad_RH.numpy(), h_RH.numpy(), gate_R.numpy(), grad_gate_R.numpy())


@compiled
def _add(y, token, rows):
    for row in range(len(token)):
        to = y[token[row]]
        for column in range(y.shape[1]):
            to[column] += rows[row, column]


@compiled
def _add_weighted(y, token, rows, gate):
    for row in range(len(token)):
        to, weight = y[token[row]], gate[row]
        for column in range(y.shape[1]):
            to[column] += weight * rows[row, column]


@compiled
def _mask_and_dot(grad, h, gate, grad_gate):
    for row in range(len(gate)):
        weight, dot = gate[row], grad.dtype.type(0)
        for column in range(h.shape[1]):
            value, hidden = grad[row, column], h[row, column]
            dot += value * hidden
            grad[row, column] = 0 if hidden <= 0 else weight * value
        grad_gate[row] = dot
