"""Predicted memory against the bytes that a training step of a real model keeps."""

from functools import partial

import numpy as np
import pytest
import torch

from moe_lm.analysis.memory import StepSizes, accumulation_bytes, activation_bytes, logits_bytes, parameter_memory
from moe_lm.data.batch import collate
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.loss.softmax import FullSoftmax, SampledSoftmax
from moe_lm.model.feed_forward import FeedForward
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm, ProjectedLstm
from moe_lm.model.moe import MoE, set_recompute
from moe_lm.ops.sparse_rows import row_grad
from moe_lm.optim.adam import Adam

WIDTH, SIZE, SAMPLED, LENGTHS = 48, 900, 100, [22, 23, 24, 24] * 9
WORDS = sum(LENGTHS)
STEP = StepSizes(words=WORDS, micro_words=WORDS)


def GATE(**sizes):
    """A gate that sums what the default losses read, as in training."""
    gate = NoisyTopK(noise_epsilon=0.01, **sizes)
    gate.required_stats = frozenset({"importance_E", "load_E"})
    return gate


SAMPLE = partial(SampledSoftmax, num_sampled=SAMPLED, chunk_logits=10_000)
FULL = partial(FullSoftmax, chunk_logits=10_000)
LAYERS = {
    "wide": lambda: FeedForward(width=WIDTH, hidden=200, num_hidden=1),
    "deep": lambda: FeedForward(width=WIDTH, hidden=64, num_hidden=4),
    "lstm": lambda: Lstm(width=WIDTH),
    "lstm, to fewer": lambda: ProjectedLstm(width=WIDTH, units=160),
    "lstm, to as many": lambda: ProjectedLstm(width=WIDTH, units=WIDTH),
    "flat": lambda: MoE(width=WIDTH, hidden=96, num_experts=8, k=2, gate=GATE),
    "flat, many experts": lambda: MoE(width=WIDTH, hidden=64, num_experts=128, k=4, gate=GATE),
    "flat, with shared experts": lambda: MoE(
        width=WIDTH, hidden=64, num_experts=8, k=2, gate=GATE, num_shared_experts=3
    ),
    "hierarchical": lambda: HierarchicalMoE(
        width=WIDTH, hidden=96, num_experts=32, num_groups=4, k=2, gate=GATE, primary_gate=GATE
    ),
}
MIXTURES = [name for name in LAYERS if name.startswith(("flat", "hier"))]


def make(*layers, dropout=0.1, softmax=SAMPLE, size=SIZE):
    torch.manual_seed(0)
    layers = {str(number): layer for number, layer in enumerate(layers)}
    return LanguageModel(width=WIDTH, vocabulary_size=size, dropout=dropout, layers=layers, softmax=softmax)


def batch():
    """A micro-batch of sentences whose lengths differ, so that there is some padding."""
    tokens = np.random.default_rng(0).integers(3, SIZE, WORDS).astype(np.int32)
    split = Split(tokens, np.concatenate([[0], np.cumsum(LENGTHS)]), np.array(LENGTHS, dtype=np.uint32))
    return collate(split, np.arange(len(LENGTHS)), 0)


def kept_by(model):
    """Bytes of distinct storages in the autograd graph of a training step, excluding parameters and the batch."""
    data = batch()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {x.untyped_storage().data_ptr() for x in (data.input_T, data.target_T, data.layout.index_T)}
    storages, alive = {}, []

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # or its address would be given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(data)
    return sum(bytes_ for address, bytes_ in storages.items() if address not in known)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("others", [{}, {"dropout": 0.0}, {"softmax": FULL}], ids=str)
def test_activations_are_those_that_a_step_keeps(name, others):
    """The estimate for three layers and the softmax is within 15 %."""
    model = make(LAYERS[name](), LAYERS["wide"](), LAYERS[name](), **others)
    assert activation_bytes(model, STEP) == pytest.approx(kept_by(model), rel=0.15)


@pytest.mark.parametrize("name", LAYERS)
def test_activations_of_a_layer_are_those_that_it_keeps(name):
    """The estimate for a single layer, as the difference of two models, is within 15 %."""
    estimated = activation_bytes(make(LAYERS[name]()), STEP) - activation_bytes(make(), STEP)
    assert estimated == pytest.approx(kept_by(make(LAYERS[name]())) - kept_by(make()), rel=0.15)


