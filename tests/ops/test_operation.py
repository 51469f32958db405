"""The table that chooses an operation's implementation."""

import contextlib
import subprocess
import sys

import pytest
import torch

from moe_lm.ops import operation as module
from moe_lm.ops.operation import operation, reference_only, triton_runs


@operation
def double(x, *, times=2):
    """Return x doubled."""
    return f"reference {times * x}"


double.register("math:sqrt", when=lambda x, **_: x == 16)
double.register(lambda x, *, times=2: f"large {times * x}", when=lambda x, **_: x > 10)


def test_the_first_version_that_accepts_the_arguments_runs():
    """Else the reference does; keyword arguments reach every version."""
    assert double(1) == "reference 2"
    assert double(11, times=3) == "large 33"
    assert double(16) == 4
    assert (double.__name__, double.__doc__) == ("double", "Return x doubled.")


def test_reference_only():
    """Inside the context only references run, also when it is nested and when an error leaves it."""
    with reference_only():
        with contextlib.suppress(KeyError), reference_only():
            raise KeyError
        assert double(11) == "reference 22"
    assert double(11) == "large 22"


def test_triton_runs_on_its_devices_without_float64(triton_on_cpu):
    """Tests of the interpreter make the CPU such a device."""
    assert triton_runs(torch.ones(1))
    assert triton_runs(torch.ones(1).bfloat16())
    assert not triton_runs(torch.ones(1).double())
    assert not triton_runs(torch.ones(1, device="meta"))


@pytest.mark.parametrize("found", [True, False], ids=["does not compile", "missing"])
def test_without_triton_pytorch_does_the_work(found, monkeypatch, recwarn):
    """One line says that Triton does not compile; nothing is said where it is not installed."""
    monkeypatch.setattr(module, "find_spec", lambda name: found or None)
    monkeypatch.setitem(sys.modules, "moe_lm.ops.triton.rows", None)
    assert module._triton_compiles.__wrapped__("cpu") is False
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == found
    assert all("PyTorch operators run instead" in message for message in messages)


def test_versions_are_imported_when_they_run():
    """A CPU never imports Triton."""
    program = "import sys, moe_lm.model.moe, moe_lm.gate.noisy_top_k; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
