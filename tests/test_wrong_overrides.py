"""Every wrong override of a training ends in one line that names it and says how to correct it."""

import re

import pytest
from omegaconf import OmegaConf
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm.cli.config import composed

# Overrides added to a valid training, and words that the line must contain.
TRAIN = [
    # Spelling.
    ("batch.word=3", "unknown key batch.word", "did you mean batch.words?"),
    ("model.widht=3", "unknown key model.widht", "did you mean model.width?"),
    ("bach=3", "unknown key bach", "did you mean batch?"),
    ("learning_rate=3", "unknown key learning_rate", "did you mean optimizer.learning_rate?"),
    ("batch={word: 3}", "batch.word", "did you mean batch.words?"),
    ("model.layers.middle.gat.noise_epsilon=1", "unknown key", "did you mean model.layers.middle.gate.noise_epsilon?"),
    ("layer@model.layers.midle=lstm", "unknown key layer@model.layers.midle", "layer@model.layers.middle?"),
    ("layer=lstm", "unknown key layer", "did you mean layer@model.layers."),
    ("model=moe_5", "model=moe_5: no such choice", "did you mean moe_256?", "moe_4"),
    ("softmax=samplde", "did you mean sampled?"),
    ("balance=[importanc]", "importanc", "did you mean importance?"),
    ("layer@model.layers.middle=lstmm", "did you mean lstm?"),
    ("gate@model.layers.middle.gate=noisy", "did you mean noisy_top_k?"),
    ("+unknown=3", "+unknown=3", "key=value"),
    ("++batch.words=3", "++batch.words=3", "key=value"),
    ("+layer@elsewhere=lstm", "+layer@elsewhere=lstm"),
    ("+corpus@elsewhere=text", "+corpus@elsewhere=text"),
    ("~seed", "~seed"),
    ("~softmax", "~softmax"),
    ("~balance", "~balance"),
    ("hydra.verbose=true", "hydra.verbose"),
    ("seed", "'seed' is no override", "key=value"),
    ("-m", "'-m' is no override"),
    ("seed=1,2", "seed=1,2", "sweep"),
    ("batch.words=[1", "batch.words=[1"),
    ("seed=${nope}", "nope"),
    ("seed=${oc.env:NO_SUCH_VARIABLE_HERE}", "NO_SUCH_VARIABLE_HERE"),
    ("seed=???", "seed=..."),
    # Types.
    ("batch=3", "batch=3", "batch.words"),
    ("training=3", "training=3", "training.num_words"),
    ("model=3", "model=3", "choose one of", "moe_4"),
    ("corpus=[sotu,text]", "corpus=[sotu,text]", "choose one of"),
    ("corpus=null", "corpus=null", "choose one of"),
    ("seed.x=3", "unknown key seed.x"),
    ("model.order.x=3", "x"),
    ("batch.words={a: 1}", "batch.words", "a whole number"),
    ("batch.words=many", "batch.words=many", "a whole number"),
    ("batch.words=[3]", "batch.words=[3]", "a whole number"),
    ("batch.words=200.5", "batch.words=200.5", "a whole number"),
    ("batch.words=null", "batch.words=null", "a whole number"),
    ("batch={words: many}", "batch.words=many", "a whole number"),
    ("seed=true", "seed=true", "a whole number"),
    ("balance.global_batch=3", "balance.global_batch=3", "true or false"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast", "a number"),
    ("model.order=3", "model.order=3", "a list"),
    ("model.order={a: 1}", "model.order={a: 1}"),
    ("model.order=[1,2]", "model.order", "[lower,middle,upper]"),
    ("model.layers.middle=3", "model.layers.middle=3", "layer@model.layers.middle=3"),
    ("model.layers.middle.gate=switch", "model.layers.middle.gate=switch", "gate@model.layers.middle.gate=switch"),
    ("corpus.train=[3]", "corpus.train", "3"),
    ("corpus.train=[[a]]", "corpus.train"),
    ("vocabulary.max_size=many", "max_size", "many"),
    ("vocabulary.file=[a]", "[a]"),
    # Sizes.
    ("model.num_experts=3 model.k=4", "model.k=4", "model.num_experts=3"),
    ("model.k=0", "model.k=0", "at least 1"),
    ("model.width=0", "model.width=0", "at least 1"),
    ("model.width=-8", "model.width=-8", "at least 1"),
    ("model.expert_hidden=0", "model.expert_hidden=0", "at least 1"),
    ("model.num_experts=0", "model.num_experts=0", "at least 1"),
    ("model.expert_hidden=8 model.width=0 model.order=[upper]", "model.num_experts=4", "no layer of model=moe_4 reads"),
    ("layer@model.layers.middle=lstm", "no layer of model=moe_4 reads model."),
    ("model=moe_1_wide", "no layer of model=moe_1_wide reads model.", "omit it"),
    ("model.dropout=1", "model.dropout=1", "below 1"),
    ("model.dropout=-0.1", "model.dropout=-0.1"),
    ("batch.words=0", "batch.words=0"),
    ("batch.words=-1 batch.micro_words=-1", "batch.words=-1"),
    ("batch.micro_words=0", "batch.micro_words=0"),
    ("batch.micro_words=201", "batch.micro_words=201", "micro_words <= words"),
    ("training.num_words=0", "training.num_words=0", "at least 1"),
    ("training.num_words=-5", "training.num_words=-5", "at least 1"),
    ("training.log_every=0", "training.log_every=0", "at least 1"),
    ("training.valid_every=-1", "training.valid_every=-1", "at least 1"),
    ("valid.max_sentences=0", "valid.max_sentences=0", "at least 1"),
    ("valid.max_sentences=-3", "valid.max_sentences=-3", "at least 1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0", "at least 1"),
    ("checkpoint.every_seconds=-1", "checkpoint.every_seconds=-1"),
    ("softmax.num_sampled=0", "softmax.num_sampled=0", "at least 1"),
    ("softmax.chunk_logits=0", "chunk_logits=0", "at least 1"),
    ("softmax=full softmax.chunk_logits=-1", "chunk_logits=-1", "at least 1"),
    ("softmax.samples=3 softmax=full ", "unknown key softmax.num_sampled", "softmax has chunk_logits"),
    ("lr=3", "unknown key lr", "--help"),
    ("schedule.warmup_steps=0", "schedule.warmup_steps=0", "at least 1"),
    ("optimizer.learning_rate=0", "learning_rate=0", "positive"),
    ("optimizer.clip_norm=-1", "clip_norm=-1", "positive"),
    ("vocabulary.min_count=0", "vocabulary.min_count=0"),
    ("vocabulary.max_size=3", "vocabulary.max_size=3"),
    ("corpus.max_words=0", "corpus.max_words=0"),
    ("seed=99999999999999999999999", "seed="),
    ("machine.device=tpu", "machine.device=tpu", "auto, cpu or cuda"),
    ("machine.threads=0", "machine.threads=0", "at least 1"),
    ("machine.threads=many", "machine.threads=many", "a whole number"),
    ("machine.threads=true", "machine.threads=true", "a whole number"),
    ("machine.precision=float8", "machine.precision=float8", "bfloat16"),
    # Layers.
    ("model.order=[lower,extra]", "extra", "+layer@model.layers.extra=lstm"),
    ("model.order=[lower,lower]", "model.order", "once"),
    ("+layer@model.layers.extra=lstm", "model.order", "extra"),
    # Text.
    ("corpus.train=[text/none.txt]", "corpus.train", "text/none.txt"),
    ("corpus.valid=[text]", "corpus.valid", "is a folder"),
    ("corpus.test=[]", "corpus.test=[...]"),
    ("corpus.test=[text/train.txt]", "corpus.train", "corpus.test"),
    ("vocabulary.file=none.txt", "none.txt", "vocabulary.file"),
    ("runs=text/train.txt", "text/train.txt/tiny"),
    ("data=text/train.txt", "text/train.txt"),
    ("name=" + 300 * "n", "too long"),
]


@pytest.mark.parametrize(("overrides", "expected"), [(row[0], row[1:]) for row in TRAIN], ids=lambda x: str(x)[:60])
def test_training_refuses(workspace, moe_lm, overrides, expected):
    overrides = re.split(r" (?=[\w.+~@]+=)", overrides)
    arguments = with_overrides(list(TRAINING), *overrides)
    if overrides[0] == "softmax=full":
        arguments.remove("softmax.num_sampled=16")
    assert_one_line(moe_lm("train", *arguments), *expected)


@pytest.mark.parametrize("override", ["model.expert_hidden=1e3", "model.k=2.0", "model.num_experts=8.0"])
def test_a_size_may_be_written_as_a_float(override):
    """The layers read it as a whole number."""
    key, value = override.split("=")
    config = composed("describe", ["model=moe_4", override])
    assert OmegaConf.select(config, key) == int(float(value))
