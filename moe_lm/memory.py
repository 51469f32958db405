"""What a training step needs in each process: memory, and bytes sent; counted from shapes before anything runs.

Shape suffixes: D width, H expert hidden, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lm.mistake import Mistake
from moe_lm.model import LanguageModel
from moe_lm.optimizer import EXPERTS, KINDS, VOCABULARY, OptimizerRecipe, kind_of

FLOAT32, BFLOAT16, INT64 = 4, 2, 8


@dataclass(frozen=True)
class Step:
    """The sizes of one update; raises `Mistake` for ones that cannot be."""

    words: int
    """Of the global batch."""
    micro_words: int
    """That pass through the model together, in each process."""
    num_processes: int = 1
    recompute: bool = False
    """Whether experts' hidden activations are made anew in the backward pass."""
    bfloat16: bool = False
    """Whether products run in bfloat16; else everything is float32."""

    def __post_init__(self):
        if not 1 <= self.micro_words <= self.words:
            raise Mistake(
                f"batch.words={self.words} batch.micro_words={self.micro_words}: need 1 <= micro_words <= words"
            )
        if self.num_processes < 1:
            raise Mistake(f"num_processes={self.num_processes}: must be at least 1")
        if self.num_processes > self.words:
            raise Mistake(f"num_processes={self.num_processes}: more processes than batch.words={self.words}")

    @property
    def tokens(self) -> int:
        """Tokens of a process in a step."""
        return math.ceil(self.words / self.num_processes)

    @property
    def micro_tokens(self) -> int:
        """Tokens of a process that pass through the model together."""
        return min(self.micro_words, self.tokens)


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
    for kind, name, parameter, rows in _parameters(model, step):
        part = _share(parameter, step) if kind == EXPERTS else parameter
        weights = part.numel() * part.element_size()
        if step.bfloat16 and kind != VOCABULARY and part.dim() > 1 and ".lstm." not in name:
            weights += part.numel() * BFLOAT16  # the copy that the products read
        bytes_ = (part.numel(), weights, recipe.gradient_bytes(name, part, rows), recipe.state_bytes(name, part))
        sums[kind] = [total + more for total, more in zip(sums[kind], bytes_, strict=True)]
    return {kind: Held(*total) for kind, total in sums.items()}


def second_gradient_bytes(model: LanguageModel, recipe: OptimizerRecipe, step: Step) -> int:
    """Return what is needed once more while a further micro-batch's gradients are added up.

    That is the gradients of one layer's experts, and of the vocabulary's rows (`moe_lm.rows` keeps up to twice them).
    """
    if step.micro_tokens >= step.tokens:
        return 0
    parameters = _parameters(model, step)
    of_rows = sum(recipe.gradient_bytes(name, p, rows) for kind, name, p, rows in parameters if kind == VOCABULARY)
    largest = 0
    for layer in model.layers.values():
        parts = ((name, _share(p, step)) for name, p in layer.named_parameters() if kind_of(name) == EXPERTS)
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
    """Return what one block of the softmax's logits takes while it exists."""
    candidates = _num_candidates(model)
    rows = max(1, model.softmax.max_logits // candidates)
    return min(rows, step.micro_tokens) * candidates * FLOAT32


def bytes_sent(model: LanguageModel, recipe: OptimizerRecipe, step: Step) -> dict[str, int]:
    """Return an estimate of the bytes a process sends in a step: tokens to experts, and gradients.

    `tokens`: of each assignment a row there and one back, in the forward pass and in the backward pass, but for the
    share that stays. `gradients`: a ring's all-reduce of what every process has; of the vocabulary's matrices
    the touched rows to every other process, where that is less.
    """
    others = step.num_processes - 1
    away = others / step.num_processes
    number = BFLOAT16 if step.bfloat16 else FLOAT32
    rows = sum(layer.assignments_per_token for layer in model.layers.values() if hasattr(layer, "experts"))
    tokens = 4 * step.tokens * rows * model.embedding_VD.shape[1] * number * away
    gradients = 0.0
    for kind, name, parameter, touched in _parameters(model, step):
        if kind != EXPERTS:
            ring = 2 * away * parameter.numel() * parameter.element_size()
            gradients += min(ring, others * recipe.gradient_bytes(name, parameter, touched))
    return {"tokens": round(tokens), "gradients": round(gradients)}


def _parameters(model: LanguageModel, step: Step) -> Iterator[tuple[str, str, Tensor, int]]:
    """Yield kind, name, parameter and, of the vocabulary's, how many rows a step touches at most."""
    for name, parameter in model.named_parameters():
        kind, rows = kind_of(name), 0
        if kind == VOCABULARY:
            rows = step.tokens
            if name.startswith("softmax."):
                rows = rows + _num_candidates(model) if _samples(model) else len(parameter)
        yield kind, name, parameter, min(rows, len(parameter))


def _share(parameter_E: Tensor, step: Step) -> Tensor:
    """The experts of the process that has the most of them."""
    return parameter_E[: math.ceil(len(parameter_E) / step.num_processes)]


def _samples(model: LanguageModel) -> bool:
    """Whether the softmax gathers rows; otherwise it reads its matrix where it is."""
    return hasattr(model.softmax, "num_sampled")


def _num_candidates(model: LanguageModel) -> int:
    """Words that a token's target is set against in training."""
    vocabulary_size = len(model.embedding_VD)
    return min(model.softmax.num_sampled, vocabulary_size) if _samples(model) else vocabulary_size


def _candidates_bytes(model: LanguageModel) -> int:
    """The candidates' rows, where they are gathered, and their gradients."""
    width = model.embedding_VD.shape[1]
    return (2 if _samples(model) else 1) * _num_candidates(model) * width * FLOAT32


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
    """Of each assignment the expert's input, hidden layer and output; the sigmoid's output; the gates."""
    _, width, hidden = layer.experts.w1_EDH.shape
    rows = layer.assignments_per_token
    of_experts = rows * (2 * width + (0 if step.recompute else hidden)) + width
    # A gate keeps some 5 numbers an expert it chooses among (clean, noise, deviation, ...), 12 an assignment.
    of_gates = 5 * layer.gate.num_experts
    if hasattr(layer, "primary_gate"):
        # The second level reads a row for each group of a token.
        of_gates = 5 * layer.primary_gate.num_experts + layer.groups_per_token * (
            6 * layer.gate.num_experts + width + 12
        )
    return round(of_experts * kept + (of_gates + 12 * rows) * FLOAT32)
