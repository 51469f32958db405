"""Triton's compiler takes every kernel: its interpreter lets pass what the compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_kernels.py"


def test_for_a_hopper_gpu(tmp_path):
    """All kernels, and in each module every one that there is."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    for source in SCRIPT.parents[2].glob("moe_lm/**/triton_*.py"):
        text = source.read_text()
        kernels = {part.split("(")[0] for part in text.split("@triton.jit\ndef ")[1:]}
        # A function that another kernel calls is compiled with it.
        called = {name for name in kernels if text.count(f"{name}(") > 1}
        assert kernels - called <= compiled, source.name
        assert kernels & compiled, source.name
