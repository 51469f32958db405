"""What a training step needs of memory in each process, counted from shapes before anything runs.

Shape suffixes: D width, H expert hidden, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lm.analysis.cost.sizes import BFLOAT16, FLOAT32, Step
from moe_lm.model.language_model import LanguageModel
from moe_lm.ops import grouped_gemm
from moe_lm.optim import EXPERTS, KINDS, VOCABULARY, OptimizerRecipe, kind_of
from moe_lm.parallel.group import Group, shard_rows


@dataclass(frozen=True)
class Held:
    """Bytes that the parameters of one kind take in a process, from step to step and at its end."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes that one number of the model costs."""
        return self.total / max(1, self.parameters)


def held(model: LanguageModel, recipe: OptimizerRecipe, step: Step) -> dict[str, Held]:
    """Return, by kind, what the process with the most experts holds; exact but for the rows that a step touches.

    Of those it counts the most there can be, every token another word; in text they are far fewer. A second copy of
    them, which further micro-batches may need, is in `second_gradient_bytes`.
    """
    sums = {kind: [0, 0, 0, 0] for kind in KINDS}
    for kind, name, parameter, rows in parameters_of(model, step):
        part = _share(model, name, parameter, step)
        weights = part.numel() * part.element_size()
        kept = recipe.keeps_rounded(name) and not step.recompute
        if step.bfloat16 and part.dim() > 1 and (kept or _is_cast(kind, name, part)):
            weights += part.numel() * BFLOAT16  # the copy that the products read
        bytes_ = (part.numel(), weights, recipe.gradient_bytes(name, part, rows), recipe.state_bytes(name, part))
        sums[kind] = [total + more for total, more in zip(sums[kind], bytes_, strict=True)]
    return {kind: Held(*total) for kind, total in sums.items()}


def _is_cast(kind: str, name: str, parameter: Tensor) -> bool:
    """Whether under autocast there is a copy of the parameter, though the optimizer keeps none.

    Of very many experts there is none, where Triton runs: our kernels read them as they are.
    """
    in_kernels = kind == EXPERTS and len(parameter) > grouped_gemm.most_in_torch
    return kind != VOCABULARY and ".lstm." not in name and not in_kernels


def second_gradient_bytes(model: LanguageModel, recipe: OptimizerRecipe, step: Step) -> int:
    """Return what is needed once more while a further micro-batch's gradients are added up.

    That is the gradients of one layer's experts, and of the vocabulary's rows (`moe_lm.ops.sparse_rows` keeps up to twice them).
    """
    if step.micro_tokens >= step.tokens:
        return 0
    parameters = parameters_of(model, step)
    of_rows = sum(recipe.gradient_bytes(name, p, rows) for kind, name, p, rows in parameters if kind == VOCABULARY)
    largest = 0
    for layer in model.layers.values():
        own = [(name, p) for name, p in layer.named_parameters() if kind_of(name) == EXPERTS]
        parts = ((name, share_of_experts(layer, step)(p)) for name, p in own)
        largest = max(largest, sum(recipe.gradient_bytes(name, part, 0) for name, part in parts))
    return largest + of_rows


def activation_bytes(model: LanguageModel, step: Step) -> int:
    """Return what one micro-batch keeps for its backward pass, as torch keeps it on a CPU.

    An estimate: 15 % is what the tests allow it. On a GPU cuDNN keeps other things of an LSTM.
    """
    width = model.embedding_VD.shape[1]
    kept = BFLOAT16 if step.bfloat16 else FLOAT32
    # Each layer's input and the last hidden states; with dropout a factor for each of them.
    stream = (len(model.layers) + 1) * (2 if model.dropout > 0 else 1) * width * FLOAT32
    layers = sum(_kept_by(layer, step, kept) for layer in model.layers.values())
    # The softmax makes its gradients in the forward pass: of the hidden states and of the words' rows.
    softmax = 2 * width * FLOAT32
    return step.micro_tokens * (stream + layers + softmax) + _candidates_bytes(model)


