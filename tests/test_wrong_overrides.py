"""Every wrong override of a training is refused in one line that names it and says how to correct it.

A row for each branch that refuses; test_wrong_inputs.py shows that the whole command prints the line.
"""

import re

import pytest
from omegaconf import OmegaConf
from tiny_training import TRAINING, assert_one_line, with_overrides

from moe_lm.cli.config import composed, resolved
from moe_lm.cli.data import prepared_data
from moe_lm.cli.training import check
from moe_lm.errors import UserError

# Overrides added to a valid training, and words that the line must contain.
COMPOSED = [
    # No override of a single key.
    ("seed", "'seed' is no override", "key=value"),
    ("batch.words=[1", "cannot read the override 'batch.words=[1'"),
    ("+unknown=3", "+unknown=3: keys can be neither added nor removed", "key=value"),
    ("++batch.words=3", "++batch.words=3", "key=value"),
    ("+layer@elsewhere=lstm", "+layer@elsewhere=lstm"),
    ("~seed", "~seed"),
    ("hydra.verbose=true", "unknown key hydra.verbose"),
    ("seed=1,2", "seed=1,2", "sweep"),
    ("model=3", "model=3", "choose one of", "moe_4"),
    ("corpus=[sotu,text]", "corpus=[sotu,text]", "choose one of"),
    # Spelling.
    ("batch.word=3", "unknown key batch.word", "did you mean batch.words?"),
    ("learning_rate=3", "unknown key learning_rate", "did you mean optimizer.learning_rate?"),
    ("batch={word: 3}", "batch.word", "did you mean batch.words?"),
    ("model.layers.middle.gat.noise_epsilon=1", "unknown key", "did you mean model.layers.middle.gate.noise_epsilon?"),
    ("layer@model.layers.midle=lstm", "unknown key layer@model.layers.midle", "layer@model.layers.middle?"),
    ("layer=lstm", "unknown key layer", "did you mean layer@model.layers."),
    ("lr=3", "unknown key lr", "--help"),
    ("softmax.samples=3 softmax=full", "unknown key softmax.num_sampled", "softmax has chunk_logits"),
    ("model=moe_5", "model=moe_5: no such choice", "did you mean moe_256?", "moe_4"),
    ("balance=[importanc]", "importanc", "did you mean importance?"),
    ("gate@model.layers.middle.gate=noisy", "did you mean noisy_top_k?"),
    # Values that are none.
    ("seed=${nope}", "nope"),
    ("seed=${oc.env:NO_SUCH_VARIABLE_HERE}", "NO_SUCH_VARIABLE_HERE"),
    ("seed=???", "seed=..."),
    # Types.
    ("training=3", "training=3: is a group of keys", "training.num_words"),
    ("model.layers.middle=3", "model.layers.middle=3", "layer@model.layers.middle=3"),
    ("model.layers.middle.gate=switch", "model.layers.middle.gate=switch", "gate@model.layers.middle.gate=switch"),
    ("seed.x=3", "unknown key seed.x"),
    ("model.order={a: 1}", "model.order={a: 1}"),
    ("batch.words={a: 1}", "batch.words", "a whole number"),
    ("batch.words=many", "batch.words=many", "a whole number"),
    ("batch.words=200.5", "batch.words=200.5", "a whole number"),
    ("batch.words=null", "batch.words=null", "a whole number"),
    ("batch={words: many}", "batch.words=many", "a whole number"),
    ("seed=true", "seed=true", "a whole number"),
    ("seed=99999999999999999999999", "seed=99999999999999999999999: is beyond 64 bits"),
    ("machine.threads=many", "machine.threads=many", "a whole number"),
    ("vocabulary.max_size=true", "vocabulary.max_size=true", "a whole number"),
    ("balance.global_batch=3", "balance.global_batch=3", "true or false"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast", "a number"),
    ("model.order=3", "model.order=3", "a list"),
    ("model.order=[1,2]", "model.order=[1,2]", "[lower,middle,upper]"),
    # What no layer reads, and a layer that is in no order.
    ("model.expert_hidden=8 model.order=[upper]", "model.num_experts=4", "no layer of model=moe_4 reads"),
    ("layer@model.layers.middle=lstm", "no layer of model=moe_4 reads model."),
    ("model=moe_1_wide", "no layer of model=moe_1_wide reads model.", "omit it"),
    ("+layer@model.layers.extra=lstm", "model.order", "extra"),
]
CHECKED = [
    ("model.num_experts=3 model.k=4", "model.k=4", "model.num_experts=3"),
    ("model.k=0", "model.k=0", "at least 1"),
    ("model.width=0", "model.width=0", "at least 1"),
    ("model.expert_hidden=0", "model.expert_hidden=0", "at least 1"),
    ("model.num_experts=0", "model.num_experts=0", "at least 1"),
    ("model.dropout=1", "model.dropout=1", "below 1"),
    ("model.dropout=-0.1", "model.dropout=-0.1"),
    ("batch.words=-1 batch.micro_words=-1", "batch.words=-1"),
    ("batch.micro_words=201", "batch.micro_words=201", "micro_words <= words"),
    ("training.num_words=0", "training.num_words=0", "at least 1"),
    ("training.log_every=0", "training.log_every=0", "at least 1"),
    ("training.valid_every=-1", "training.valid_every=-1", "at least 1"),
    ("valid.max_sentences=0", "valid.max_sentences=0", "at least 1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0", "at least 1"),
    ("checkpoint.every_seconds=-1", "checkpoint.every_seconds=-1"),
    ("softmax.num_sampled=0", "softmax.num_sampled=0", "at least 1"),
    ("softmax.chunk_logits=0", "chunk_logits=0", "at least 1"),
    ("softmax=full softmax.chunk_logits=-1", "chunk_logits=-1", "at least 1"),
    ("schedule.warmup_steps=0", "schedule.warmup_steps=0", "at least 1"),
    ("optimizer.learning_rate=0", "learning_rate=0", "positive"),
    ("optimizer.clip_norm=-1", "clip_norm=-1", "positive"),
    ("optimizer.experts=adm", "optimizer.experts=adm"),
    ("model.order=[lower,extra]", "extra", "+layer@model.layers.extra=lstm"),
    ("model.order=[lower,lower]", "model.order", "once"),
]
PREPARED = [
    ("vocabulary.min_count=0", "vocabulary.min_count=0"),
    ("vocabulary.max_size=3", "vocabulary.max_size=3"),
    ("corpus.max_words=0", "corpus.max_words=0"),
    ("corpus.train=[text/none.txt]", "corpus.train", "text/none.txt"),
    ("corpus.valid=[text]", "corpus.valid", "is a folder"),
    ("corpus.test=[]", "corpus.test=[...]"),
    ("corpus.test=[text/train.txt]", "corpus.train", "corpus.test"),
    ("vocabulary.file=[a]", "[a]", "vocabulary.file"),
    ("data=text/train.txt", "text/train.txt"),
]
WHOLE = [
    ("machine.device=tpu", "machine.device=tpu", "auto, cpu or cuda"),
    ("machine.threads=0", "machine.threads=0", "at least 1"),
    ("machine.precision=float8", "machine.precision=float8", "bfloat16"),
    ("runs=text/train.txt", "text/train.txt/tiny"),
    ("name=" + 300 * "n", "too long"),
]


def arguments_with(overrides: str) -> list[str]:
    """The arguments of the tiny training with these overrides."""
    each = re.split(r" (?=[\w.+~@]+=)", overrides)
    arguments = with_overrides(TRAINING, *each)
    if each[0] == "softmax=full":
        arguments.remove("softmax.num_sampled=16")
    return arguments


def assert_refused(function, expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        function()
    [line] = str(caught.value).splitlines()
    for words in expected:
        assert words in line, line


def rows(table):
    return pytest.mark.parametrize(("overrides", "expected"), [(r[0], r[1:]) for r in table], ids=lambda x: str(x)[:60])


@rows(COMPOSED)
def test_the_configuration_is_refused(overrides, expected):
    assert_refused(lambda: composed("train", arguments_with(overrides)), expected)


@rows(CHECKED)
def test_sizes_and_choices_are_refused_before_anything_is_built(overrides, expected):
    config = resolved(composed("train", arguments_with(overrides)))
    assert_refused(lambda: check(config), expected)


@rows(PREPARED)
def test_text_and_vocabulary_are_refused(workspace, overrides, expected):
    config = resolved(composed("train", arguments_with(overrides)))
    check(config)
    assert_refused(lambda: prepared_data(config, lambda line: None), expected)


@rows(WHOLE)
def test_training_refuses(workspace, moe_lm, overrides, expected):
    assert_one_line(moe_lm("train", *arguments_with(overrides)), *expected)


@pytest.mark.parametrize("override", ["model.expert_hidden=1e3", "model.num_experts=8.0"])
def test_a_size_may_be_written_as_a_float(override):
    """The layers read it as a whole number."""
    key, value = override.split("=")
    config = composed("describe", ["model=moe_4", override])
    assert OmegaConf.select(config, key) == int(float(value))
