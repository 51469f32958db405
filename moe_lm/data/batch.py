"""Sentences as a micro-batch: tokens without padding, and the layout that pads them for an LSTM.

Shape suffixes: L timesteps, B sentences, T tokens, D width, U distinct input ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_lm.data.prepared import Split
from moe_lm.ops.sparse_rows import UniqueIndices


@dataclass(frozen=True)
class PaddedLayout:
    """Where the tokens of a micro-batch stand in the padded (L, B) array of its sentences.

    Tokens are ordered by timestep and then by sentence, as in torch's `PackedSequence`.
    """

    num_steps: int
    num_sentences: int
    index_T: Tensor | None
    """Index of each token in the flattened padded array (int64, ascending); None where nothing is padded."""
    input_T: Tensor | None = None
    """Id of each token's input word (int64), for gates that read it; the model fills it in."""

    @property
    def step_T(self) -> Tensor:
        """Timestep of each token (int64)."""
        return self._indices() // self.num_sentences

    @property
    def sentence_T(self) -> Tensor:
        """Sentence of the micro-batch that each token belongs to (int64)."""
        return self._indices() % self.num_sentences

    def _indices(self) -> Tensor:
        return torch.arange(self.num_steps * self.num_sentences) if self.index_T is None else self.index_T


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Whole sentences that pass through the model together; targets are the inputs one timestep later."""

    inputs: UniqueIndices
    """`<S>` and all tokens of each sentence but its last, in the order of `layout`: the embedding rows to gather."""
    targets: UniqueIndices
    """The token that follows each input, `</S>` at the end of each sentence: the softmax rows to gather."""
    layout: PaddedLayout
    num_words: int
    """Words that the targets spell, `</S>` included: the divisor of perplexity."""

    @property
    def input_T(self) -> Tensor:
        """Ids of the inputs (int64)."""
        return self.inputs.row_T

    @property
    def target_T(self) -> Tensor:
        """Ids of the targets (int64)."""
        return self.targets.row_T

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on this device; the CPU keeps the ids too."""
        if device.type == "cpu":
            return self
        return self.pin_memory().map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in page-locked memory, from which a GPU copies asynchronously."""
        return self.map(lambda x: x.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro-batch with `function` applied to each of its tensors."""
        index_T = None if self.layout.index_T is None else function(self.layout.index_T)
        layout = replace(self.layout, index_T=index_T)
        return replace(self, inputs=self.inputs.map(function), targets=self.targets.map(function), layout=layout)


def collate(split: Split, indices: np.ndarray, start: int) -> MicroBatch:
    """Return these sentences of a split as a micro-batch; `start` is the id of `<S>`."""
    length_B = lengths(split, indices)
    num_steps, num_sentences = int(length_B.max()), len(indices)
    step_L1 = np.arange(num_steps)[:, None]
    present_LB = step_L1 < length_B
    index_T = np.flatnonzero(present_LB)
    offset_LB = split.starts[indices] + step_L1
    target_T = split.tokens[offset_LB[present_LB]].astype(np.int64)
    target_LB = np.empty((num_steps, num_sentences), dtype=np.int64)
    target_LB[present_LB] = target_T
    input_LB = np.concatenate([np.full((1, num_sentences), start, dtype=np.int64), target_LB[:-1]])
    is_padded = len(index_T) < num_steps * num_sentences
    return MicroBatch(
        inputs=UniqueIndices(torch.from_numpy(input_LB[present_LB])),
        targets=UniqueIndices(torch.from_numpy(target_T)),
        layout=PaddedLayout(num_steps, num_sentences, torch.from_numpy(index_T) if is_padded else None),
        num_words=int(split.words[indices].sum()),
    )


def lengths(split: Split, indices: np.ndarray) -> np.ndarray:
    """Return the number of targets of each of these sentences, `</S>` included."""
    return np.asarray(split.starts[indices + 1] - split.starts[indices])
