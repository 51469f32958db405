"""How the tokens of a micro-batch are laid out, and how they are padded and unpadded.

Shape suffixes: L timesteps, B sentences, T tokens, D width.
"""

from collections import Counter
from functools import partial

import numpy as np
import torch

from moe_lm.data.batch import PaddedLayout, collate, lengths
from moe_lm.data.prepared import Split
from moe_lm.model.lstm import pad, unpad
from moe_lm.ops import sparse_rows

START, END = 0, 1


def split_of(length_N, words_per_token=1):
    """Sentences of these lengths, whose ids all differ."""
    starts = np.concatenate([[0], np.cumsum(length_N)])
    words = (np.asarray(length_N) * words_per_token).astype(np.uint32)
    return Split(tokens=np.arange(starts[-1], dtype=np.int32) + 2, starts=starts, words=words)


def test_layout_by_hand():
    """Sentences `5 6 </S>` and `7 </S>`: by timestep, then by sentence; inputs one timestep later after `<S>`."""
    split = Split(
        tokens=np.array([5, 6, END, 7, END], dtype=np.int32),
        starts=np.array([0, 3, 5]),
        words=np.array([2, 2], dtype=np.uint32),
    )
    batch = collate(split, np.array([0, 1]), START)
    assert batch.input_T.tolist() == [START, START, 5, 7, 6]
    assert batch.target_T.tolist() == [5, 7, 6, END, END]
    assert batch.layout.sentence_T.tolist() == [0, 1, 0, 1, 0]
    assert batch.layout.step_T.tolist() == [0, 0, 1, 1, 2]
    assert batch.layout.index_T.tolist() == [0, 1, 2, 3, 4]
    assert (batch.layout.num_steps, batch.layout.num_sentences, batch.num_words) == (3, 2, 4)
    reversed_order = collate(split, np.array([1, 0]), START)
    assert reversed_order.target_T.tolist() == [7, 5, END, 6, END]
    assert reversed_order.layout.index_T.tolist() == [0, 1, 2, 3, 5]
    assert batch.input_T.dtype == batch.target_T.dtype == batch.layout.sentence_T.dtype == torch.int64
    alone = collate(split, np.array([1]), START).layout
    assert alone.index_T is None
    assert (alone.step_T.tolist(), alone.sentence_T.tolist()) == ([0, 1], [0, 0])


def test_pad_and_unpad_are_inverse():
    """Tokens stand at their step and sentence, zeros elsewhere; gradients pass both ways."""
    for length_B in ([3, 1, 4], [2, 2], [5]):
        layout = collate(split_of(length_B), np.arange(len(length_B)), START).layout
        x_TD = torch.randn(sum(length_B), 2, dtype=torch.float64).requires_grad_()
        x_LBD, seen = pad(x_TD, layout), Counter()
        want_LBD = torch.zeros(max(length_B), len(length_B), 2, dtype=torch.float64)
        for row, sentence in zip(x_TD.detach(), layout.sentence_T.tolist(), strict=True):
            want_LBD[seen[sentence], sentence] = row
            seen[sentence] += 1
        assert torch.equal(x_LBD.detach(), want_LBD)
        assert torch.equal(unpad(x_LBD, layout), x_TD)
        assert torch.autograd.gradcheck(partial(pad, layout=layout), x_TD)
        assert torch.autograd.gradcheck(partial(unpad, layout=layout), x_LBD.detach().requires_grad_())


def test_padding_affects_neither_tokens_nor_gradients():
    """A NaN in the padding reaches no token, and the padding gets no gradient."""
    layout = PaddedLayout(2, 2, torch.tensor([0, 1, 3]))
    y_LBD = torch.tensor([[[1.0], [2.0]], [[float("nan")], [3.0]]]).requires_grad_()
    y_TD = unpad(y_LBD, layout)
    assert y_TD.tolist() == [[1.0], [2.0], [3.0]]
    y_TD.sum().backward()
    assert y_LBD.grad.tolist() == [[[1.0], [1.0]], [[0.0], [1.0]]]


def test_words_are_those_of_the_split_and_not_tokens():
    """With subwords a micro-batch counts words, as the split does."""
    batch = collate(split_of([2, 3, 7], words_per_token=3), np.arange(3), START)
    assert batch.num_words == 3 * len(batch.target_T)
    assert type(batch.num_words) is int


def test_lengths_count_the_end_of_sentence():
    """The length of a sentence is its number of targets."""
    assert lengths(split_of([3, 1, 5]), np.array([2, 0, 1])).tolist() == [5, 3, 1]


def test_a_copy_keeps_the_ids_on_the_cpu():
    """A copy on another device has the unique inputs there and on the CPU, if they were computed before."""
    batch = collate(split_of([3, 1, 4]), np.array([0, 1, 2]), START)
    assert batch.to(torch.device("cpu")) is batch
    assert not batch.inputs.is_found
    _ = batch.inputs.unique
    copy = batch.map(lambda x: x.to("meta"))
    assert copy.inputs.is_found
    row_U, index_T, cpu_U = copy.inputs.unique
    assert (row_U.device.type, index_T.device.type) == ("meta", "meta")
    assert cpu_U.tolist() == sorted(set(batch.input_T.tolist()))
    assert torch.equal(cpu_U[batch.inputs.unique[1]], batch.input_T)
    assert not copy.targets.is_found
    assert copy.targets.preceded_by(torch.tensor([7])).tolist() == [7, *batch.target_T.tolist()]
    assert (copy.num_words, copy.layout.num_steps) == (batch.num_words, 4)


def test_a_model_uses_the_unique_inputs(trainer, monkeypatch):
    """The model does not compute them again, and its gradients are the same."""
    trained, gradients = trainer(torch.device("cpu"), "softmax=full", "model.dropout=0"), []
    model = trained.model.eval()
    fresh, found = (trained.prefetcher.batches.step(0)[0] for _ in range(2))
    _ = found.inputs.unique
    computed, unique_inverse = [], sparse_rows.unique_inverse
    monkeypatch.setattr(sparse_rows, "unique_inverse", lambda x_T: computed.append(len(x_T)) or unique_inverse(x_T))
    for batch in (fresh, found):
        model.hidden(batch)[0].square().sum().backward()
        gradients.append(sparse_rows.row_grad(model.embedding.weight_VD))
        sparse_rows.clear_row_grads(model.embedding.weight_VD)
    assert computed == [len(fresh.input_T)]
    assert torch.equal(gradients[0].row_U, gradients[1].row_U)
    assert torch.equal(gradients[0].value_UD, gradients[1].value_UD)


def test_a_layout_without_padding_only_reshapes():
    """No value is copied."""
    x_TD, layout = torch.arange(12.0).view(6, 2), PaddedLayout(3, 2, None)
    assert pad(x_TD, layout).data_ptr() == unpad(pad(x_TD, layout), layout).data_ptr() == x_TD.data_ptr()
