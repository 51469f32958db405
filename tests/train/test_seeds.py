"""What is drawn in training depends on seed, step and micro-batch alone: noise, dropout and sampled words."""

import torch


def drawn_from(made, step: int, monkeypatch) -> tuple[list[int], list[int]]:
    """Return torch's seed in each forward pass of a step, and the seed of the sampled words in each."""
    noise, words = [], []
    model = made.train_step.model

    def forward(hidden_TD, targets, seed, forward=model.softmax.forward):
        noise.append(torch.initial_seed())
        words.append(seed)
        return forward(hidden_TD, targets, seed)

    with monkeypatch.context() as patched:
        patched.setattr(model.softmax, "forward", forward)
        assert made.train_step(made.prefetcher.batches.step(step), step, 1e-3).updated
    return noise, words


def test_each_step_and_micro_batch_draws_anew(trainer, monkeypatch):
    """Each micro-batch has its own noise; a step has one set of sampled words; a repeated step draws the same."""
    made = trainer(torch.device("cpu"), "batch.words=90", "batch.micro_words=30")
    steps = [drawn_from(made, step, monkeypatch) for step in range(3)]
    noise, words = zip(*steps, strict=True)
    assert [len(of_step) for of_step in noise] == [3] * 3
    assert len({seed for of_step in noise for seed in of_step}) == 9
    assert [len(set(of_step)) for of_step in words] == [1] * 3
    assert len({seed for of_step in words for seed in of_step}) == 3
    assert drawn_from(made, 0, monkeypatch) == steps[0]
    other = trainer(torch.device("cpu"), "batch.words=90", "batch.micro_words=30", "seed=2")
    assert not set(drawn_from(other, 0, monkeypatch)[0]) & set(noise[0])
