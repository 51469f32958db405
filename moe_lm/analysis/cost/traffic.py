"""What a process sends to others in a step, counted from shapes before anything runs; docs/distributed.md derives it.

Shape suffixes: D width, E experts, V vocabulary.
"""

from torch import nn

from moe_lm.analysis.cost.memory import num_candidates, parameters_of, samples, share_of_experts
from moe_lm.analysis.cost.sizes import BFLOAT16, FLOAT32, FLOAT64, INT64, Step
from moe_lm.model.language_model import LanguageModel
from moe_lm.optim import EXPERTS, VOCABULARY, OptimizerRecipe


def bytes_sent(model: LanguageModel, recipe: OptimizerRecipe, step: Step) -> dict[str, int]:
    """Return bytes by purpose, as `Group` counts them: the mean of all processes.

    `tokens`: rows to experts and back, if the gates choose all processes' experts alike. `gradients`: a ring's
    all-reduce of what several processes hold. `rows`: of the vocabulary's matrices, where every token is another word:
    the most there can be. Left out are counts and statistics, some numbers an expert.
    """
    tokens = sum(_of_tokens(layer, model, step) for layer in model.layers.values() if hasattr(layer, "experts"))
    gradients = rows = 0.0
    for kind, name, parameter, touched in parameters_of(model, step):
        if kind == EXPERTS:
            gradients += _of_copies(model.layers[name.split(".")[1]], parameter, step)
        elif kind != VOCABULARY or not (step.divide_vocabulary or _by_rows(recipe, name, parameter)):
            gradients += _ring(step.num_processes) * parameter.numel() * parameter.element_size()
        elif step.divide_vocabulary and name.startswith("softmax.") and not samples(model):
            rows += _of_divided_softmax(parameter, step)
        else:
            rows += _of_rows(model, name, parameter, touched, step)
    return {"tokens": round(tokens), "gradients": round(gradients), "rows": round(rows)}


def _of_tokens(layer: nn.Module, model: LanguageModel, step: Step) -> float:
    """Each assignment: a row there, one back, and their gradients; without these once more where sums are collected."""
    away = _away(step.expert_processes_of(layer.experts.share.total))
    trips = 4 if step.turns == 1 else 6
    number = BFLOAT16 if step.bfloat16 else FLOAT32
    return trips * step.tokens * layer.assignments_per_token * model.embedding_VD.shape[1] * number * away


def _of_copies(layer: nn.Module, parameter: nn.Parameter, step: Step) -> float:
    """Gradients of experts that several processes hold."""
    copies = step.num_processes // step.expert_processes_of(layer.experts.share.total)
    return _ring(copies) * share_of_experts(layer, step)(parameter).numel() * parameter.element_size()


def _of_rows(model: LanguageModel, name: str, parameter: nn.Parameter, touched: int, step: Step) -> float:
    """Numbers, rows and gradients of rows of the vocabulary's matrices.

    Of a divided matrix, for each micro-batch: the numbers asked, the rows, their gradients. Of one that all hold: each
    gradient, with its row's number, to the process that sums it, and the sums to all.
    """
    row = parameter[0].numel() * parameter.element_size()
    away, others = _away(step.num_processes), step.num_processes - 1
    # Candidates are the same on every process, targets and inputs may be other words on each.
    shared = min(num_candidates(model), len(parameter)) if name.startswith("softmax.") else 0
    if step.divide_vocabulary:
        at_a_time = min(len(parameter), shared + step.micro_tokens)
        again = INT64 + row if step.turns > 1 and not shared else 0  # the embedding's, where sums are collected
        return away * step.turns * at_a_time * (INT64 + 2 * row + again)
    every = min(len(parameter), shared + step.num_processes * max(0, touched - shared))
    return (row + INT64) * (away * touched + others / step.num_processes * every)


def _of_divided_softmax(parameter: nn.Parameter, step: Step) -> float:
    """The exact softmax of a divided vocabulary moves no rows: its tokens go to all, and what each makes of them back.

    A token's target, hidden state and the gradient of it; of all processes' tokens a sum of exponentials, in turn to
    all, and the target's logit by a ring. (The bias, a vector, sends nothing beside its matrix.)
    """
    if parameter.dim() == 1 or step.num_processes == 1:
        return 0
    others = step.num_processes - 1
    token = INT64 + 2 * parameter.shape[1] * FLOAT32 + step.num_processes * FLOAT64
    return step.tokens * (others * token + _ring(step.num_processes) * step.num_processes * FLOAT64)


def _by_rows(recipe: OptimizerRecipe, name: str, parameter: nn.Parameter) -> bool:
    """Whether the optimizer updates the touched rows alone, so that no gradient is as large as the matrix."""
    return recipe.gradient_bytes(name, parameter, 1) < recipe.gradient_bytes(name, parameter, len(parameter))


def _away(parallel: int) -> float:
    """The share of what goes to all processes alike that leaves this one."""
    return (parallel - 1) / parallel


def _ring(parallel: int) -> float:
    """How often a ring's all-reduce sends a tensor."""
    return 2 * _away(parallel)
