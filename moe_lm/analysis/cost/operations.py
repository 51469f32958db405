"""Operations, parameters and FLOPs, counted as the paper counts them (section 5.1, Appendix C.1)."""

from moe_lm.model.language_model import LanguageModel


def operations_per_timestep(model: LanguageModel) -> int:
    """Return multiply-adds a token in the forward pass, softmax excluded (Table 7's ops/timestep)."""
    return sum(layer.operations_per_timestep() for layer in model.layers.values())


def flops_per_word(model: LanguageModel) -> int:
    """Return training FLOPs a token: forward and backward with the training softmax, multiply-add = 2.

    The backward pass makes two products for each one of the forward pass, hence 2 * 3.
    """
    return 6 * (operations_per_timestep(model) + model.softmax.operations_per_timestep())


def parameters_without_embedding_and_softmax(model: LanguageModel) -> int:
    """Return the numbers in the layers' matrices; biases are left out, as in the paper's figures."""
    return sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)


def parameters_total(model: LanguageModel) -> int:
    """Return every number the model stores."""
    return sum(p.numel() for p in model.parameters())