@pytest.mark.parametrize("name", MIXTURES)
def test_recomputed_hidden_activations_are_not_kept(name):
    """Recomputation saves the hidden layer of every assignment; the estimate stays within 15 %."""
    plain, saving = make(LAYERS[name]()), make(LAYERS[name]())
    set_recompute(saving, True)
    step = StepSizes(words=WORDS, micro_words=WORDS, recompute=True)
    assert activation_bytes(saving, step) == pytest.approx(kept_by(saving), rel=0.15)
    layer = plain.layers["0"]
    rows = 4 if name == "hierarchical" else layer.gate.k
    hidden = WORDS * rows * layer.experts.w1_EDH.shape[2] * 4
    assert activation_bytes(plain, STEP) - activation_bytes(saving, step) == hidden
    assert kept_by(plain) - kept_by(saving) == pytest.approx(hidden, rel=0.02)


def recipe(**changes):
    settings = {"learning_rate": 0.001, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "clip_norm": 1.0}
    return Adam(**settings | {"experts": "adam", "vocabulary": "lazy"} | changes)


def kind_of(name):
    if "experts" in name:
        return "experts"
    return "vocabulary" if name.startswith(("embedding", "softmax")) else "rest"


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", ["flat", "hierarchical"])
@pytest.mark.parametrize("experts", ["adam", "factored"])
@pytest.mark.parametrize("vocabulary", ["lazy", "dense"])
def test_weights_gradients_and_state_are_those_of_a_step(name, experts, vocabulary):
    """Exact to the byte, except for touched rows, of which the prediction is an upper bound."""
    model, chosen = make(LAYERS["lstm"](), LAYERS[name]()), recipe(experts=experts, vocabulary=vocabulary)
    optimizer = chosen.build(model)
    model.train()(batch())[0].backward()
    optimizer.step()
    want = {kind: [0, 0, 0, 0] for kind in ("experts", "vocabulary", "rest")}
    for parameter_name, parameter in model.named_parameters():
        rows = row_grad(parameter)
        gradients = (parameter.grad,) if rows is None else rows
        counted = (parameter.numel(), bytes_of(parameter), bytes_of(*gradients))
        counted += (bytes_of(*optimizer.state[parameter].values()),)
        kind = kind_of(parameter_name)
        want[kind] = [total + more for total, more in zip(want[kind], counted, strict=True)]
    for kind, part in parameter_memory(model, chosen, STEP).items():
        parameters, weights, gradients, state = want[kind]
        assert (part.parameters, part.weights, part.optimizer) == (parameters, weights, state), kind
        if kind == "vocabulary" and vocabulary == "lazy":
            assert 0.5 * part.gradients < gradients <= part.gradients
        else:
            assert part.gradients == gradients


@pytest.mark.parametrize(("experts", "bytes_"), [("adam", 16.0), ("factored", 8.01)])
def test_bytes_that_a_parameter_of_an_expert_costs(experts, bytes_):
    """4 for the weight, 4 for the gradient, 8 for both moments; factored, 4 * (1/512 + 1/1024) instead of 8."""
    with torch.device("meta"):
        model = make(MoE(width=512, hidden=1024, num_experts=256, k=4, gate=GATE))
    part = parameter_memory(model, recipe(experts=experts), STEP)["experts"]
    assert part.parameters == 268_435_456
    assert round(part.bytes_per_parameter, 2) == bytes_
    assert part.total == part.weights + part.gradients + part.optimizer


def test_processes_shard_only_the_experts():
    """With 10 experts over 4 processes, some processes hold 3."""
    with torch.device("meta"):
        model = make(MoE(width=WIDTH, hidden=10, num_experts=10, k=2, gate=GATE))
    one, four = (
        parameter_memory(model, recipe(), StepSizes(words=40, micro_words=40, num_processes=n)) for n in (1, 4)
    )
    assert one["experts"].parameters == 10 * 2 * WIDTH * 10
    assert four["experts"].parameters == 3 * 2 * WIDTH * 10
    assert four["experts"].weights * 10 == one["experts"].weights * 3
    assert four["rest"] == one["rest"]
    assert four["vocabulary"].weights == one["vocabulary"].weights
    # 10 tokens of a process; the embedding's rows and the softmax's with 100 sampled; 8 bytes of each row's number.
    matrices = (10 + 10 + SAMPLED) * (WIDTH * 4 + 8)
    assert four["vocabulary"].gradients == matrices + (10 + SAMPLED) * (4 + 8)


