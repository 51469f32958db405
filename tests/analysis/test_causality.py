"""The audit finds planted leaks, measures them as worked out by hand, and passes every rule of evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from moe_lm.analysis.causality import audit
from moe_lm.cli.config import choices, composed, folder, resolved
from moe_lm.cli.machine import build, build_model
from moe_lm.data.batching import iter_eval_batches
from moe_lm.data.prepared import Split
from moe_lm.errors import UserError
from moe_lm.gate import Gating
from moe_lm.loss.objective import statistics

SIZE, START, END = 40, 0, 1
GATES = choices("gate")
BY_BATCH = {"expert_choice", "gshard", "sinkhorn", "strictly_balanced", "switch"}


def made_up(num_sentences=60, seed=0):
    """Sentences of 1 to 12 random words, and their ends."""
    generator = np.random.default_rng(seed)
    length = generator.integers(2, 14, num_sentences)
    starts = np.concatenate([[0], np.cumsum(length)])
    tokens = generator.integers(2, SIZE, starts[-1]).astype(np.int32)
    tokens[starts[1:] - 1] = END
    return Split(tokens=tokens, starts=starts, words=length.astype(np.uint32))


SPLIT = made_up()


def audited(model, split=SPLIT, probes=16, words=60, seed=1):
    return audit(model, split, start=START, end=END, words=words, probes=probes, seed=seed)


def model_of(*overrides, seed=1):
    """A model with large random parameters, adapted to a batch: nothing is near a tie, every expert is used."""
    config = resolved(composed("train", ["softmax=full", *overrides]))
    torch.manual_seed(seed)
    model = build_model(config, SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "threshold" not in name:
                parameter.normal_(std=0.7)
    batches = [batch for _, batch in iter_eval_batches(SPLIT, start=START, max_sentences=20, max_words=100)]
    model.train()
    model.adapt(statistics(model.hidden(batches[-1])[1]))
    return model


def flat(gate, *overrides):
    k = getattr(build(OmegaConf.to_container(OmegaConf.load(folder() / f"gate/{gate}.yaml"))).func, "only_k", None)
    sizes = ["model=moe_4", "model.width=8", "model.expert_hidden=6", "model.num_experts=6", f"model.k={k or 2}"]
    return model_of(*sizes, f"gate@model.layers.middle.gate={gate}", *overrides)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_causal_in_evaluation(gate):
    """No prediction moves; training's choice leaks where the gate says that it looks at others, else not at all."""
    model = flat(gate)
    found = audited(model)
    assert found.causal
    assert found.evaluation.largest_bits < 1e-9
    assert (found.training.mean_bits > 1e-3) == (gate in BY_BATCH)
    assert (model.layers["middle"].gate.__class__.__dict__.get("non_causal_note") is not None) == (gate in BY_BATCH)
    if gate not in BY_BATCH:
        assert found.training.largest_bits < 1e-9
        assert found.by_training.perplexity == pytest.approx(found.by_evaluation.perplexity, rel=1e-9)


def test_capacity_of_switch_sees_other_sentences_and_no_later_word():
    """Tokens queue timestep by timestep, so what drops one stands before it."""
    found = audited(flat("switch"))
    assert found.later_words.largest_bits < 1e-9
    assert found.other_sentences.mean_bits > 1e-3


