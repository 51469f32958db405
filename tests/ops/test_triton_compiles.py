"""Triton's compiler takes every kernel: its interpreter lets pass what the compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.slow
def test_for_a_hopper_gpu(tmp_path):
    """Every kernel of every module compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    texts = {source.name: source.read_text() for source in SCRIPT.parents[2].glob("moe_lm/ops/triton/*.py")}
    texts = {name: text for name, text in texts.items() if "@triton.jit" in text}
    assert len(texts) > 5
    for name, text in texts.items():
        kernels = {part.split("(")[0] for part in text.split("@triton.jit\ndef ")[1:]}
        # A function that another kernel calls is compiled with it.
        called = {kernel for kernel in kernels if text.count(f"{kernel}(") > 1}
        assert kernels - called <= compiled, name
        assert kernels & compiled, name