def test_a_micro_batch_is_at_most_the_tokens_of_its_process():
    """Activations grow with the micro-batch, not with the batch."""
    step = StepSizes(words=1000, micro_words=300, num_processes=2)
    assert (step.tokens, step.micro_tokens) == (500, 300)
    assert StepSizes(words=1000, micro_words=300, num_processes=3).tokens == 334
    assert StepSizes(words=1000, micro_words=300, num_processes=7).micro_tokens == 143
    model = make(LAYERS["flat"]())
    sizes = [activation_bytes(model, StepSizes(words=9000, micro_words=m)) for m in (1000, 2000, 3000)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_a_further_micro_batch_needs_gradients_twice():
    """The largest layer's expert gradients and the vocabulary's rows exist twice; one micro-batch needs no copy."""
    model = make(LAYERS["flat"](), LAYERS["flat, many experts"]())
    experts, matrices = (
        128 * 2 * WIDTH * 64 * 4,
        [model.embedding.weight_VD, model.softmax.weight_VD, model.softmax.bias_V],
    )
    whole = sum(matrix.numel() * 4 + len(matrix) * 8 for matrix in matrices)  # every row, and its number
    for sizes, share in [((90, 90, 1), 0), ((90, 89, 1), 1), ((90, 45, 2), 0), ((90, 44, 2), 2)]:
        words, micro_words, parallel = sizes
        step = StepSizes(words=words, micro_words=micro_words, num_processes=parallel)
        found = accumulation_bytes(model, recipe(), step)
        if share == 0:
            assert found == 0
        else:
            assert 0 < found - experts // share <= whole
    step = StepSizes(words=90, micro_words=9)
    assert 0 < accumulation_bytes(make(LAYERS["lstm"]()), recipe(), step) <= whole


def test_bfloat16_halves_what_products_keep_and_copies_their_matrices():
    """Gates, residual stream and softmax stay float32; the vocabulary's matrices have no bfloat16 copy."""
    model = make(LAYERS["wide"]())
    half = StepSizes(words=WORDS, micro_words=WORDS, bfloat16=True)
    assert activation_bytes(model, STEP) - activation_bytes(model, half) == WORDS * (200 + WIDTH) * 2
    parts, halves = parameter_memory(model, recipe(), STEP), parameter_memory(model, recipe(), half)
    assert halves["rest"].weights == 1.5 * parts["rest"].weights
    assert halves["vocabulary"] == parts["vocabulary"]


def test_very_many_experts_are_not_copied():
    """1,023 experts per process have bfloat16 copies, 1,024 do not."""
    for count, copied in ((1023, True), (1024, False)):
        layer = MoE(width=WIDTH, hidden=3, num_experts=count, k=2, gate=partial(NoisyTopK, noise_epsilon=0.01))
        half = StepSizes(words=WORDS, micro_words=WORDS, bfloat16=True)
        single, mixed = (parameter_memory(make(layer), recipe(), step)["experts"].weights for step in (STEP, half))
        assert mixed == (1.5 if copied else 1) * single


def test_logits_are_a_block():
    """A chunk has as many tokens as chunk_logits allows, at least one and at most all."""
    few = StepSizes(words=5, micro_words=5)
    assert logits_bytes(make(), STEP) == 100 * SAMPLED * 4
    assert logits_bytes(make(), few) == 5 * SAMPLED * 4
    assert logits_bytes(make(softmax=FULL), STEP) == 11 * SIZE * 4
    assert logits_bytes(make(softmax=partial(FullSoftmax, chunk_logits=10)), few) == SIZE * 4


def test_without_chunk_logits_a_gpu_has_larger_chunks():
    """2^24 logits on a CPU, 2^28 where products run in bfloat16."""
    model = make(softmax=partial(FullSoftmax, chunk_logits=None))
    for bfloat16, logits in ((False, 2**24), (True, 2**28)):
        step = StepSizes(words=2**30, micro_words=2**30, bfloat16=bfloat16)
        assert logits_bytes(model, step) == logits // SIZE * SIZE * 4
    assert model.softmax.chunk_logits == 2**24


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"micro_words": 21}, "micro_words <= words"),
        ({"micro_words": 0}, "micro_words <= words"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"num_processes": -3}, "num_processes=-3"),
        ({"num_processes": 21}, "batch.words=20"),
        ({"num_processes": 4, "expert_parallel_size": 3}, "parallel.expert_size=3"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(sizes, words):
    """The message names the key."""
    with pytest.raises(UserError, match=words):
        StepSizes(**{"words": 20, "micro_words": 20} | sizes)
