"""Memory of a training step in each process, computed from shapes before anything runs.

Shape suffixes: D width, H expert hidden, E experts, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lm.errors import UserError
from moe_lm.ops import grouped_gemm
from moe_lm.optim import EXPERTS, REST, VOCABULARY, OptimizerRecipe, parameter_groups
from moe_lm.parallel.context import expert_parallel_size
from moe_lm.parallel.group import Group, shard_rows

FLOAT32, BFLOAT16 = 4, 2
"""Bytes per number."""


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one training step; raises `UserError` for impossible ones."""

    words: int
    """Words of the global batch."""
    micro_words: int
    """Words of a micro-batch."""
    num_processes: int = 1
    recompute: bool = False
    """Whether the backward pass recomputes the experts' hidden activations."""
    bfloat16: bool = False
    """Whether matrix products run in bfloat16; otherwise everything is float32."""
    expert_parallel_size: int | None = None
    """Processes that shard the experts; None: as many as can each hold at least one expert."""
    vocab_parallel: bool = False
    """Whether the processes shard embedding and softmax."""

    def __post_init__(self):
        if not 1 <= self.micro_words <= self.words:
            raise UserError(
                f"batch.words={self.words} batch.micro_words={self.micro_words}: need 1 <= micro_words <= words"
            )
        if self.num_processes < 1:
            raise UserError(f"num_processes={self.num_processes}: must be at least 1")
        if self.num_processes > self.words:
            raise UserError(f"num_processes={self.num_processes}: more processes than batch.words={self.words}")
        size = self.expert_parallel_size
        if size is not None and (size < 1 or self.num_processes % size):
            raise UserError(f"parallel.expert_size={size}: must divide the number of processes, {self.num_processes}")

    @property
    def tokens(self) -> int:
        """Tokens of each process in a step."""
        return math.ceil(self.words / self.num_processes)

    @property
    def micro_tokens(self) -> int:
        """Tokens of each process in a micro-batch."""
        return min(self.micro_words, self.tokens)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each process in a step."""
        return math.ceil(self.tokens / self.micro_tokens)

    def expert_processes(self, num_experts: int) -> int:
        """Return the number of processes that shard a layer of `num_experts` experts."""
        return expert_parallel_size(self.num_processes, num_experts, self.expert_parallel_size)


@dataclass(frozen=True)
class ParameterMemory:
    """Bytes that the parameters of one group take in one process."""

    parameters: int
    """Number of parameters in the process."""
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes per parameter."""
        return self.total / max(1, self.parameters)


def parameter_memory(model: nn.Module, recipe: OptimizerRecipe, step: StepSizes) -> dict[str, ParameterMemory]:
    """Return the memory of each kind of parameter in the process with the most experts.

    Exact except for gradients of embedding rows, which are counted as if every token were a different word.
    """
    sums = {kind: [0, 0, 0, 0] for kind in (EXPERTS, VOCABULARY, REST)}
    for group, name, parameter, rows in iter_parameters(model, step):
        shard, kind = _shard(model, group, name, parameter, step), group if group in (EXPERTS, VOCABULARY) else REST
        weights = shard.numel() * shard.element_size()
        if step.bfloat16 and shard.dim() > 1 and _is_cast(group, name, shard):
            weights += shard.numel() * BFLOAT16  # the copy that matrix products read
        bytes_ = (shard.numel(), weights, recipe.gradient_bytes(group, shard, rows), recipe.state_bytes(group, shard))
        sums[kind] = [total + more for total, more in zip(sums[kind], bytes_, strict=True)]
    return {kind: ParameterMemory(*total) for kind, total in sums.items()}


def accumulation_bytes(model: nn.Module, recipe: OptimizerRecipe, step: StepSizes) -> int:
    """Return the additional bytes that gradient accumulation needs: 0 where a step is one micro-batch.

    While a micro-batch's gradients are added to the accumulated ones, two copies exist of one layer's expert gradients
    and of the gradients of the vocabulary rows.
    """
    if step.micro_tokens >= step.tokens:
        return 0
    row_bytes, layer_bytes = 0, dict.fromkeys(model.layers, 0)
    for group, name, parameter, rows in iter_parameters(model, step):
        if group == VOCABULARY:
            row_bytes += recipe.gradient_bytes(group, parameter, rows)
        elif group == EXPERTS:
            shard = _shard(model, group, name, parameter, step)
            layer_bytes[_layer_name(name)] += recipe.gradient_bytes(group, shard, 0)
    return max(layer_bytes.values(), default=0) + row_bytes


def activation_bytes(model: nn.Module, step: StepSizes) -> int:
    """Return the bytes of activations that one micro-batch keeps for its backward pass.

    An estimate for a CPU, tested to be within 15 %; on a GPU, cuDNN keeps other tensors of an LSTM.
    """
    width = model.width
    # Inputs of all layers and the last hidden states; with dropout, also a factor for each of these numbers.
    stream = (len(model.layers) + 1) * (2 if model.dropout > 0 else 1) * width * FLOAT32
    layers = sum(_kept_by_layer(layer, step) for layer in model.layers.values())
    # The softmax computes the gradients of the hidden states and of the targets' rows already in the forward pass.
    softmax = 2 * width * FLOAT32
    # Sampled candidates' rows are gathered, so both they and their gradients are kept.
    candidates = (2 if is_sampled(model) else 1) * num_candidates(model) * width * FLOAT32
    return step.micro_tokens * (stream + layers + softmax) + candidates