def logits_bytes(model: LanguageModel, step: Step) -> int:
    """Return what one block of the softmax's logits takes while it exists (in training on a CPU often less).

    Where products run in bfloat16 that is a GPU's block, in float32 a CPU's, a sixteenth, where none is asked for.
    """
    candidates = num_candidates(model)
    rows = max(1, model.softmax.most_logits(on_a_gpu=step.bfloat16) // candidates)
    return min(rows, step.micro_tokens) * candidates * FLOAT32


def parameters_of(model: LanguageModel, step: Step) -> Iterator[tuple[str, str, Tensor, int]]:
    """Yield kind, name, parameter and, of the vocabulary's, how many rows a process's step touches at most."""
    for name, parameter in model.named_parameters():
        kind, rows = kind_of(name), 0
        if kind == VOCABULARY:
            rows = step.tokens
            if name.startswith("softmax."):
                rows = rows + num_candidates(model) if samples(model) else len(parameter)
        yield kind, name, parameter, min(rows, len(parameter))


def _share(model: LanguageModel, name: str, parameter: Tensor, step: Step) -> Tensor:
    """What the process with the most rows holds of a parameter."""
    kind = kind_of(name)
    if kind == EXPERTS:
        return share_of_experts(model.layers[name.split(".")[1]], step)(parameter)
    if kind == VOCABULARY and step.divide_vocabulary:
        return parameter[: shard_rows(len(parameter), Group(0, step.num_processes)).size]
    return parameter


def share_of_experts(layer: nn.Module, step: Step) -> Callable[[Tensor], Tensor]:
    """Return what cuts a tensor of one entry an expert to the experts of the process with the most of them."""
    experts = layer.experts
    share = shard_rows(experts.share.total, Group(0, step.expert_processes_of(experts.share.total)), experts.together)
    return lambda tensor_E: tensor_E[: share.size]


def samples(model: LanguageModel) -> bool:
    """Whether the softmax gathers rows; otherwise it reads its matrix where it is."""
    return hasattr(model.softmax, "num_sampled")


def num_candidates(model: LanguageModel) -> int:
    """Words that a token's target is set against in training."""
    vocabulary_size = len(model.embedding_VD)
    return min(model.softmax.num_sampled, vocabulary_size) if samples(model) else vocabulary_size


def _candidates_bytes(model: LanguageModel) -> int:
    """The candidates' rows, where they are gathered, and their gradients."""
    width = model.embedding_VD.shape[1]
    return (2 if samples(model) else 1) * num_candidates(model) * width * FLOAT32


def _kept_by(layer: nn.Module, step: Step, kept: int) -> int:
    """Bytes a token that a layer keeps beside its input."""
    if hasattr(layer, "lstm"):
        return _kept_by_lstm(layer.lstm) * FLOAT32
    if hasattr(layer, "experts"):
        return _kept_by_mixture(layer, step, kept)
    # What each of its matrices gives.
    return sum(matrix.shape[-1] for matrix in layer.parameters() if matrix.dim() > 1) * kept


def _kept_by_lstm(lstm: nn.Module) -> int:
    """Numbers a timestep; measured, as torch's two implementations keep more than the equations need."""
    units = len(lstm.bias_ih_l0) // 4
    if getattr(lstm, "proj_size", 0):
        # Four gates, the cell, its tanh and the output, all of which autograd sees; the projected output.
        return 7 * units + lstm.proj_size
    return 17 * units  # oneDNN's workspace: 15 to 16, and the output


def _kept_by_mixture(layer: nn.Module, step: Step, kept: int) -> int:
    """Of each assignment the hidden layer, elsewhere input and output too; the sigmoid's output; the gates."""
    _, width, hidden = layer.experts.w1_EDH.shape
    rows = layer.assignments_per_token
    # Of experts that are all here neither inputs nor answers are kept.
    all_here = step.expert_processes_of(layer.experts.share.total) == 1
    of_experts = rows * ((0 if all_here else 2 * width) + (0 if step.recompute else hidden)) + width
    # A gate keeps some 5 numbers an expert it chooses among (clean, noise, deviation, ...), 12 an assignment.
    of_gates = 5 * layer.gate.num_experts
    if hasattr(layer, "primary_gate"):
        # The second level reads a row for each group of a token.
        of_gates = 5 * layer.primary_gate.num_experts + layer.groups_per_token * (
            6 * layer.gate.num_experts + width + 12
        )
    return round(of_experts * kept + (of_gates + 12 * rows) * FLOAT32)
