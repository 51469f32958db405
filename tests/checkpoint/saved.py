"""Models with random state and checkpoints of them; exports whose checksums are made to agree."""

import json
from pathlib import Path

import torch
from tiny_training import TRAINING, with_overrides

from moe_lm.atomic_io import checksum
from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.saver import Saver
from moe_lm.cli import machine as make
from moe_lm.cli.config import composed, resolved
from moe_lm.ops.sparse_rows import take_rows
from moe_lm.optim.composite import CompositeOptimizer

CHECKPOINTS = Path("runs/tiny/checkpoints")
LAST = CHECKPOINTS / "0000000012"
MODEL = "model/shard-00001-model-00001-of-00001.safetensors"
OPTIMIZER = "optimizer/shard-00001-model-00001-of-00001.safetensors"
EVALUATE = ("evaluate", "run=runs/tiny")
MORE = ("train", *with_overrides(list(TRAINING), "training.num_words=3000"))
NUM_WORDS = 31
DENSE = "optimizer.vocabulary=dense"
FACTORED = "optimizer.experts=factored"
LOSS_FREE = ("gate@model.layers.middle.gate=loss_free", "balance=[]")


def configuration(*overrides: str) -> dict:
    """The configuration of the tiny training with these overrides."""
    arguments = with_overrides(TRAINING, *overrides)
    if "softmax=full" in overrides:
        arguments.remove("softmax.num_sampled=16")
    return resolved(composed("train", arguments))


def built(config: dict, seed: int = 1, steps: int = 2) -> tuple[torch.nn.Module, CompositeOptimizer]:
    """A model whose parameters, buffers and moments are all random numbers."""
    torch.manual_seed(seed)
    model = make.build_model(config, NUM_WORDS)
    optimizer = make.build(config["optimizer"]).build(model)
    for parameter in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(parameter.data)
    for _ in range(steps):
        for parameter in model.parameters():
            if hasattr(parameter, "row_grads"):
                taken = take_rows(parameter, torch.randint(NUM_WORDS, (7,)))
                (taken * torch.randn_like(taken)).sum().backward()
            else:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments(model, optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state under a checkpoint's names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{kind}/{names[p]}": x for p, state in optimizer.state.items() for kind, x in state.items()}


def assert_same_bits(ours: dict, theirs: dict) -> None:
    """Both hold the same tensors."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def saver_in(folder: Path, logged: list | None = None, *, keep_last: int = 9, asynchronous: bool = False) -> Saver:
    """A saver whose log lines go to a list."""
    logged = [] if logged is None else logged
    return Saver(folder, keep_last=keep_last, asynchronous=asynchronous, log=logged.append)


def save(folder: Path, step: int, model, optimizer, state: dict | None = None, keep=frozenset()) -> Path:
    """Write a checkpoint; it must be there."""
    saves = saver_in(folder)
    saves.save(step, model, optimizer, state or {}, set(keep))
    assert saves.finish() is None
    path = checkpoint.path_of(folder, step)
    checkpoint.verify(path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sign(folder: str, *more: str) -> None:
    """Make export.json agree with the files, as somebody who forges an export would."""
    path = Path(folder, "export.json")
    record = json.loads(path.read_text())
    for name in {*record["files"], *more}:
        file = Path(folder, name)
        record["files"][name] = {"bytes": file.stat().st_size, "blake2b": checksum(file)}
    path.write_text(json.dumps(record))
