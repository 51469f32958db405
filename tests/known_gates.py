"""Models whose gates are known, and text for them."""

from functools import partial

import numpy as np
import torch

from moe_lm.analysis.experts import Inspection
from moe_lm.analysis.experts.summary import Texts, summarize
from moe_lm.analysis.experts.tally import Reading, read
from moe_lm.data.prepared import Split
from moe_lm.data.vocabulary.words import WordVocabulary
from moe_lm.gate.noisy_top_k import NoisyTopK
from moe_lm.gate.strictly_balanced import StrictlyBalanced
from moe_lm.loss.softmax import FullSoftmax
from moe_lm.model.hierarchical_moe import HierarchicalMoE
from moe_lm.model.language_model import LanguageModel
from moe_lm.model.lstm import Lstm
from moe_lm.model.moe import MoE

NOISY = partial(NoisyTopK, noise_epsilon=0.01)
SOFTMAX = partial(FullSoftmax, chunk_logits=1000)
GATES = {"noisy_top_k": NOISY, "strictly_balanced": StrictlyBalanced}
MARKERS = ["</S>", "<S>", "<UNK>"]


def vocabulary_of(words: str) -> WordVocabulary:
    """The markers and these words."""
    return WordVocabulary(words=[*MARKERS, *words.split()], counts=None)


def split_of(vocabulary: WordVocabulary, sentences: list[str]) -> Split:
    """Sentences as a prepared split."""
    encoded = [[*vocabulary.encode(sentence), vocabulary.end] for sentence in sentences]
    tokens = np.array([i for ids in encoded for i in ids], dtype=np.int32)
    sizes = np.array([len(ids) for ids in encoded])
    return Split(tokens=tokens, starts=np.cumsum([0, *sizes]), words=sizes.astype(np.uint32))


def model_of(vocabulary: WordVocabulary, layers: dict, width: int) -> LanguageModel:
    """A language model of these layers in evaluation mode."""
    size = vocabulary.size
    model = LanguageModel(width=width, vocabulary_size=size, dropout=0.0, layers=layers, softmax=SOFTMAX)
    return model.eval()


def table_model(vocabulary: WordVocabulary, gates: dict[str, dict[int, float]], num_experts: int, k: int):
    """A mixture alone, whose gate knows the input word only: its experts and their values as listed."""
    layer = MoE(width=vocabulary.size, hidden=4, num_experts=num_experts, k=k, gate=NOISY)
    model = model_of(vocabulary, {"middle": layer}, vocabulary.size)
    with torch.no_grad():
        model.embedding.weight_VD.copy_(torch.eye(vocabulary.size))
        layer.gate.gate_DE.fill_(-1000.0)
        ids = {vocabulary.token(i): i for i in range(vocabulary.size)}
        for word, values in gates.items():
            for expert, value in values.items():
                layer.gate.gate_DE[ids[word], expert] = np.log(value)
    return model


def random_model(vocabulary: WordVocabulary, kind: str, *, gate: str, num_experts: int, k: int, groups: int = 1):
    """LSTM, mixture, LSTM, mixture with random gates: two layers of a kind."""
    torch.manual_seed(10)
    width = 8

    def mixture():
        sizes = {"width": width, "hidden": 4, "num_experts": num_experts, "k": k}
        if kind == "flat":
            return MoE(**sizes, gate=GATES[gate])
        return HierarchicalMoE(**sizes, num_groups=groups, primary_gate=GATES[gate], gate=GATES[gate])

    layers = {"lower": Lstm(width=width), "one": mixture(), "upper": Lstm(width=width), "two": mixture()}
    model = model_of(vocabulary, layers, width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_DE"):
                parameter.normal_(std=0.6)
        for module in model.modules():
            if isinstance(module, StrictlyBalanced):  # so that some tokens pass no threshold and some pass many
                module.gate_DE.normal_(std=0.2)
                module.threshold_E.uniform_(0.95 / module.num_experts, 1.2 / module.num_experts)
    return model


def reading_of(model, vocabulary, split, *, max_sentences=4, max_words=1000, contexts=5, sentences=None) -> Reading:
    """One reading of a split."""
    return read(
        model,
        split,
        start=vocabulary.start,
        sentences=split.num_sentences if sentences is None else sentences,
        num_contexts=contexts,
        max_sentences=max_sentences,
        max_words=max_words,
    )


def inspection_of(model, vocabulary, split, *, run="a run", words=12, **sizes) -> Inspection:
    """The whole record of a split."""
    reading = reading_of(model, vocabulary, split, **sizes)
    layers = summarize(reading, Texts(vocabulary, split), words)
    unique_inverse = int((reading.count_V > 0).sum())
    return Inspection(run, 7, "valid", reading.sentences, reading.words, reading.tokens, unique_inverse, layers)
