"""Adam (Kingma & Ba 2015), the paper's optimizer, with its savings for experts and vocabulary (Appendix D)."""

import torch
from torch import Tensor, nn

from moe_lm.optim import EXPERTS, VOCABULARY, CompositeOptimizer, parameter_groups
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam

_EXPERTS, _VOCABULARY = ("adam", "factored"), ("lazy", "dense")


class Adam:
    """PyTorch's fused Adam, with other rules for experts and vocabulary if chosen.

    `experts=factored` has no first moment and a factored second moment (Appendix D). `vocabulary=lazy` updates only the
    rows of embedding and softmax that a step touches, and has no first moment. The paper gives neither betas nor
    epsilon nor clipping.
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
            raise ValueError(
                f"optimizer: learning_rate={learning_rate} clip_norm={clip_norm} epsilon={epsilon} must be "
                f"positive, beta1={beta1} beta2={beta2} at least 0 and below 1"
            )
        if experts not in _EXPERTS:
            raise ValueError(f"optimizer.experts={experts}: choose {' or '.join(_EXPERTS)}")
        if vocabulary not in _VOCABULARY:
            raise ValueError(f"optimizer.vocabulary={vocabulary}: choose {' or '.join(_VOCABULARY)}")
        self.learning_rate, self.clip_norm = learning_rate, clip_norm
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._rules = {EXPERTS: "dense" if experts == "adam" else experts, VOCABULARY: vocabulary}

    def build(self, model: nn.Module) -> CompositeOptimizer:
        """Return one optimizer per update rule; the groups that modules declare choose the rule."""
        groups, by_rule = parameter_groups(model), {}
        for name, parameter in model.named_parameters():
            by_rule.setdefault(self._rule(groups[name]), []).append(parameter)
        settings = {"lr": self.learning_rate, "beta2": self._beta2, "epsilon": self._epsilon}
        build = {
            "factored": lambda parameters: FactoredAdam(parameters, **settings),
            "lazy": lambda parameters: LazyAdam(parameters, **settings),
            "dense": self._dense,
        }
        return CompositeOptimizer([build[rule](parameters) for rule, parameters in by_rule.items()])

    def gradient_bytes(self, group: str, parameter: Tensor, num_rows: int) -> int:
        """Return the gradient's bytes; for a lazy matrix, the bytes of the touched rows and their numbers (int64)."""
        size = parameter.element_size()
        if self._rule(group) != "lazy":
            return parameter.numel() * size
        return min(num_rows, parameter.shape[0]) * (parameter[0].numel() * size + 8)

    def state_bytes(self, group: str, parameter: Tensor) -> int:
        """Return the bytes of both moments and of the step (float32); a factored moment is a row and a column."""
        numbers = {
            "dense": 2 * parameter.numel(),
            "factored": sum(parameter.numel() // max(1, size) for size in parameter.shape[-2:]),
            "lazy": parameter.numel() + parameter.shape[0],
        }
        return numbers[self._rule(group)] * parameter.element_size() + 4

    def _rule(self, group: str) -> str:
        return self._rules.get(group, "dense")

    def _dense(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        betas = (self._beta1, self._beta2)
        return torch.optim.Adam(parameters, lr=self.learning_rate, betas=betas, eps=self._epsilon, fused=True)
