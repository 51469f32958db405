"""A study of configs/study: runs to train with what they share, in one size or in several."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from moe_lm.atomic_io import write_text
from moe_lm.cli.config import choices, folder
from moe_lm.errors import UserError


@dataclass(frozen=True)
class Study:
    """One size of a study."""

    study: str
    scale: str | None
    """The size, None where the study has only one."""
    notes: list[str]
    """What it can show and what not, for the report."""
    parallel: int | str
    """Runs at a time, or `auto`."""
    overrides: list[str]
    """Overrides of `train` that all runs share."""
    runs: list[str]
    """Each run's own overrides, as one types them."""
    audit: bool = False
    """Whether each finished run is audited too."""
    given: list[str] = field(default_factory=list)
    """What the command line put in the place of the study's values."""

    @property
    def folder(self) -> Path:
        """Where the runs go unless the command says otherwise: another scale is another folder."""
        return Path("runs") / "-".join(filter(None, (self.study, self.scale)))

    def save(self, path: Path) -> None:
        """Keep what a report tells of the study."""
        write_text(path, yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True))


def study_of(name: str, scale: str | None) -> Study:
    """Return a study in a scale, or in its own choice of one; raises `UserError` for what it does not have."""
    if name not in choices("study"):
        raise UserError(f"study={name}: no such study; there are {', '.join(choices('study'))}")
    content = yaml.safe_load((folder() / "study" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "scales" not in content:
        if scale:
            raise UserError(f"scale={scale}: study={name} has one size only: leave scale away")
        return Study(study=name, scale=None, **content)
    scale = scale or content["scale"]
    if scale not in content["scales"]:
        raise UserError(f"scale={scale}: study={name} has scale={' and scale='.join(content['scales'])}")
    return Study(study=name, scale=scale, **content["scales"][scale])
