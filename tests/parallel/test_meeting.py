"""Processes that cannot meet end by themselves."""

import ctypes
import os
import socket
import time
from datetime import timedelta

import pytest
import torch

from moe_lm.errors import PeerLost, UserError
from moe_lm.parallel import context as parallel
from moe_lm.parallel.signals import LAUNCHER, end_with_parent


def test_a_launcher_that_was_killed_is_not_waited_for(monkeypatch):
    """Its store was there before its processes were: one that finds none must not stay behind and wait for days."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in (places | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "AGENT_STORE_TIMEOUT", timedelta(seconds=1))
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot meet the other processes"):
        parallel.init_parallel(torch.device("cpu"))
    assert time.monotonic() - started < 15


def test_one_whose_launcher_has_gone_before_it_could_be_told(monkeypatch):
    """The signal that tells so comes only to a process that has asked for it in time."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)  # this process must not end with pytest's parent
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    end_with_parent()
    monkeypatch.setenv(LAUNCHER, "1" if os.getppid() != 1 else "2")
    with pytest.raises(PeerLost, match="has gone"):
        end_with_parent()
