"""The optimizer of a whole model: several PyTorch optimizers as one, and the averaged weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lm.ops.sparse_rows import row_grad


class CompositeOptimizer:
    """Several PyTorch optimizers, each with parameters of its own, as one.

    An optimizer with a `scale` multiplies its gradients by it in its next step, so that clipping needs no pass of its
    own. An optimizer with `norms` returns the norms of gradients that it has to square anyway.

    With an `average_decay` above 0 the weights are averaged after each step (see `WeightAverage`).
    """

    def __init__(self, parts: Sequence[Optimizer], average_decay: float = 0.0):
        self.parts = list(parts)
        self._average = WeightAverage(self.parameters, average_decay) if average_decay > 0 else None

    @property
    def param_groups(self) -> list[dict]:
        """Return the parameter groups of all parts; a group's `rate` is its factor of the learning rate."""
        return [group for part in self.parts for group in part.param_groups]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = learning_rate * group["rate"]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return each parameter's state by name; a parameter without state is left out.

        Read it inside `averaged_weights`, where a checkpoint finds the averages in the parameters.
        """
        found = {parameter: state for part in self.parts for parameter, state in part.state.items()}
        for parameter, state in (self._average.state() if self._average else {}).items():
            found[parameter] = {**found.get(parameter, {}), **state}
        return found

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the parameters hold the averaged weights inside this context, if weights are averaged."""
        if self._average is not None:
            self._average.swap_()
        try:
            yield
        finally:
            if self._average is not None:
                self._average.swap_()

    def load(self, state: Mapping[nn.Parameter, dict[str, Tensor]]) -> None:
        """Restore what `state` returned, given the parameters of the same time."""
        for part in self.parts:
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            known = ((i, without_average(state.get(parameter, {}))) for i, parameter in enumerate(parameters))
            indexed = {i: own for i, own in known if own}
            part.load_state_dict({"state": indexed, "param_groups": part.state_dict()["param_groups"]})
        if self._average is not None:
            self._average.load(state)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all parts."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def norm(self, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """Return the gradient norm of these parameters, by default of all."""
        chosen = self.parameters if parameters is None else list(parameters)
        known: dict[nn.Parameter, Tensor] = {}
        for part in self.parts:
            known |= part.norms(chosen) if hasattr(part, "norms") else {}
        others = _gradients(parameter for parameter in chosen if parameter not in known)
        if not known:
            return nn.utils.get_total_norm(others, foreach=True)
        norms = [*known.values(), *(torch._foreach_norm(others) if others else [])]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the gradient, whose global norm is `norm`, down to `max_norm` if it is longer."""
        factor = 1.0 if norm <= max_norm else max_norm / norm
        for part in self.parts:
            if hasattr(part, "scale"):
                part.scale = factor
            elif factor < 1:  # a factor of 1 would be a pass over all gradients for nothing
                torch._foreach_mul_(_gradients(p for group in part.param_groups for p in group["params"]), factor)

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()
        if self._average is not None:
            self._average.update()

    def zero_grad(self) -> None:
        """Drop all gradients, and a clipping factor that no step has used."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
            if hasattr(part, "scale"):
                part.scale = 1.0


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that exist, dense ones and those of touched rows."""
    both = ((parameter.grad, row_grad(parameter)) for parameter in parameters)
    return [grad for dense, rows in both for grad in (dense, rows and rows.value_UD) if grad is not None]


class WeightAverage:
    """The mean of the weights w_1 ... w_t after each of t updates, in which recent weights count more.

        a_t = sum_s decay^(t - s) w_s / sum_s decay^(t - s)

    This is the averaging of Polyak & Juditsky (1992) with exponential weights. As in Adam's bias-corrected moments, the
    initial values do not count.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        """About the last 1 / (1 - decay) updates count; `decay` is at least 0 and below 1."""
        self._parameters, self._decay, self._updates = list(parameters), decay, 0
        self._averages: list[Tensor] = []
        """One tensor per parameter; empty before the first update. After `swap_` they hold the weights."""

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after one more update."""
        self._updates += 1
        if not self._averages:
            self._averages = [parameter.detach().clone() for parameter in self._parameters]
        weight = (1 - self._decay) / (1 - self._decay**self._updates)
        torch._foreach_lerp_(self._averages, self._parameters, weight)

    @torch.no_grad()
    def swap_(self) -> None:
        """Exchange weights and averages, by value: cuDNN relies on the memory addresses of an LSTM's parameters."""
        for parameter, average in zip(self._parameters, self._averages, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return after `swap_` what goes into a checkpoint besides the averages: `weight` and `updates`."""
        updates = torch.tensor(float(self._updates))
        kept = zip(self._parameters, self._averages, strict=False)
        return {parameter: {"weight": weight, "updates": updates} for parameter, weight in kept}

    @torch.no_grad()
    def load(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Restore what `state` returned, while the parameters hold the averages; afterwards they hold the weights."""
        if not all("weight" in state.get(parameter, {}) for parameter in self._parameters):
            return  # saved before the first update
        self._averages = [state[parameter]["weight"].to(parameter.device) for parameter in self._parameters]
        self._updates = int(state[self._parameters[0]]["updates"])
        self.swap_()


def without_average(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state without the entries of `WeightAverage.state`."""
    return {name: value for name, value in state.items() if name not in ("weight", "updates")}
