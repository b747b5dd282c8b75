"""Calls that may hang: made elsewhere, noticed, not repeated while they do."""

import gc
import threading
import time
import weakref

import pytest

from krul_sglang.store.watch import StalledError, Watch


@pytest.fixture
def watch():
    watch = Watch(0.05)
    yield watch
    watch.close()


def test_what_a_call_returns_or_raises_comes_back(watch) -> None:
    assert watch.call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        watch.call(lambda: 1 // 0)
    assert not watch.stalled


def test_a_call_that_hangs_is_left_behind_and_nothing_is_asked_until_it_returns(watch) -> None:
    gate, asked = threading.Event(), []
    with pytest.raises(StalledError):
        watch.call(gate.wait)
    assert watch.stalled
    began = time.monotonic()
    with pytest.raises(StalledError):
        watch.call(lambda: asked.append(1))
    assert time.monotonic() - began < 0.04, "it is not tried while the other one hangs"
    gate.set()
    while watch.stalled:
        time.sleep(0.001)
    assert watch.call(lambda: 7) == 7
    assert not asked


def test_calls_on_threads_of_others_are_watched_too(watch) -> None:
    with watch.around():
        assert not watch.stalled
        time.sleep(0.06)
        assert watch.stalled
        with pytest.raises(StalledError):
            watch.call(lambda: 7)
    assert watch.call(lambda: 7) == 7


def test_what_a_failed_call_had_open_goes_with_its_error(watch) -> None:
    """Not when the garbage collector next comes by: it may be a file of many megabytes."""

    class Opened:
        pass

    held = []

    def read() -> None:
        payload = Opened()
        held.append(weakref.ref(payload))
        raise ValueError(payload)

    gc.disable()
    try:
        for _ in range(20):
            with pytest.raises(ValueError, match="Opened"):
                watch.call(read)
        assert watch.call(lambda: 7) == 7, "the thread has let go of those before"
        assert [ref() for ref in held] == [None] * 20
    finally:
        gc.enable()
