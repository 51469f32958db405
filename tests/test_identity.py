"""Which keys may change under a run's name and which may not."""

from pathlib import Path

import pytest
from tiny_training import TRAINING, with_overrides

from moe_lm.run import Run


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.k=3", "model.k"),
        ("model=moe_256_h model.num_groups=2", "model."),
        ("seed=2", "seed"),
        ("batch.micro_words=200", "batch.micro_words"),
        ("corpus.max_words=100", "corpus.max_words"),
        ("vocabulary.min_count=2", "vocabulary.min_count"),
        ("softmax.num_sampled=17", "softmax.num_sampled"),
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate"),
        ("schedule.warmup_steps=6", "schedule.warmup_steps"),
        ("balance.load.weight=0.2", "balance.load.weight"),
        ("balance.global_batch=false", "balance.global_batch"),
        ("balance=[load]", "balance.importance"),
        ("gate@model.layers.middle.gate=noisy_top_k model.layers.middle.gate.noise_epsilon=0.1", "noise_epsilon"),
        ("layer@model.layers.upper=feed_forward", "model.layers.upper"),
    ],
)
def test_another_run_under_the_same_name_is_refused(own_trained, moe_lm, override, key):
    before = Path("runs/tiny/config.yaml").read_bytes()
    outcome = moe_lm("train", *with_overrides(list(TRAINING), *override.split()))
    assert outcome.code == 2
    assert outcome.err.startswith(f"moe-lm: runs/tiny holds another run: {key}") or f"{key}=" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert Path("runs/tiny/config.yaml").read_bytes() == before


def test_machine_logging_and_checkpoint_may_change(own_trained, moe_lm):
    other = [
        "machine.precision=bfloat16",
        "checkpoint.every_seconds=50",
        "checkpoint.keep_last=1",
        "training.log_every=4",
    ]
    outcome = moe_lm("train", *with_overrides(list(TRAINING), *other, "training.num_words=3000"))
    assert outcome.code == 0, outcome.err
    assert "resumed at step" in outcome.err


def test_the_number_of_logits_in_memory_may_change(own_trained, moe_lm):
    """Also for a stored configuration with a number, an earlier default."""
    stored = Path("runs/tiny/config.yaml")
    stored.write_text(stored.read_text().replace("chunk_logits: null", "chunk_logits: 16777216"))
    assert "16777216" in stored.read_text()
    outcome = moe_lm("train", *with_overrides(list(TRAINING), "training.num_words=3000"))
    assert outcome.code == 0, outcome.err
    assert "resumed at step" in outcome.err
    assert "chunk_logits: null" in stored.read_text()


def test_a_first_attempt_that_failed_leaves_the_name_free(workspace, moe_lm):
    """Its vocabulary is replaced too."""
    assert moe_lm("train", *with_overrides(list(TRAINING), "corpus.train=[text/nowhere.txt]")).code == 2
    assert Path("runs/tiny/config.yaml").exists()
    run = Run(Path("runs/tiny"))
    run.keep_vocabulary(lambda folder: (folder / "vocabulary.txt").write_text("of another attempt"))
    assert moe_lm("train", *with_overrides(list(TRAINING), "vocabulary.min_count=20")).code == 0
    assert "of another" not in Path("runs/tiny/vocabulary/vocabulary.txt").read_text()
    assert moe_lm("score", "run=runs/tiny", "text/test.txt").code == 0
