"""Initial weights: the same ones whoever draws them."""

import pytest
import torch

from moe_lm.ops import init as initial
from moe_lm.ops.init import init_experts_, init_words_


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_draw_what_one_draws(threads, set_threads, monkeypatch):
    """Of experts and of words, in blocks that do and do not come out even, and of a share of them."""
    drawn = []
    for count, least in ((1, 1 << 60), (threads, 0)):
        set_threads(count)
        monkeypatch.setattr(initial, "_MIN_PARALLEL_NUMEL", least)
        torch.manual_seed(3)
        experts, words = torch.zeros(7, 5, 4), torch.zeros(2500, 3)
        init_experts_(experts, 0.5, range(2, 9))
        init_words_(words, 0.5, range(1000, 3500))
        drawn.append((experts, words))
    for one, several in zip(*drawn, strict=True):
        assert torch.equal(one, several)
        assert (one != 0).all()


def test_in_inference_mode(set_threads, monkeypatch):
    """Which is one thread's own."""
    set_threads(2)
    monkeypatch.setattr(initial, "_MIN_PARALLEL_NUMEL", 0)
    with torch.inference_mode():
        words = torch.zeros(2500, 3)
        init_words_(words, 0.5, range(2500))
    assert (words != 0).all()
