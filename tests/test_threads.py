"""Works at the same time: each once, with one thread, and nothing lost of what they raise."""

import multiprocessing
import threading

import pytest
import torch

from moe_lm import thread_pool as threads
from moe_lm.cli import machine as make
from moe_lm.thread_pool import run_parallel


@pytest.fixture(autouse=True)
def two_threads(set_threads):
    """As on two cores."""
    set_threads(2)


def test_all_run_at_the_same_time():
    """Each waits for the others; each has one thread and no autograd, and who asked keeps what it had."""
    threads._pool.cache_clear()  # of the threads that other works began any three may do these
    together, seen = threading.Barrier(3, timeout=60), []

    def work():
        together.wait()
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name))

    run_parallel([together.wait] * 3)  # nothing that asks for the number
    for _ in range(2):
        run_parallel([work] * 3)
    assert {state[:2] for state in seen} == {(1, False)}
    assert len(seen) == 6
    assert len({name for *_, name in seen}) == 3
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_one_runs_here():
    """A single work needs no thread."""
    seen = []
    run_parallel([lambda: seen.append(threading.current_thread())])
    assert seen == [threading.current_thread()]


def test_an_error_comes_when_all_have_ended():
    """What one raises is raised here, and the others are not left running."""
    done = []

    def fails():
        raise MemoryError("no room")

    def slow():
        torch.randn(400, 400) @ torch.randn(400, 400)
        done.append(True)

    with pytest.raises(MemoryError, match="no room"):
        run_parallel([fails, slow])
    assert done == [True]


def _in_child(queue):
    seen = []
    run_parallel([lambda: seen.append(1), lambda: seen.append(2)])
    queue.put(sorted(seen))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    """A fork has none of its parent's threads."""
    run_parallel([lambda: None, lambda: None])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [1, 2]
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize(
    ("asked", "device", "left"), [(None, "cpu", 2), (2, "cuda", 2), (None, "cuda", 1)], ids=["CPU", "asked for", "GPU"]
)
def test_training_on_a_gpu_leaves_the_cpus_threads(asked, device, left):
    """To others on the machine, unless they were asked for."""
    make.leave_threads(asked, torch.device(device))
    assert torch.get_num_threads() == left


def test_a_training_leaves_them_once_its_weights_are_drawn(trainer, monkeypatch):
    """As `machine.threads` and its device ask."""
    asked = []
    monkeypatch.setattr(make, "leave_threads", lambda *arguments: asked.append(arguments))
    trainer(torch.device("cpu"), "machine.threads=2")
    assert asked == [(2, torch.device("cpu"))]
