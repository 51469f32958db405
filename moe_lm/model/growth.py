"""Growth: a model with a mixture starts from one with fewer experts, or with a dense layer in place of the mixture.

Each expert is copied together with its gate column, as in sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055).

Shape suffixes: D width, H expert hidden, E experts, G groups, S experts of a group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.moe import Mixture


@dataclass(frozen=True)
class Origin:
    """How a tensor of the larger model is copied from one of the smaller model."""

    name: str
    """Name of the smaller tensor."""
    index: Mapping[int, Tensor] = field(default_factory=dict)
    """By dimension, the numbers of the parts that are copied, in order."""
    reshape: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Brings the smaller tensor into the larger one's dimensions."""
    scale: float = 1.0
    """Factor of a weight, though not of its optimizer state."""
    tied: bool = False
    """Whether these are columns of W_g of which several are equal."""

    def copy(self, tensor: Tensor, rows: range | None = None) -> Tensor:
        """Return the larger tensor, or only these rows of it; a scalar of the optimizer's state stays as it is."""
        if tensor.dim() == 0:
            return tensor
        tensor, index = self.reshape(tensor), dict(self.index)
        if rows is not None:
            index[0] = index.get(0, torch.arange(len(tensor)))[rows.start : rows.stop]
        for dim, chosen in index.items():
            tensor = tensor.index_select(dim, chosen)
        return tensor


def grows(smaller: nn.Module, larger: nn.Module) -> bool:
    """Return whether the models have different mixtures: in other layers, or of other numbers of experts."""
    return _mixtures(smaller) != _mixtures(larger)


@torch.no_grad()
def grow_(
    larger: nn.Module, smaller: nn.Module, rows: Mapping[str, range], *, noise: float, generator: torch.Generator
) -> dict[str, Origin]:
    """Copy all weights and clone experts; return the origins. `rows` names those that are held of sharded tensors.

    Cloned columns of W_g get noise, of a deviation of `noise` times the column's root mean square, so that they do not
    tie. A gate that the smaller model lacks keeps its weights. Raises ValueError if the models do not fit.
    """
    found, before = origins(smaller, larger), smaller.state_dict()
    for name, target in larger.state_dict().items():
        origin = found.get(name)
        if origin is None:
            continue
        grown = origin.copy(before[origin.name], rows.get(name)) if origin.name in before else None
        if grown is None or grown.shape != target.shape:
            raise ValueError(f"it has no {name} of this size")
        grown = grown * origin.scale
        if origin.tied and name.endswith(".gate_DE"):
            size = grown.square().mean(dim=-2, keepdim=True).sqrt()
            grown += noise * size * torch.randn(grown.shape, generator=generator)
        target.copy_(grown)
    return found


def has_dense_origin(found: Mapping[str, Origin]) -> bool:
    """Return whether experts are copied from a dense layer."""
    return any(".experts." in name and ".experts." not in origin.name for name, origin in found.items())


def origins(smaller: nn.Module, larger: nn.Module) -> dict[str, Origin]:
    """Return the origin of each tensor of the larger model's `state_dict`, except of gates that the smaller one lacks.

    Raises ValueError if a layer cannot grow into the larger one.
    """
    found = {name: Origin(name) for name in larger.state_dict()}
    for layer_name, layer in larger.layers.items():
        if not isinstance(layer, Mixture):
            continue
        prefix = f"layers.{layer_name}."
        before = dict(smaller.layers).get(layer_name)
        try:
            copied = _of_dense(before, layer) if isinstance(before, FeedForward) else _of_mixture(before, layer)
        except ValueError as error:
            raise ValueError(f"layer {layer_name} {error}") from error
        for name in _grown_tensors(layer):
            del found[prefix + name]
        found |= {prefix + name: replace(origin, name=prefix + origin.name) for name, origin in copied.items()}
    return found


def _mixtures(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: _groups_and_size(layer) for name, layer in model.layers.items() if isinstance(layer, Mixture)}


def _groups_and_size(layer: Mixture) -> tuple[int, int]:
    """Return the number of groups, 1 for a flat mixture, and of the experts in each."""
    gates = layer.gates()
    groups = gates["primary_gate"].num_experts if "primary_gate" in gates else 1
    return groups, layer.experts.num_experts // groups


def _grown_tensors(layer: Mixture) -> list[str]:
    """Return the names, within the layer, of the tensors of experts and gates; shared experts do not grow."""
    return [name for name in layer.state_dict() if name.partition(".")[0] in ("experts", *layer.gates())]


def _of_mixture(smaller: nn.Module | None, larger: Mixture) -> dict[str, Origin]:
    """Clone groups and the experts in each: expert j of group g copies expert j mod S of group g mod G."""
    if not isinstance(smaller, Mixture):
        raise ValueError("is neither a mixture nor a dense layer there")
    (groups, size), (new_groups, new_size) = _groups_and_size(smaller), _groups_and_size(larger)
    if new_groups % groups or new_size % size or smaller.gates().keys() - larger.gates().keys():
        raise ValueError(f"has {_counted(smaller)} there, of which {_counted(larger)} are no multiple")
    for name, gate in smaller.gates().items():
        if type(gate) is not type(larger.gates()[name]):
            raise ValueError("has another gate there")
    group_G, place_S = torch.arange(new_groups) % groups, torch.arange(new_size) % size
    expert_E = (group_G[:, None] * size + place_S).flatten()
    found = {name: Origin(name, {0: expert_E}) for name in ("experts.w1_EDH", "experts.w2_EHD")}
    for name, tensor in larger.gate.state_dict(prefix="gate.").items():
        if tensor.dim() == 1:
            found[name] = Origin(name, {0: expert_E})
        elif tensor.dim() == 2:
            found[name] = Origin(name, {1: place_S}, tied=new_size > size)
        else:
            stack = {} if "primary_gate" in smaller.gates() else {"reshape": lambda matrix: matrix.unsqueeze(0)}
            found[name] = Origin(name, {0: group_G, 2: place_S}, tied=new_size > size, **stack)
    if "primary_gate" in smaller.gates():
        for name, tensor in larger.primary_gate.state_dict(prefix="primary_gate.").items():
            found[name] = Origin(name, {tensor.dim() - 1: group_G}, tied=new_groups > groups)
    return found


def _of_dense(smaller: FeedForward, larger: Mixture) -> dict[str, Origin]:
    """Cut the dense layer's hidden units into as many parts as an expert fits in; expert i copies part i mod parts.

    A part's outputs are scaled by the number of parts: gate values sum to one, the parts of the dense layer do not.
    """
    hidden = larger.experts.hidden
    parts = smaller.weights[0].shape[1] // hidden
    if len(smaller.weights) != 2 or parts * hidden != smaller.weights[0].shape[1]:
        sizes = [weight.shape[1] for weight in smaller.weights[:-1]]
        raise ValueError(
            f"has dense layers of {sizes} hidden units there: experts of {hidden} need a single one of a multiple"
        )
    part_E = torch.arange(larger.experts.num_experts) % parts
    return {
        "experts.w1_EDH": Origin("weights.0", {0: part_E}, lambda w: w.unflatten(1, (parts, hidden)).movedim(1, 0)),
        "experts.w2_EHD": Origin("weights.1", {0: part_E}, lambda w: w.unflatten(0, (parts, hidden)), scale=parts),
    }


def _counted(layer: Mixture) -> str:
    groups, size = _groups_and_size(layer)
    return f"{groups} groups of {size} experts" if "primary_gate" in layer.gates() else f"{size} experts"
