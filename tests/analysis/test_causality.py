"""The audit finds planted leaks, measures them correctly, and passes every gate's routing in evaluation."""

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from moe_lm.analysis.causality import audit
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.config_files import choices, folder
from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.gate import Gating
from moe_lm.loss.objective import statistics_of

SIZE, START, END = 40, 0, 1
GATES = choices("gate")


def gate_class(gate):
    """The class that a gate's YAML names."""
    return build(OmegaConf.to_container(OmegaConf.load(folder() / f"gate/{gate}.yaml"))).func


BY_BATCH = {gate for gate in GATES if gate_class(gate).non_causal_note is not None}
"""Gates that say that their choice in training depends on other tokens."""


def random_split(num_sentences=60, seed=0):
    """Sentences of 1 to 12 random words, and their ends."""
    generator = np.random.default_rng(seed)
    length = generator.integers(2, 14, num_sentences)
    starts = np.concatenate([[0], np.cumsum(length)])
    tokens = generator.integers(2, SIZE, starts[-1]).astype(np.int32)
    tokens[starts[1:] - 1] = END
    return Split(tokens=tokens, starts=starts, words=length.astype(np.uint32))


SPLIT = random_split()


def audited(model, split=SPLIT, probes=16, words=60, seed=1):
    return audit(model, split, start=START, end=END, words=words, probes=probes, seed=seed)


@cache
def config_of(*overrides):
    return resolved(composed("train", ["softmax=full", *overrides]))


