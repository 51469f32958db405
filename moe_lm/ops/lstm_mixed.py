"""The LSTM on a GPU with 16-bit products and float32 cells, for one layer and one direction, from a zero state.

Shape suffixes: L timesteps, B sentences, D inputs, U units, K = D + U, G = 4 U gates.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.ops.operation import triton_runs

_MIN_SENTENCES_MIXED = 3072
"""With fewer sentences a GPU finishes a timestep before the host has launched the next, and cuDNN launches faster."""


def lstm(
    x_LBD: Tensor,
    weight_ih_GD: Tensor,
    weight_hh_GU: Tensor,
    bias_ih_G: Tensor,
    bias_hh_G: Tensor,
    *,
    training: bool,  # noqa: ARG001
) -> Tensor:
    """Compute `moe_lm.model.lstm.lstm` with products in the autocast type."""
    weights = weight_ih_GD, weight_hh_GU, bias_ih_G, bias_hh_G
    dtype = torch.get_autocast_dtype(x_LBD.device.type)
    return lstm_mixed(x_LBD, *weights, dtype).to(weight_ih_GD.dtype)


def is_faster(x_LBD: Tensor, *_: Tensor, **__: bool) -> bool:
    """Return whether this LSTM is faster than cuDNN's: under autocast, with many sentences side by side."""
    autocast = torch.is_autocast_enabled(x_LBD.device.type)
    return autocast and x_LBD.shape[1] >= _MIN_SENTENCES_MIXED and triton_runs(x_LBD)


def lstm_mixed(
    x_LBD: Tensor, weight_ih_GD: Tensor, weight_hh_GU: Tensor, bias_ih_G: Tensor, bias_hh_G: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return every timestep's outputs (L, B, U) in `dtype`, the type of the products; cells are float32.

    cuDNN computes either in float32 throughout, on tensor cores as TF32, or in 16 bits throughout. Here a timestep is
    one product, of its inputs and the previous outputs side by side, and one kernel; one product over all timesteps
    gives the gradient of the weights, summed in float32.
    """
    return _MixedLstm.apply(x_LBD, weight_ih_GD, weight_hh_GU, bias_ih_G, bias_hh_G, dtype)


class _MixedLstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_LBD, weight_ih_GD, weight_hh_GU, bias_ih_G, bias_hh_G, dtype):
        from moe_lm.ops.triton import lstm as kernels  # Triton is not installed everywhere, and slow to import

        (num_steps, num_sentences, num_inputs), num_units = x_LBD.shape, weight_hh_GU.shape[1]
        weight_GK = torch.cat([weight_ih_GD, weight_hh_GU], dim=1).to(dtype)
        bias_G = (bias_ih_G + bias_hh_G).float()
        # A timestep's inputs stand beside the previous outputs.
        xh_LBK = x_LBD.new_empty(num_steps + 1, num_sentences, num_inputs + num_units, dtype=dtype)
        xh_LBK[:-1, :, :num_inputs] = x_LBD
        xh_LBK[0, :, num_inputs:] = 0
        h_LBU = xh_LBK[1:, :, num_inputs:]
        z_LBG = x_LBD.new_empty(num_steps, num_sentences, 4 * num_units, dtype=dtype)
        c_LBU = x_LBD.new_empty(num_steps, num_sentences, num_units, dtype=torch.float32)
        before = None
        for xh, z, c, h in zip(xh_LBK, z_LBG, c_LBU, h_LBU, strict=False):
            kernels.forward_(_product(xh, weight_GK.t()), bias_G, before, z, c, h)
            before = c
        ctx.save_for_backward(xh_LBK, z_LBG, c_LBU, weight_GK)
        ctx.types = [x.dtype for x in (x_LBD, weight_ih_GD, weight_hh_GU, bias_ih_G, bias_hh_G)]
        return h_LBU.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LBU):
        from moe_lm.ops.triton import lstm as kernels

        xh_LBK, z_LBG, c_LBU, weight_GK = ctx.saved_tensors
        grad_LBU = grad_LBU.contiguous()
        num_inputs = weight_GK.shape[1] - grad_LBU.shape[2]
        grad_z_LBG, grad_xh_LBK = torch.empty_like(z_LBG), torch.empty_like(xh_LBK[1:])
        grad_c_BU, grad_h_BU = torch.empty_like(c_LBU[0]), None
        for step in reversed(range(len(c_LBU))):
            before = c_LBU[step - 1] if step else None
            gates = grad_z_LBG[step]
            kernels.backward_(grad_LBU[step], grad_h_BU, z_LBG[step], c_LBU[step], before, grad_c_BU, gates)
            grad_h_BU = torch.mm(gates, weight_GK, out=grad_xh_LBK[step])[:, num_inputs:]
        grad_z_TG = grad_z_LBG.flatten(0, 1)
        grad_weight_GK = _product(grad_z_TG.t(), xh_LBK[:-1].flatten(0, 1))
        grad_bias_G = grad_z_TG.sum(dim=0, dtype=torch.float32)
        grads = grad_xh_LBK[:, :, :num_inputs], *grad_weight_GK.split([num_inputs, grad_LBU.shape[2]], dim=1)
        return *(g.to(t) for g, t in zip((*grads, grad_bias_G, grad_bias_G), ctx.types, strict=True)), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # on a CPU `torch.mm` has no `out_dtype`
