"""The processes that other tests use: an error ends all of them at once, and no call finds what another one left."""

import signal
import time

import pytest


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "ValueError: the mistake of rank 1"),
        ("warns", "UserWarning: the mistake of rank 1"),
        ("exits", "SystemExit: 0"),
        ("is killed", "rank 1: exit code -9"),
        ("hangs", "Timeout (0:00:02)!"),
    ],
)
def test_what_went_wrong_in_one_rank_is_said_at_once(ranks, tmp_path, how, said):
    ranks.run(1, "failing:state", None, tmp_path, meet=False)  # the servers have started
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"failing:wrong failed in 3 processes\n") as raised:
        ranks.run(3, "failing:wrong", how, tmp_path, timeout=2)
    assert time.monotonic() - started < 20
    assert said in str(raised.value)


def test_a_rank_finds_what_a_fresh_process_would(ranks, tmp_path, monkeypatch):
    """Also where ranks of one server come one after another, and whatever the test has set."""
    monkeypatch.setenv("FROM_THE_TEST", "1")
    for size in (4, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        found = ranks.run(size, "failing:state", None, folder, meet=False)
        for rank, state in enumerate(found):
            assert state["numbers"] == [str(rank), str(rank), str(size)]
            assert (state["folder"], state["from the test"]) == (str(folder), "1")
            assert (state["left"], state["handler"]) == (None, signal.SIG_DFL)
            assert (state["deterministic"], state["cached"]) == (False, 0)
        for draws in zip(*(state["drawn"] for state in found), strict=True):
            assert len(set(draws)) == size
        assert found[0]["hash"] != found[1]["hash"]  # so sets of names come in different orders
