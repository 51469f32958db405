"""Batches laid out one step ahead: the same ones, in whatever order steps are asked for."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_lm.data.batching import Batches
from moe_lm.data.prefetch import Prefetcher
from moe_lm.data.prepared import Split
from moe_lm.ops import sparse_rows as rows
from moe_lm.ops.sparse_rows import UniqueIndices


def batches():
    """Two micro-batches a step, of sentences of 2 to 9 words that name themselves."""
    length = np.arange(400) % 8 + 2
    starts = np.concatenate([[0], np.cumsum(length)])
    split = Split(tokens=np.arange(starts[-1], dtype=np.int32) + 1, starts=starts, words=length.astype(np.uint32))
    return Batches(split, start=0, seed=3, words=40, micro_words=20)


def both(count):
    return list(range(count))


def contents(batch, numbers=(0, 1)):
    return [(batch[n].input_T.tolist(), batch[n].target_T.tolist(), batch[n].num_words) for n in numbers]


@pytest.mark.parametrize("steps", [[0, 1, 2], [5, 5, 6], [0, 7, 3, 4], [126, 127, 128, 129]], ids=str)
def test_the_same_batches(steps):
    """Steps in order, repeated, out of order, and over the end of a pool."""
    ahead, plain = Prefetcher(batches(), both, pinned=False), batches()
    for step in steps:
        batch = ahead.step(step)
        assert (batch.num_words, batch.num_tokens) == (plain.step(step).num_words, plain.step(step).num_tokens)
        assert contents(batch) == contents(plain.step(step))
        assert contents(batch) == contents(plain.step(step))  # asked for again, it is laid out again


def test_only_the_turns_of_this_process_and_the_idle_one():
    """A process without a micro-batch gets the shortest sentence; what is another's is not laid out."""
    ahead = Prefetcher(batches(), lambda count: [1, None], pinned=False)
    batch = ahead.step(0)
    assert set(batch.ready) == {1, None}
    assert torch.equal(batch.idle().target_T, batches().step(0).idle().target_T)
    assert contents(batch) == contents(batches().step(0))


def test_the_next_step_is_laid_out_by_another_thread():
    """While a step is computed the next one's micro-batches are made, and no others."""
    seen, source = [], batches()
    step = source.step
    source.step = lambda number: seen.append((number, threading.current_thread().name)) or step(number)
    ahead = Prefetcher(source, both, pinned=False)
    for number in (0, 1):
        ahead.step(number)
    ahead._next[1].result()
    assert [number for number, _ in seen] == [0, 1, 2]
    here = threading.current_thread().name
    assert [name == here for _, name in seen] == [True, False, False]


def test_a_fault_of_the_thread_is_told_where_its_batch_is_asked_for():
    """And not where another step is."""
    source = batches()
    step = source.step

    def broken(number):
        if number == 1:
            raise OSError("no such page")
        return step(number)

    source.step = broken
    ahead = Prefetcher(source, both, pinned=False)
    ahead.step(0)
    ahead.step(2)
    ahead.step(0)
    with pytest.raises(OSError, match="no such page"):
        ahead.step(1)


def test_for_a_gpu_distinct_inputs_are_found_ahead(monkeypatch):
    """Where it would wait for the host, in pinned memory; a copy has them on its device and still on the host."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)  # there is no GPU here
    batch = Prefetcher(batches(), both, pinned=True).step(0)
    monkeypatch.setattr(torch.Tensor, "unique", None)
    for number in (0, 1):
        micro = batch[number]
        assert all(any(x is row for x in pinned) for row in micro.input_rows)
        copy = micro._changed(lambda x: x.to("meta"))
        row_U, place_T, host_U = UniqueIndices(micro.input_T, None, replace(copy, source=micro).found_rows).found
        assert (row_U.device.type, place_T.device.type) == ("meta", "meta")
        assert host_U.tolist() == sorted(set(micro.input_T.tolist()))
        assert torch.equal(host_U[micro.input_rows[1]], micro.input_T)
    assert batches().step(0)[0].found_rows is None
    assert Prefetcher(batches(), both, pinned=False).step(0)[0].found_rows is None


def test_a_model_takes_the_rows_that_were_found(trainer, monkeypatch):
    """It finds none of the inputs' by itself, and its gradients are the same."""
    made, gradients = trainer(torch.device("cpu"), "softmax=full", "model.dropout=0"), []
    micro, model = made.batches.step(0)[0], made.model.eval()
    looked_for, find = [], rows.unique_inverse
    monkeypatch.setattr(rows, "distinct", lambda x_T: looked_for.append(len(x_T)) or find(x_T))
    for batch in (micro, micro.with_rows()):
        model.hidden(batch)[0].square().sum().backward()
        gradients.append(rows.row_grad(model.embedding_VD))
        rows.clear_row_grads(model.embedding_VD)
    assert looked_for == [len(micro.input_T)]
    assert torch.equal(gradients[0].row_U, gradients[1].row_U)
    assert torch.equal(gradients[0].value_UD, gradients[1].value_UD)
