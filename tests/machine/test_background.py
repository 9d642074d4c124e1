"""Calls on another thread: they give what they would give here, and nobody waits for one."""

import contextvars
import gc
import threading
import time

import pytest
import torch

from rlhf_exp.machine.background import Background
from tests.app.test_run import one_thread


def test_calls_are_made_in_order_on_one_daemon_thread():
    background = Background("worker")
    threads = [background.submit(threading.current_thread) for _ in range(3)]
    assert len({future.result(10) for future in threads}) == 1
    thread = threads[0].result()
    assert (thread.name, thread.daemon) == ("worker", True)
    seen = []
    for i in range(20):
        future = background.submit(lambda i=i: seen.append(i))
    future.result(10)
    assert seen == list(range(20))


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_call_raises_is_raised_to_the_one_who_waits(error):
    def fail():
        raise error

    background = Background("worker")
    with pytest.raises(type(error)) as raised:
        background.submit(fail).result(10)
    assert raised.value is error
    assert background.submit(lambda: 7).result(10) == 7


def test_torch_and_contexts_are_set_as_they_are_here():
    def look():
        return torch.get_num_threads(), torch.is_grad_enabled(), variable.get()

    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    background = Background("worker")
    before = torch.get_num_threads()
    with one_thread(), torch.no_grad():
        assert background.submit(look).result(10) == (1, False, "set")
    assert background.submit(look).result(10) == (before, True, "set")
    assert torch.get_num_threads() == before


def test_the_same_numbers_come_out_bit_by_bit():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(301, 517, generator=generator) for _ in range(2))

    def compute():
        return (a @ b.T).softmax(dim=-1).sum(), (a * b).sum(), torch.rand(3)

    torch.manual_seed(5)
    here = compute()
    torch.manual_seed(5)
    there = Background("worker").submit(compute).result(30)
    assert all(torch.equal(x, y) for x, y in zip(here, there, strict=True))


def test_the_thread_ends_when_nobody_can_ask_any_more():
    background = Background("worker")
    thread = background.submit(threading.current_thread).result(10)
    assert thread.is_alive()
    del background
    gc.collect()
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not thread.is_alive()
