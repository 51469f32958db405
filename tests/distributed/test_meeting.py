"""Processes that cannot meet end by themselves."""

import socket
import time
from datetime import timedelta

import pytest
import torch

from moe_lm import distributed
from moe_lm.mistake import Mistake


def test_a_launcher_that_was_killed_is_not_waited_for(monkeypatch):
    """Its store was there before its processes were: one that finds none must not stay behind and wait for days."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in (places | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "SOON", timedelta(seconds=1))
    started = time.monotonic()
    with pytest.raises(Mistake, match="cannot meet the other processes"):
        distributed.begin(torch.device("cpu"))
    assert time.monotonic() - started < 15
