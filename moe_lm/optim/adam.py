"""Adam (Kingma & Ba 2015), the paper's optimizer, with its savings for experts and vocabulary (Appendix D)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_lm.optim import (
    EXPERTS,
    FEED_FORWARD,
    GATES,
    REST,
    VOCABULARY,
    parameter_groups,
    token_shares,
)
from moe_lm.optim.composite import CompositeOptimizer
from moe_lm.optim.factored_adam import FactoredAdam
from moe_lm.optim.lazy_adam import LazyAdam

_EXPERTS, _VOCABULARY = ("adam", "factored"), ("lazy", "dense")
_EQUAL_RATES = dict.fromkeys((EXPERTS, GATES, FEED_FORWARD, VOCABULARY, REST), 1.0)

_HIGHEST_RATE = 1_000_000


class Adam:
    """PyTorch's fused Adam, with other rules for experts and vocabulary if chosen.

    `experts=factored` has no first moment and a factored second moment (Appendix D). `vocabulary=lazy` updates only the
    rows of embedding and softmax that a step touches, and has no first moment. The paper gives neither betas nor
    epsilon nor clipping.

    A parameter group learns at `rates[group]` times the learning rate, experts and gates also at s^`sparsity_exponent`,
    where s is the share of the batch's tokens that one expert receives (k / E of a flat mixture). Adam divides a
    gradient by its own size, noise included. An expert that sees few tokens therefore takes steps as long as those of a
    dense layer, and most of each step is noise. The noise of a mean over n tokens falls only with n^-0.5.

    An `average_decay` above 0 makes evaluations and checkpoints use averaged weights.
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
        rates: Mapping[str, float] = _EQUAL_RATES,
        sparsity_exponent: float = 0.0,
        average_decay: float = 0.0,
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
        for group, rate in rates.items():
            if group not in _EQUAL_RATES:
                raise ValueError(f"optimizer.rates.{group}: the parameter groups are {', '.join(_EQUAL_RATES)}")
            if not 0 <= rate <= _HIGHEST_RATE:
                raise ValueError(f"optimizer.rates.{group}={rate}: must be at least 0 and at most {_HIGHEST_RATE:,}")
        if not any({**_EQUAL_RATES, **rates}.values()):
            raise ValueError("optimizer.rates: all are 0, so that nothing would be learned")
        if not 0 <= sparsity_exponent <= 1:
            raise ValueError(f"optimizer.sparsity_exponent={sparsity_exponent}: must be at least 0 and at most 1")
        if not 0 <= average_decay < 1:
            raise ValueError(f"optimizer.average_decay={average_decay}: must be at least 0 and below 1")
        self.learning_rate, self.clip_norm = learning_rate, clip_norm
        self._rates, self._sparsity_exponent = {**_EQUAL_RATES, **rates}, sparsity_exponent
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._average_decay = average_decay
        self._rules = {EXPERTS: "dense" if experts == "adam" else experts, VOCABULARY: vocabulary}

    def build(self, model: nn.Module) -> CompositeOptimizer:
        """Return one optimizer per update rule; the groups that modules declare choose the rule and the rate."""
        groups, shares, by_rule = parameter_groups(model), token_shares(model), {}
        for name, parameter in model.named_parameters():
            by_rate = by_rule.setdefault(self._rule(groups[name]), {})
            by_rate.setdefault(self._rate(groups[name], shares[name]), []).append(parameter)
        settings = {"lr": self.learning_rate, "beta2": self._beta2, "epsilon": self._epsilon}
        build = {
            "factored": lambda param_groups: FactoredAdam(param_groups, **settings),
            "lazy": lambda param_groups: LazyAdam(param_groups, **settings),
            "dense": self._dense,
        }
        return CompositeOptimizer(
            [
                build[rule]([{"params": parameters, "rate": rate} for rate, parameters in by_rate.items()])
                for rule, by_rate in by_rule.items()
            ],
            self._average_decay,
        )

    def gradient_bytes(self, group: str, parameter: Tensor, num_rows: int) -> int:
        """Return the gradient's bytes; for a lazy matrix, the bytes of the touched rows and their numbers (int64)."""
        size = parameter.element_size()
        if self._rule(group) != "lazy":
            return parameter.numel() * size
        return min(num_rows, parameter.shape[0]) * (parameter[0].numel() * size + 8)

    def state_bytes(self, group: str, parameter: Tensor) -> int:
        """Return the bytes of both moments, of the step (float32) and of the averaged weights.

        A factored moment is a row and a column.
        """
        numbers = {
            "dense": 2 * parameter.numel(),
            "factored": sum(parameter.numel() // max(1, size) for size in parameter.shape[-2:]),
            "lazy": parameter.numel() + parameter.shape[0],
        }
        average = parameter.numel() if self._average_decay > 0 else 0
        return (numbers[self._rule(group)] + average) * parameter.element_size() + 4

    def _rule(self, group: str) -> str:
        return self._rules.get(group, "dense")

    def _rate(self, group: str, token_share: float) -> float:
        sparse = token_share**self._sparsity_exponent if group in (EXPERTS, GATES) else 1.0
        return self._rates[group] * sparse

    def _dense(self, param_groups: list[dict]) -> torch.optim.Adam:
        betas = (self._beta1, self._beta2)
        return torch.optim.Adam(param_groups, lr=self.learning_rate, betas=betas, eps=self._epsilon, fused=True)