@pytest.mark.parametrize("level", ["primary_gate", "gate"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_causal_at_either_level(gate, level):
    """The same behind or before a second gate."""
    one = gate == "switch"
    model = model_of(
        *("model=moe_256_h", "model.width=8", "model.expert_hidden=6", "model.num_experts=12", "model.num_groups=3"),
        f"gate@model.layers.middle.{level}={gate}",
        f"model.k={1 if one and level == 'gate' else 2}",
        f"model.layers.middle.primary_k={1 if one and level == 'primary_gate' else 2}",
    )
    found = audited(model)
    assert found.evaluation.largest_bits < 1e-9
    assert found.training.largest_bits < 1e-9 or gate in BY_BATCH


def test_expert_choice_with_a_limit_is_causal():
    """Its evaluation leaves each token its best experts above the thresholds."""
    found = audited(flat("expert_choice", "model.layers.middle.gate.max_experts=3"), probes=8)
    assert found.evaluation.largest_bits < 1e-9
    assert found.training.mean_bits > 1e-3


@pytest.mark.parametrize("preset", choices("model"))
def test_every_preset_is_causal(preset):
    """All of the paper's models, made small; so every layer is among them."""
    sizes = resolved(composed("train", [f"model={preset}"]))["model"]
    overrides = [f"model={preset}", "model.width=8"]
    if "expert_hidden" in str(OmegaConf.load(folder() / f"model/{preset}.yaml").defaults) or "moe" in preset:
        overrides.append("model.expert_hidden=6")
    if "lstm_projected" in str(OmegaConf.load(folder() / f"model/{preset}.yaml").defaults):
        overrides.append("model.lstm_units=12")
    if "hierarchical" in str(sizes["layers"]):
        overrides.append(f"model.num_experts={4 * sizes['num_groups']}")
    assert audited(model_of(*overrides), probes=4).evaluation.largest_bits < 1e-9


def test_presets_have_every_layer():
    layers = {part["_target_"] for name in choices("model") for part in _layers(name)}
    assert {OmegaConf.load(folder() / f"layer/{name}.yaml")["_target_"] for name in choices("layer")} <= layers


def _layers(preset):
    return resolved(composed("train", [f"model={preset}"]))["model"]["layers"].values()


class Peeking(nn.Module):
    """A gate whose every token goes where the sum of some other rows says."""

    def __init__(self, num_experts, seen):
        super().__init__()
        self.num_experts, self.seen = num_experts, seen

    def forward(self, x_TD, group_T=None):
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
    """Whatever it looks at: the audit is not told."""
    model = flat("top_k")
    model.layers["middle"].gate = Peeking(6, PEEKS[peek])
    found = audited(model)
    assert not found.causal
    assert found.evaluation.largest_bits > 1e-3


def test_a_layer_that_peeks_is_found():
    """Not only gates: a mean over the batch in the place of a layer."""

    class Mean(nn.Module):
        def forward(self, x_TD, sentences):
            return x_TD.mean(dim=0, keepdim=True).expand_as(x_TD), None

    model = flat("top_k")
    model.layers["lower"] = Mean()
    assert not audited(model).causal


class Telling(nn.Module):
    """A model that reads the next input, and says it with probability 0.9."""

    def __init__(self):
        super().__init__()
        self.layers, self.embedding_VD = nn.ModuleDict(), nn.Parameter(torch.zeros(SIZE, 1))
        self.softmax = SimpleNamespace(token_nats=self.token_nats)

    def hidden(self, batch):
        """The input one timestep on, where the sentence goes on; else -1."""
        place = batch.sentences
        position_T = torch.arange(len(batch.input_T)) if place.position_T is None else place.position_T
        table = torch.full((place.num_steps * place.num_sentences + place.num_sentences,), -1)
        table[position_T] = batch.input_T
        return table[position_T + place.num_sentences].double().unsqueeze(1), {}

    def token_nats(self, hidden_TD, target_T):
        right_T = hidden_TD[:, 0].long() == target_T
        return -torch.where(right_T, 0.9, 0.1 / (SIZE - 1)).double().log()


def test_the_leak_is_measured_in_bits():
    """One sentence a micro-batch: a probe at t < last changes the prediction at t alone, by log2(0.9 * 39 / 0.1)."""
    one = Split(np.array([2, 3, 4, 5, END], np.int32), np.array([0, 5]), np.array([5], np.uint32))
    bits = math.log2(0.9 * (SIZE - 1) / 0.1)
    found = audited(Telling(), one, probes=40, words=5)
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
    """However many probes there are, each in its micro-batch."""
    found = audited(flat("top_k"), probes=40, words=200)
    assert found.probes == 40
    assert found.compared_tokens > 40
    assert found.words == SPLIT.num_words


def test_a_seed_repeats_the_audit_and_another_does_not():
    first, again, other = (audited(flat("expert_choice"), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.training.mean_bits != other.training.mean_bits


def test_the_model_trains_no_further_for_being_audited():
    """Everything is in eval mode again, and what adapts has not moved."""
    model = flat("expert_choice")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audited(model)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name].double(), value) for name, value in model.state_dict().items())


def test_nothing_to_probe_is_a_mistake():
    empty = Split(tokens=np.zeros(0, np.int32), starts=np.zeros(1, np.int64), words=np.zeros(0, np.uint32))
    with pytest.raises(UserError, match="no sentence to probe"):
        audited(flat("top_k"), empty)
