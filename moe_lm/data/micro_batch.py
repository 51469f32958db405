"""Whole sentences laid out to pass through the model together.

Shape suffixes: L timesteps, B sentences, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moe_lm.data.prepared import Split
from moe_lm.data.sentences import Sentences
from moe_lm.data.unique import unique_inverse


@dataclass(frozen=True)
class MicroBatch:
    """Whole sentences that pass through the model together; input and target are one timestep apart."""

    input_T: Tensor
    """int64: `<S>` and all tokens of each sentence but the last, by timestep and then by sentence."""
    target_T: Tensor
    """int64: the token that follows, `</S>` at each sentence's end."""
    sentences: Sentences
    sentence_T: Tensor
    """int64: which sentence of the micro-batch a token belongs to."""
    num_words: int
    """Words that the targets spell, `</S>` included: what perplexity divides by."""
    source: "MicroBatch | None" = field(default=None, compare=False, repr=False)
    """What this one is a copy of, on a GPU."""
    input_rows: "tuple[Tensor, Tensor] | None" = field(default=None, compare=False, repr=False)
    """The distinct inputs, ascending, and where among them each input is, where they were found ahead (int64)."""

    @property
    def on_host(self) -> "tuple[Tensor, Tensor] | tuple[None, None]":
        """Inputs and targets in the host's memory, where it has them: who reads these does not wait for a GPU."""
        there = self if self.source is None and self.input_T.device.type == "cpu" else self.source
        return (None, None) if there is None else (there.input_T, there.target_T)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on this device."""
        if device.type == "cpu":
            return self
        pinned = self.pinned()
        return replace(pinned._changed(lambda x: x.to(device, non_blocking=True)), source=pinned)

    @property
    def found_rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`input_rows` and once more the first of them, in the host's memory; None where not found ahead."""
        if self.input_rows is None:
            return None
        return *self.input_rows, (self if self.source is None else self.source).input_rows[0]

    def with_rows(self) -> "MicroBatch":
        """Return the same with its `input_rows` found."""
        return replace(self, input_rows=unique_inverse(self.input_T))

    def pinned(self) -> "MicroBatch":
        """Return a copy in memory from which a GPU reads by itself; the same where it lies there already."""
        return self._changed(lambda x: x.pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        place = self.sentences
        position_T = None if place.position_T is None else change(place.position_T)
        return MicroBatch(
            change(self.input_T),
            change(self.target_T),
            Sentences(place.num_steps, place.num_sentences, position_T),
            change(self.sentence_T),
            self.num_words,
            input_rows=None if self.input_rows is None else tuple(map(change, self.input_rows)),
        )


def micro_batch(split: Split, indices: np.ndarray, start: int) -> MicroBatch:
    """Lay these sentences out timestep by timestep, without padding in the tokens."""
    length_B = lengths(split, indices)
    num_steps, num_sentences = int(length_B.max()), len(indices)
    step_L1 = np.arange(num_steps)[:, None]
    present_LB = step_L1 < length_B
    position_T = np.flatnonzero(present_LB)
    offset_LB = split.starts[indices] + step_L1
    target_T = split.tokens[offset_LB[present_LB]].astype(np.int64)
    rectangle = np.full((num_steps, num_sentences), start, dtype=np.int64)
    rectangle[present_LB] = target_T
    input_LB = np.concatenate([np.full((1, num_sentences), start, dtype=np.int64), rectangle[:-1]])
    padded = len(position_T) < num_steps * num_sentences
    return MicroBatch(
        input_T=torch.from_numpy(input_LB[present_LB]),
        target_T=torch.from_numpy(target_T),
        sentences=Sentences(num_steps, num_sentences, torch.from_numpy(position_T) if padded else None),
        sentence_T=torch.from_numpy(position_T % num_sentences),
        num_words=int(split.words[indices].sum()),
    )


def idle(split: Split, indices: np.ndarray, start: int) -> MicroBatch:
    """Return the shortest of these sentences alone: the least that can go through a model."""
    return micro_batch(split, indices[[int(lengths(split, indices).argmin())]], start)


def lengths(split: Split, indices: np.ndarray) -> np.ndarray:
    """Return how many tokens each of these sentences predicts, `</S>` included."""
    return np.asarray(split.starts[indices + 1] - split.starts[indices])