def model_of(*overrides, seed=1):
    """A model with large random parameters, adapted to a batch: nothing is near a tie, every expert is used."""
    config = config_of(*overrides)
    torch.manual_seed(seed)
    model = build_model(config, SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "threshold" not in name:
                parameter.normal_(std=0.7)
    batches = [batch for _, batch in iter_eval_batches(SPLIT, start=START, max_sentences=20, max_words=100)]
    model.train()
    for name, statistics in statistics_of(model.hidden(batches[-1])[1]).items():
        model.layers[name].adapt(statistics)
    return model


def flat(gate, *overrides):
    k = gate_class(gate).only_k or 2
    sizes = ["model=moe_4", "model.width=8", "model.expert_hidden=6", "model.num_experts=6", f"model.k={k}"]
    return model_of(*sizes, f"gate@model.layers.middle.gate={gate}", *overrides)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_causal_in_evaluation(gate):
    """No prediction changes; training-time routing leaks exactly where the gate says that it reads other tokens."""
    model = flat(gate)
    found = audited(model)
    assert found.causal
    assert found.evaluation.largest_bits < 1e-9
    assert (found.training.mean_bits > 1e-3) == (gate in BY_BATCH)
    if gate not in BY_BATCH:
        assert found.training.largest_bits < 1e-9
        assert found.by_training.perplexity == pytest.approx(found.by_evaluation.perplexity, rel=1e-9)


def test_capacity_of_switch_sees_other_sentences_and_no_later_word():
    """Tokens queue timestep by timestep, so only earlier ones can cause a drop."""
    found = audited(flat("switch"))
    assert found.later_words.largest_bits < 1e-9
    assert found.other_sentences.mean_bits > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_causal_at_both_levels(gate):
    """A gate stays causal as primary and as secondary gate."""
    k = gate_class(gate).only_k or 2
    model = model_of(
        *("model=moe_256_h", "model.width=8", "model.expert_hidden=6", "model.num_experts=12", "model.num_groups=3"),
        *(f"gate@model.layers.middle.{level}={gate}" for level in ("primary_gate", "gate")),
        *(f"model.k={k}", f"model.layers.middle.primary_k={k}"),
    )
    found = audited(model)
    assert found.evaluation.largest_bits < 1e-9
    assert found.training.largest_bits < 1e-9 or gate in BY_BATCH


def test_expert_choice_with_a_limit_is_causal():
    """Its evaluation leaves each token its best experts above the thresholds."""
    found = audited(flat("expert_choice", "model.layers.middle.gate.max_experts=3"), probes=8)
    assert found.evaluation.largest_bits < 1e-9
    assert found.training.mean_bits > 1e-3


PRESETS = {
    "lstm_2048_512": ["model.lstm_units=12"],
    "lstm_2x8192_1024": ["model.lstm_units=12"],
    "lstm_4x512": [],
    "moe_1_wide": ["model.expert_hidden=6"],
    "moe_1_deep": ["model.expert_hidden=6"],
    "moe_32": ["model.expert_hidden=6"],
    "moe_256_h": ["model.expert_hidden=6", "model.num_experts=64"],
    "moe_143m": ["model.expert_hidden=6", "model.num_experts=64", "model.lstm_units=12"],
}
"""One of the paper's models for each sequence of layers, and what makes it small."""


def layers_of(preset):
    """The kinds of a preset's layers from below, which bring their gates."""
    defaults = OmegaConf.load(folder() / f"model/{preset}.yaml").defaults
    return tuple(name for entry in defaults if entry != "_self_" for name in entry.values())


def test_presets_have_every_sequence_of_layers_and_every_layer():
    sequences = {layers_of(preset) for preset in PRESETS}
    assert {layers_of(preset) for preset in choices("model")} == sequences
    assert len(sequences) == len(PRESETS)
    assert {name for layers in sequences for name in layers} >= set(choices("layer"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_causal(preset):
    model = model_of(f"model={preset}", "model.width=8", *PRESETS[preset])
    assert audited(model, probes=4).evaluation.largest_bits < 1e-9


class Peeking(nn.Module):
    """A gate that routes every token by the sum of some other rows."""

    def __init__(self, num_experts, seen):
        super().__init__()
        self.num_experts, self.seen = num_experts, seen

    def forward(self, x_TD, group_T=None, input_T=None):
        token_T = torch.arange(len(x_TD))
        expert_T = (self.seen(x_TD) * 1e3).long().remainder(self.num_experts).expand(len(x_TD))
        expert_T, token_T = expert_T.sort(stable=True)
        ones_T = torch.ones_like(expert_T, dtype=x_TD.dtype)
        sums_E = ones_T.new_zeros(self.num_experts).index_add(0, expert_T, ones_T)
        return Gating(token_T, expert_T, ones_T, len(x_TD), sums_E, sums_E, len(x_TD))


PEEKS = {
    "last row": lambda x_TD: x_TD[-1:].sum(),
    "all rows": lambda x_TD: x_TD.sum(),
    "next row": lambda x_TD: x_TD.roll(-1, 0).sum(dim=1),
    "number of rows": lambda x_TD: torch.tensor(len(x_TD) / 1e3),
}


@pytest.mark.parametrize("peek", PEEKS)
def test_a_gate_that_peeks_is_found(peek):
    """The audit does not know which rows the gate reads."""
    model = flat("top_k")
    model.layers["middle"].gate = Peeking(6, PEEKS[peek])
    found = audited(model)
    assert not found.causal
    assert found.evaluation.largest_bits > 1e-3


def test_a_layer_that_peeks_is_found():
    """A layer that returns the mean over the batch is found too."""

    class Mean(nn.Module):
        def forward(self, x_TD, sentences):
            return x_TD.mean(dim=0, keepdim=True).expand_as(x_TD), None

    model = flat("top_k")
    model.layers["lower"] = Mean()
    assert not audited(model).causal


class LeakingModel(nn.Module):
    """A model that reads the next input and predicts it with probability 0.9."""

    def __init__(self):
        super().__init__()
        self.layers, self.device = nn.ModuleDict(), torch.device("cpu")
        self.softmax = SimpleNamespace(token_nats=self.token_nats)

    def hidden(self, batch):
        """The input one timestep on, where the sentence goes on; else -1."""
        place = batch.layout
        index_T = torch.arange(len(batch.input_T)) if place.index_T is None else place.index_T
        table = torch.full((place.num_steps * place.num_sentences + place.num_sentences,), -1)
        table[index_T] = batch.input_T
        return table[index_T + place.num_sentences].double().unsqueeze(1), {}

    def token_nats(self, hidden_TD, target_T):
        right_T = hidden_TD[:, 0].long() == target_T
        return -torch.where(right_T, 0.9, 0.1 / (SIZE - 1)).double().log()


def test_the_leak_is_measured_in_bits():
    """One sentence a micro-batch: a probe at t < last changes the prediction at t alone, by log2(0.9 * 39 / 0.1)."""
    one = Split(np.array([2, 3, 4, 5, END], np.int32), np.array([0, 5]), np.array([5], np.uint32))
    bits = math.log2(0.9 * (SIZE - 1) / 0.1)
    found = audited(LeakingModel(), one, probes=40, words=5)
    assert not found.causal
    assert found.evaluation.largest_bits == pytest.approx(bits)
    assert found.training.largest_bits == found.later_words.largest_bits == pytest.approx(bits)
    assert found.other_sentences.largest_bits == 0
    # Of 40 probes, t is 0 to 4: t + 1 predictions are compared, of which one changes unless t = 4.
    changed = round(found.training.mean_bits * found.compared_tokens / bits)
    assert found.training.mean_bits * found.compared_tokens == pytest.approx(changed * bits)
    assert 20 < changed < 40
    assert found.training.gain_bits == pytest.approx(found.training.mean_bits), "all of it is a gain"
    # Four of five words are told, and of the last nothing.
    assert math.log(found.by_evaluation.perplexity) == pytest.approx(
        -(4 * math.log(0.9) + math.log(0.1 / (SIZE - 1))) / 5
    )


def test_words_of_a_small_split_count_once():
    """More probes than micro-batches do not count words twice."""
    found = audited(flat("top_k"), probes=40, words=200)
    assert found.probes == 40
    assert found.compared_tokens > 40
    assert found.words == SPLIT.num_words


def test_a_seed_repeats_the_audit_and_another_does_not():
    first, again, other = (audited(flat("expert_choice"), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.training.mean_bits != other.training.mean_bits


def test_the_model_trains_no_further_for_being_audited():
    """All modules are in eval mode again, and adaptive buffers are unchanged."""
    model = flat("expert_choice")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audited(model)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name].double(), value) for name, value in model.state_dict().items())


def test_an_empty_split_is_refused():
    empty = Split(tokens=np.zeros(0, np.int32), starts=np.zeros(1, np.int64), words=np.zeros(0, np.uint32))
    with pytest.raises(UserError, match="no sentence to probe"):
        audited(flat("top_k"), empty)
