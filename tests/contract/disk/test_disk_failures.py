"""Restores from the disk, overlapped with a forward pass: reads that fail, and reads that never
return."""

import errno
import time

import pytest
from batches import step
from faulty_codec import converse
from faulty_disk import FaultyCalls
from kv_oracle import LAYERS
from returns import HISTORY, OPENING, again, comes_back, files, finish, idle, returning, store

from krul_sglang.runtime import restoring

pytestmark = pytest.mark.usefixtures("small_reads")


def test_a_layer_is_a_read(rig, calls) -> None:
    calls.arm()
    req = returning(rig, 7)
    assert req.host_loaded_length == len(HISTORY)
    assert not step(rig, [req])
    assert calls.reads == OPENING + LAYERS
    finish(rig, req)


# ---- row 12: a restore fails at layer k -------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, None], ids=["EIO", "the file ends"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_row_12_a_read_that_fails_at_a_layer_is_a_recompute(rig, calls, root, layer, error) -> None:
    """And a file is set aside only for what is in it, not for a device that fails."""
    calls.error, before = error, files(root)
    calls.arm(fail=OPENING + layer)
    req = returning(rig, 7, 8)
    failed = step(rig, [req])
    assert failed == [req]
    assert rig.krul.store.lost_count > 0
    assert rig.krul.store.disk.wait_written(20)
    unreadable = rig.krul.store.disk.disk.totals()["unreadable"]
    assert (files(root) == before, unreadable) == ((False, 0) if error is None else (True, 1))
    calls.arm()
    again(rig, failed)
    assert rig.krul.counters.misses == 1
    assert comes_back(rig, 9) >= len(HISTORY), "what was recomputed is stored anew"
    assert rig.krul.store.lost_count == 0


@pytest.mark.parametrize("read", range(OPENING))
def test_row_12_a_file_that_cannot_be_opened_is_a_recompute(rig, calls, read) -> None:
    calls.arm(fail=read)
    req = returning(rig, 7, 8)
    calls.arm()
    assert req.host_loaded_length == 0
    assert not step(rig, [req])
    finish(rig, req)
    assert comes_back(rig, 9) >= len(HISTORY)


# ---- row 13: a reader that never returns ------------------------------------


@pytest.fixture
def impatient(rig, monkeypatch) -> None:
    # Long enough for a busy machine to open a file in.
    monkeypatch.setattr(restoring, "PATIENCE", 0.5)
    rig.krul.store.disk.watch.seconds = 0.5


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("layer", range(LAYERS))
def test_row_13_a_read_that_never_returns_is_given_up(rig, calls, root, layer) -> None:
    """And nobody else waits for the disk until it does; then what lies there is as good as ever."""
    calls.arm(hang=OPENING + layer)
    req = returning(rig, 7)
    assert calls.at_gate.wait(20)
    failed = step(rig, [req])
    assert failed == [req]
    assert rig.cache.restores.totals.late == 1
    began = time.monotonic()
    again(rig, failed, hanging=True)
    store(rig, range(3000, 3090))
    other = returning(rig, 7, history=range(3000, 3090))
    assert other.host_loaded_length == 0
    assert not step(rig, [other])
    finish(rig, other, hanging=True)
    assert time.monotonic() - began < 10
    before = files(root)
    calls.gate.set()
    calls.arm()
    while rig.krul.store.disk.watch.stalled:
        time.sleep(0.001)
    assert files(root) == before, "slow is not damaged"
    rig.krul.store.disk.watch.seconds = 20
    assert comes_back(rig, 9) >= len(HISTORY)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("read", range(OPENING))
def test_row_13_a_file_that_never_opens_is_a_miss(rig, calls, root, read) -> None:
    before = files(root)
    calls.arm(hang=read)
    req = returning(rig, 7)
    assert req.host_loaded_length == 0
    assert not step(rig, [req])
    finish(rig, req, hanging=True)
    calls.gate.set()
    assert files(root) == before, "nothing says that it is damaged"
    while rig.krul.store.disk.watch.stalled:
        time.sleep(0.001)
    rig.krul.store.disk.watch.seconds = 20
    assert comes_back(rig, 9) >= len(HISTORY)


def test_row_13_a_restart_on_a_disk_that_hangs_serves(make_rig, root) -> None:
    first = make_rig(overlapped=True, disk=root)
    store(first)
    first.close()
    rig = make_rig(overlapped=True, disk=root)
    calls = FaultyCalls()
    rig.krul.store.disk.disk._directory.calls = calls
    rig.krul.store.disk.watch.seconds = 0.05
    calls.arm(hang=0)
    req = returning(rig, 7)
    assert req.host_loaded_length == 0
    assert not step(rig, [req])
    finish(rig, req, hanging=True)
    calls.gate.set()
    idle(rig)


def test_row_13_a_write_that_never_returns_leaves_memory_serving(rig, calls) -> None:
    calls.hang_write = True
    converse(rig, range(3000, 3090))
    rig.evict()
    assert calls.at_gate.wait(20)
    rig.sealed()
    req = returning(rig, 7, history=range(3000, 3090))
    assert req.host_loaded_length == 90
    assert not step(rig, [req])
    finish(rig, req)
    assert rig.krul.store.disk.unwritten > 0
    calls.gate.set()
    rig.written()