def logits_bytes(model: nn.Module, step: StepSizes) -> int:
    """Return the memory of one chunk of logits, an upper bound for training on a CPU.

    A softmax without its own `chunk_logits` uses larger chunks on a GPU; here bfloat16 is taken to mean a GPU.
    """
    candidates = num_candidates(model)
    rows = max(1, model.softmax.chunk_logits_on(gpu=step.bfloat16) // candidates)
    return min(rows, step.micro_tokens) * candidates * FLOAT32


def iter_parameters(model: nn.Module, step: StepSizes) -> Iterator[tuple[str, str, Tensor, int]]:
    """Yield each parameter's group, name, tensor and, for the vocabulary, the most rows that a step can touch."""
    groups = parameter_groups(model)
    for name, parameter in model.named_parameters():
        group, rows = groups[name], 0
        if group == VOCABULARY:
            rows = step.tokens
            if name.startswith("softmax."):
                rows = rows + num_candidates(model) if is_sampled(model) else len(parameter)
        yield group, name, parameter, min(rows, len(parameter))


def expert_shard(layer: nn.Module, step: StepSizes) -> Callable[[Tensor], Tensor]:
    """Return a function that cuts a tensor with an expert axis to the largest shard of any process."""
    experts = layer.experts
    group = Group(0, step.expert_processes(experts.num_experts))
    size = shard_rows(experts.num_experts, group, experts.group_size).size
    return lambda tensor_E: tensor_E[:size]


def is_sampled(model: nn.Module) -> bool:
    """Return whether the training softmax gathers sampled rows instead of reading its whole matrix."""
    return hasattr(model.softmax, "num_sampled")


def num_candidates(model: nn.Module) -> int:
    """Return the number of words among which the training softmax normalises."""
    vocabulary_size = model.vocabulary_size
    return min(model.softmax.num_sampled, vocabulary_size) if is_sampled(model) else vocabulary_size


def _layer_name(parameter_name: str) -> str:
    return parameter_name.split(".")[1]  # layers.<name>.…


def _shard(model: nn.Module, group: str, name: str, parameter: Tensor, step: StepSizes) -> Tensor:
    """Return the largest shard of a parameter that any process holds."""
    if group == EXPERTS:
        return expert_shard(model.layers[_layer_name(name)], step)(parameter)
    if group == VOCABULARY and step.vocab_parallel:
        return parameter[: shard_rows(len(parameter), Group(0, step.num_processes)).size]
    return parameter


def _is_cast(group: str, name: str, parameter: Tensor) -> bool:
    """Return whether autocast makes a bfloat16 copy of a parameter.

    The Triton kernels for very many experts read float32 matrices directly.
    """
    in_kernels = group == EXPERTS and len(parameter) > grouped_gemm.max_torch_experts
    return group != VOCABULARY and ".lstm." not in name and not in_kernels


def _kept_by_layer(layer: nn.Module, step: StepSizes) -> int:
    """Return the bytes per token that a layer keeps, its input excluded."""
    product = BFLOAT16 if step.bfloat16 else FLOAT32
    if hasattr(layer, "lstm"):
        return _kept_by_lstm(layer.lstm) * FLOAT32
    if hasattr(layer, "experts"):
        return _kept_by_moe(layer, step, product)
    return sum(matrix.shape[-1] for matrix in layer.parameters() if matrix.dim() > 1) * product  # outputs of products


def _kept_by_lstm(lstm: nn.Module) -> int:
    """Return how many numbers per token an LSTM keeps, as measured: torch keeps more than the equations need."""
    units = len(lstm.bias_ih_l0) // 4
    if getattr(lstm, "proj_size", 0):
        # Four gates, cell, tanh of the cell and output, all seen by autograd, and the projected output.
        return 7 * units + lstm.proj_size
    return 17 * units  # oneDNN's workspace, 15 to 16, and the output


def _kept_by_moe(layer: nn.Module, step: StepSizes, product: int) -> int:
    """Return the bytes per token that a mixture of experts keeps: its experts, its output and its gates."""
    _, width, hidden = layer.experts.w1_EDH.shape
    rows = layer.assignments_per_token
    # Inputs and outputs of experts are only kept where they travel between processes.
    travelling = 2 * width if step.expert_processes(layer.experts.num_experts) > 1 else 0
    expert_numbers = rows * (travelling + (0 if step.recompute else hidden)) + width
    if layer.shared is not None:
        expert_numbers += sum(matrix.shape[-1] for matrix in layer.shared.weights)
    # A gate keeps some 5 numbers per expert (logits, noise, standard deviation, ...) and 12 per assignment.
    gate_numbers = 5 * layer.gate.num_experts
    if hasattr(layer, "primary_gate"):  # the secondary gate reads a token's row once for each of its groups
        secondary = layer.groups_per_token * (6 * layer.gate.num_experts + width + 12)
        gate_numbers = 5 * layer.primary_gate.num_experts + secondary
    return round(expert_numbers * product + (gate_numbers + 12 * rows) * FLOAT32)
