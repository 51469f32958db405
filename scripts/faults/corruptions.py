"""Ways to damage the files of a checkpoint."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path


def _flip_bit(file: Path, draw: random.Random, first: int, last: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(first, last or len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _change_digit(file: Path, draw: random.Random, _: Path) -> None:
    text = file.read_text()
    at = draw.choice([found.start() for found in re.finditer(r"\d", text) if found.start() > text.index("progress")])
    file.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")


def _swap_with_optimizer(file: Path, _: random.Random, __: Path) -> None:
    content, other = file.read_bytes(), file.parent.parent / "optimizer" / file.name
    shutil.copy(other, file)
    other.write_bytes(content)


_ANY = "*/*.safetensors"
CORRUPTIONS: dict[str, tuple[str, Callable[[Path, random.Random, Path], object]]] = {
    "file cut": (_ANY, lambda file, draw, _: os.truncate(file, draw.randrange(1, file.stat().st_size))),
    "file empty": (_ANY, lambda file, *_: os.truncate(file, 0)),
    "bit of a header": (_ANY, lambda file, draw, _: _flip_bit(file, draw, 0, 100)),
    "bit of the model": ("model/*", lambda file, draw, _: _flip_bit(file, draw, file.stat().st_size // 2)),
    "bit of the optimizer": ("optimizer/*", lambda file, draw, _: _flip_bit(file, draw, file.stat().st_size // 2)),
    "digit of the state": ("state.json", _change_digit),
    "state cut": ("state.json", lambda file, draw, _: os.truncate(file, draw.randrange(file.stat().st_size))),
    "state missing": ("state.json", lambda file, *_: file.unlink()),
    "state of another": ("state.json", lambda file, _, before: shutil.copy(before, file)),
    "file missing": (_ANY, lambda file, *_: file.unlink()),
    "part missing": ("[mo]*", lambda folder, *_: shutil.rmtree(folder)),
    "file of another": (_ANY, lambda file, _, before: shutil.copy(before, file)),
    "files swapped": ("model/*", _swap_with_optimizer),
    "file too many": (_ANY, lambda file, *_: shutil.copy(file, file.with_name(f"more-{file.name}"))),
    "a pickle": (_ANY, lambda file, *_: file.write_bytes(b"\x80\x04K\x01.")),
    "nothing in it": ("state.json", lambda file, *_: (shutil.rmtree(file.parent), file.parent.mkdir())),
}
"""By name: files, one of which is damaged, and what damages it, given the same file of the checkpoint before."""


def corrupt(name: str, draw: random.Random, newest: Path, before: Path) -> None:
    """Damage the newest checkpoint of a run; `before` is the previous one."""
    pattern, damage = CORRUPTIONS[name]
    path = draw.choice(sorted(newest.glob(pattern)))
    damage(path, draw, before / path.relative_to(newest))
