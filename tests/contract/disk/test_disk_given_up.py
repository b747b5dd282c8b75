"""Restores from the disk that are given up, in every phase."""

import threading

import pytest
from batches import step
from faulty_codec import converse
from faulty_disk import FaultyCalls
from kv_oracle import LAYERS
from returns import (
    HISTORY,
    OPENING,
    comes_back,
    files,
    finish,
    flush,
    gone,
    idle,
    nothing_loading,
    returning,
)

from krul_sglang.runtime import epoch

pytestmark = pytest.mark.usefixtures("small_reads")


@pytest.mark.parametrize("layer", range(LAYERS))
def test_row_16_an_abort_while_the_disk_is_read(rig, calls, layer) -> None:
    calls.arm(hang=OPENING + layer)
    req = returning(rig, 7)
    assert calls.at_gate.wait(20)
    rig.abort(req)
    threading.Timer(0.1, calls.gate.set).start()
    rig.evict()
    rig.cache.restores.settle()
    idle(rig)
    calls.arm()
    assert comes_back(rig, 9) == len(HISTORY)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_row_16_a_flush_while_the_disk_is_read(rig, calls, root, layer) -> None:
    calls.arm(hang=OPENING + layer)
    req = returning(rig, 7)
    assert calls.at_gate.wait(20)
    rig.abort(req)
    before = files(root)
    flush(rig)
    calls.gate.set()
    calls.arm()
    assert not rig.nodes()
    assert files(root) == before
    req = returning(rig, 9)
    assert req.host_loaded_length == len(HISTORY), "a flush leaves the disk"
    assert not step(rig, [req])
    finish(rig, req)


@pytest.mark.parametrize("way", ["abort", "flush", "new weights"])
def test_row_16_what_is_read_ahead_in_the_queue_is_given_up(rig, calls, way) -> None:
    calls.arm(hang=OPENING + 1)
    req = rig.request([*HISTORY, 7])
    rig.cache.restores.prefetches.look_ahead([req])
    assert calls.at_gate.wait(20)
    assert rig.krul.store.ledger.snapshot()["loading"] > 0
    if way == "abort":
        rig.cache.restores.prefetches.look_ahead([])
    elif way == "flush":
        flush(rig)
    else:
        epoch.begin(rig.cache)
        gone(rig)
    calls.gate.set()
    calls.arm()
    nothing_loading(rig)
    other = returning(rig, 9)
    assert other.host_loaded_length == (0 if way == "new weights" else len(HISTORY))
    assert not step(rig, [other])
    finish(rig, other)


def test_new_weights_while_a_write_is_queued(make_rig, root) -> None:
    """What is being written may end; what waits behind it is not written."""
    rig = make_rig(overlapped=True, disk=root)
    calls = FaultyCalls()
    rig.krul.store.disk.disk._directory.calls = calls
    calls.hang_write = True
    converse(rig, HISTORY)
    rig.evict()
    assert calls.at_gate.wait(20)
    converse(rig, range(3000, 3090))
    rig.evict()
    rig.sealed()
    assert rig.krul.store.disk.unwritten > 1
    threading.Timer(0.1, calls.gate.set).start()
    writer = rig.krul.store.disk
    epoch.begin(rig.cache)
    assert writer.wait_written(20)
    rig.damaged.update(rig.krul.store._segments)
    assert len(files(root)) <= 1
    for history in (HISTORY, range(3000, 3090)):
        req = returning(rig, 7, history=history)
        assert req.host_loaded_length == 0
        assert not step(rig, [req])
        finish(rig, req)
    rig.evict()
    rig.sealed()
    assert len(files(root)) <= 1
