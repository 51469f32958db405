"""Checks that a model's gates and balance losses fit together, and notes on gates that are not causal in training."""

from collections.abc import Iterator, Mapping

from omegaconf import OmegaConf

from moe_lm.cli.machine import build
from moe_lm.config_files import choices, folder
from moe_lm.errors import UserError
from moe_lm.gate import Gate
from moe_lm.loss.objective import BalanceLoss
from moe_lm.model.language_model import LanguageModel


def gates_of(model: LanguageModel) -> Iterator[tuple[str, Gate]]:
    """Yield the configuration key of each gate, such as model.layers.middle.gate, and the gate."""
    for name, layer in model.layers.items():
        for part, gate in layer.gates().items():
            yield f"model.layers.{name}.{part}", gate


def check_losses(model: LanguageModel, balance: Mapping[str, BalanceLoss]) -> None:
    """Raise `UserError` for a gate without the loss that it learns by, and for a loss that no gate learns from."""
    gates = dict(gates_of(model))
    for key, gate in gates.items():
        needed = gate.needs_loss
        if needed is not None and needed not in balance:
            chosen = ",".join([*(name for name in balance if _teaches(model, balance[name])), needed])
            raise UserError(f"the gate {key} learns by the balance loss {needed}: 'balance=[{chosen}]'")
        if needed is not None and balance[needed].weight == 0:
            raise UserError(f"balance.{needed}.weight=0: the gate {key} learns by this loss alone")
    if not gates:
        return  # a dense model ignores all balance losses
    for name, loss in balance.items():
        if not _teaches(model, loss):
            kept = ",".join(other for other in balance if _teaches(model, balance[other]))
            raise UserError(
                f"the balance loss {name} has no gradient for {' and '.join(gates)}: 'balance=[{kept}]' leaves it out; "
                f"{_alternatives(model)}"
            )


def require_statistics(model: LanguageModel, balance: Mapping[str, BalanceLoss]) -> None:
    """Make the gates compute only the statistics that a balance loss reads."""
    for _, gate in gates_of(model):
        gate.required_stats = frozenset(loss.stat for loss in balance.values())


def non_causal_notes(model: LanguageModel) -> Iterator[str]:
    """Yield a line for each gate whose choice for a token depends on other tokens in training."""
    for key, gate in gates_of(model):
        if gate.non_causal_note is not None:
            yield f"{key}, not causal in training: it {gate.non_causal_note}, and all perplexities use that rule"


def _teaches(model: LanguageModel, loss: BalanceLoss) -> bool:
    return any(loss.stat in layer.differentiable_stats for layer in model.layers.values())


def _alternatives(model: LanguageModel) -> str:
    """Return the end of a message: which balance losses would teach a gate of this model."""
    names = []
    for name in choices("balance"):
        [part] = OmegaConf.to_container(OmegaConf.load(folder() / "balance" / f"{name}.yaml")).values()
        names += [name] if _teaches(model, build(part)) else []
    return f"losses with a gradient are {', '.join(names)}" if names else "no loss has one"
