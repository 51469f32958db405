"""Adam (Kingma & Ba 2015), the paper's optimizer, with its savings for experts and vocabulary (Appendix D)."""

import torch
from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.ops.rounded import keep_rounded_no_longer
from moe_lm.ops.squares import want_squares_no_longer
from moe_lm.optim import EXPERTS, VOCABULARY, CompositeOptimizer, kind_of
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam

_OF_EXPERTS, _OF_VOCABULARY = ("adam", "factored"), ("lazy", "dense")


class Adam:
    """torch's fused Adam; experts by choice without first and with a factored second moment (Appendix D).

    `vocabulary=lazy` updates only the touched rows of embedding and softmax, without first moment. The paper gives
    neither betas nor epsilon nor clipping.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        clip_norm: float,
        experts: str,
        vocabulary: str,
    ):
        if not (learning_rate > 0 and clip_norm > 0 and epsilon > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise UserError(
                f"optimizer: learning_rate={learning_rate} clip_norm={clip_norm} epsilon={epsilon} must be "
                f"positive, beta1={beta1} beta2={beta2} at least 0 and below 1"
            )
        if experts not in _OF_EXPERTS:
            raise UserError(f"optimizer.experts={experts}: choose {' or '.join(_OF_EXPERTS)}")
        if vocabulary not in _OF_VOCABULARY:
            raise UserError(f"optimizer.vocabulary={vocabulary}: choose {' or '.join(_OF_VOCABULARY)}")
        self.learning_rate = learning_rate
        self.clip_norm = clip_norm
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._rules = {EXPERTS: "dense" if experts == "adam" else experts, VOCABULARY: vocabulary}

    def build(self, model: nn.Module) -> CompositeOptimizer:
        """Return the optimizers of all the model's parameters."""
        of_rule: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            keep_rounded_no_longer(parameter)  # as an optimizer before this one may have promised
            want_squares_no_longer(parameter)
            of_rule.setdefault(self._rule(name), []).append(parameter)
        settings = {"lr": self.learning_rate, "beta2": self._beta2, "epsilon": self._epsilon}
        parts = []
        for rule, parameters in of_rule.items():
            if rule == "factored":
                parts.append(FactoredAdam(parameters, **settings))
            elif rule == "lazy":
                parts.append(LazyAdam(parameters, **settings))
            else:
                betas = (self._beta1, self._beta2)
                parts.append(
                    torch.optim.Adam(parameters, lr=self.learning_rate, betas=betas, eps=self._epsilon, fused=True)
                )
        return CompositeOptimizer(parts)

    def gradient_bytes(self, name: str, parameter: Tensor, num_rows: int) -> int:
        """Return the gradient's bytes: of a lazy matrix the touched rows and their numbers (int64)."""
        size = parameter.element_size()
        if self._rule(name) != "lazy":
            return parameter.numel() * size
        return min(num_rows, parameter.shape[0]) * (parameter[0].numel() * size + 8)

    def state_bytes(self, name: str, parameter: Tensor) -> int:
        """Return the bytes of both moments and of the step (float32); of a factored one a row's and a column's."""
        numbers = {
            "dense": 2 * parameter.numel(),
            "factored": sum(parameter.numel() // max(1, size) for size in parameter.shape[-2:]),
            "lazy": parameter.numel() + parameter.shape[0],
        }
        return numbers[self._rule(name)] * parameter.element_size() + 4

    def keeps_rounded(self, name: str) -> bool:
        """Return whether it is updated by factors: a pass of our own, which writes the copy too."""
        return self._rule(name) == "factored"

    def _rule(self, name: str) -> str:
        """Return how this parameter is updated."""
        return self._rules.get(kind_of(name), "dense")
