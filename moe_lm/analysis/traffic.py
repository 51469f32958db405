"""Bytes that each process sends in a training step, computed from shapes; docs/distributed.md derives the formulas.

Shape suffixes: D width, E experts, V vocabulary.
"""

from torch import nn

from moe_lm.analysis.memory import (
    BFLOAT16,
    FLOAT32,
    StepSizes,
    expert_shard,
    is_sampled,
    iter_parameters,
    num_candidates,
)
from moe_lm.optim import EXPERTS, VOCABULARY, OptimizerRecipe

INT64, FLOAT64 = 8, 8
"""Bytes per number."""


def bytes_sent(model: nn.Module, recipe: OptimizerRecipe, step: StepSizes) -> dict[str, int]:
    """Return the bytes sent by purpose, averaged over processes, as `Group` counts them.

    `tokens`: rows sent to experts and back, if the experts of all processes are chosen equally often. `gradients`: ring
    all-reduce of replicated parameters. `rows`: rows of embedding and softmax, an upper bound in which every token is a
    different word. Counts and statistics, a few numbers per expert, are left out.
    """
    tokens = sum(_token_bytes(layer, model, step) for layer in model.layers.values() if hasattr(layer, "experts"))
    gradients = rows = 0.0
    for kind, name, parameter, touched in iter_parameters(model, step):
        if kind == EXPERTS:
            gradients += _replica_bytes(model.layers[name.split(".")[1]], parameter, step)
        elif kind != VOCABULARY or not (step.vocab_parallel or _is_updated_by_rows(recipe, parameter)):
            gradients += _ring(step.num_processes) * parameter.numel() * parameter.element_size()
        elif step.vocab_parallel and name.startswith("softmax.") and not is_sampled(model):
            rows += _vocab_parallel_softmax_bytes(parameter, step)
        else:
            rows += _row_bytes(model, name, parameter, touched, step)
    return {"tokens": round(tokens), "gradients": round(gradients), "rows": round(rows)}


def _token_bytes(layer: nn.Module, model: nn.Module, step: StepSizes) -> float:
    """Return the bytes of the rows sent to experts and back, and of their gradients.

    With several micro-batches, a first pass that collects statistics sends the rows there and back once more.
    """
    remote = _remote(step.expert_processes(layer.experts.num_experts))
    trips = 4 if step.num_micro_batches == 1 else 6
    number = BFLOAT16 if step.bfloat16 else FLOAT32
    return trips * step.tokens * layer.assignments_per_token * model.width * number * remote


def _replica_bytes(layer: nn.Module, parameter: nn.Parameter, step: StepSizes) -> float:
    """Return the bytes of the all-reduce between processes that hold the same experts."""
    replicas = step.num_processes // step.expert_processes(layer.experts.num_experts)
    return _ring(replicas) * expert_shard(layer, step)(parameter).numel() * parameter.element_size()


def _row_bytes(model: nn.Module, name: str, parameter: nn.Parameter, touched: int, step: StepSizes) -> float:
    """Return the bytes of row indices, rows and row gradients of an embedding or sampled softmax matrix.

    If the matrix is sharded, each micro-batch sends indices and receives rows, then sends the gradients of the rows. If
    it is replicated, each process sends a row's gradient and index to the process that sums gradients of that row, and
    this process sends the sum to all others.
    """
    row = parameter[0].numel() * parameter.element_size()
    remote, others = _remote(step.num_processes), step.num_processes - 1
    # Sampled candidates are the same on every process; inputs and targets may differ.
    shared = min(num_candidates(model), len(parameter)) if name.startswith("softmax.") else 0
    if step.vocab_parallel:
        micro_rows = min(len(parameter), shared + step.micro_tokens)
        # The pass that collects statistics reads the embedding once more.
        again = INT64 + row if step.num_micro_batches > 1 and not shared else 0
        return remote * step.num_micro_batches * micro_rows * (INT64 + 2 * row + again)
    all_rows = min(len(parameter), shared + step.num_processes * max(0, touched - shared))
    return (row + INT64) * (remote * touched + others / step.num_processes * all_rows)


def _vocab_parallel_softmax_bytes(parameter: nn.Parameter, step: StepSizes) -> float:
    """Return the bytes of the exact softmax over a sharded vocabulary, which sends tokens instead of rows.

    Every process receives each token's target and hidden state and returns the gradient of the hidden state. Sums of
    exponentials are all-gathered, and targets' logits all-reduced.
    """
    if parameter.dim() == 1 or step.num_processes == 1:  # the bias sends nothing besides its matrix
        return 0
    others = step.num_processes - 1
    token = INT64 + 2 * parameter.shape[1] * FLOAT32 + step.num_processes * FLOAT64
    return step.tokens * (others * token + _ring(step.num_processes) * step.num_processes * FLOAT64)


def _is_updated_by_rows(recipe: OptimizerRecipe, parameter: nn.Parameter) -> bool:
    """Return whether the optimizer updates touched rows only, so that the gradient is smaller than the matrix."""
    one, all_rows = (recipe.gradient_bytes(VOCABULARY, parameter, num_rows) for num_rows in (1, len(parameter)))
    return one < all_rows


def _remote(num_processes: int) -> float:
    """Return the fraction of evenly distributed data that belongs to other processes."""
    return (num_processes - 1) / num_processes


def _ring(num_processes: int) -> float:
    """Return how many times a ring all-reduce sends a tensor."""
    return 2 * _remote(num_processes)
