"""What a model's gates need of the balance losses, and what they look at in training."""

from collections.abc import Iterator, Mapping

from omegaconf import OmegaConf
from torch import nn

from moe_lm.cli.config import choices, folder
from moe_lm.cli.machine import build
from moe_lm.errors import UserError
from moe_lm.loss.balance import BalanceLoss
from moe_lm.model.language_model import LanguageModel


def gates_of(model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the configuration key of each gate, as model.layers.middle.gate, and the gate."""
    for name, layer in model.layers.items():
        for part in ("primary_gate", "gate"):
            if hasattr(layer, part):
                yield f"model.layers.{name}.{part}", getattr(layer, part)


def check_losses(model: LanguageModel, balance: Mapping[str, BalanceLoss]) -> None:
    """Refuse a gate that would never learn what it needs at evaluation, and a loss that would teach no gate."""
    for key, gate in gates_of(model):
        needed = getattr(gate, "needs_loss", None)
        if needed is not None and needed not in balance:
            chosen = ",".join([*(name for name in balance if _teaches(model, balance[name])), needed])
            raise UserError(f"the gate {key} learns by the balance loss {needed}: 'balance=[{chosen}]'")
        if needed is not None and balance[needed].weight == 0:
            raise UserError(f"balance.{needed}.weight=0: the gate {key} learns by this loss alone")
    if not any(hasattr(layer, "differentiable_stats") for layer in model.layers.values()):
        return  # a dense model's losses are idle, all of them
    for name, loss in balance.items():
        if not _teaches(model, loss):
            kept = ",".join(other for other in balance if _teaches(model, balance[other]))
            keys = " and ".join(key for key, _ in gates_of(model))
            raise UserError(
                f"the balance loss {name} has no gradient for {keys}: 'balance=[{kept}]' leaves it out; "
                f"there {_offered(model)}"
            )


def want(model: LanguageModel, balance: Mapping[str, BalanceLoss]) -> None:
    """Let the gates make no statistics but those that a loss reads."""
    for _, gate in gates_of(model):
        gate.required_stats = frozenset(loss.stat for loss in balance.values())


def non_causal_notes(model: LanguageModel) -> Iterator[str]:
    """Yield a line for each gate whose choice in training depends on other tokens than the one it is for."""
    for key, gate in gates_of(model):
        told = getattr(gate, "non_causal_note", None)
        if told is not None:
            yield f"{key}, not causal in training: it {told}, and so do all perplexities"


def _teaches(model: LanguageModel, loss: BalanceLoss) -> bool:
    return any(
        loss.stat in layer.differentiable_stats
        for layer in model.layers.values()
        if hasattr(layer, "differentiable_stats")
    )


def _offered(model: LanguageModel) -> str:
    """Say which of the losses that there are would teach a gate of this model."""
    names = []
    for name in choices("balance"):
        [part] = _yaml(name).values()
        names += [name] if _teaches(model, build(part)) else []
    return f"may be {', '.join(names)}" if names else "is none that would"


def _yaml(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(folder() / "balance" / f"{name}.yaml"))
