"""Operations, parameters and FLOPs, counted as the paper counts them (section 5.1, Appendix C.1)."""

from torch import nn


def operations_per_timestep(model: nn.Module) -> int:
    """Return the multiply-adds per token of a language model's forward pass without the softmax (ops/timestep)."""
    return sum(layer.operations_per_timestep() for layer in model.layers.values())


def flops_per_word(model: nn.Module) -> int:
    """Return the training FLOPs per token, the training softmax included.

    A multiply-add is 2 FLOPs, and the backward pass makes two products for each product of the forward pass: 2 * 3.
    """
    return 6 * (operations_per_timestep(model) + model.softmax.operations_per_timestep())


def parameters_without_embedding_and_softmax(model: nn.Module) -> int:
    """Return the number of weights in the layers' matrices; like the paper's figures it excludes biases."""
    return sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)


def parameters_total(model: nn.Module) -> int:
    """Return the number of all parameters."""
    return sum(p.numel() for p in model.parameters())
