"""Restores from the disk, overlapped with a forward pass: every way they can fail or be given
up, tiers side by side, and what operators do to the directory meanwhile."""

import errno
import threading
import time
from pathlib import Path

import pytest
from batches import step
from faulty_codec import converse
from faulty_disk import FaultyCalls
from kv_oracle import LAYERS, oracle
from tree_rig import FINGERPRINT, Rig

from krul_sglang.codec import lossless
from krul_sglang.restore.load import Loader
from krul_sglang.runtime import epoch, restoring
from krul_sglang.store import durable
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, forget, gc, verify

HISTORY = list(range(1000, 1120))
OPENING = 3
"""Reads that opening a file takes: its head, and two of the payload."""


@pytest.fixture(autouse=True)
def small_reads(monkeypatch) -> None:
    """A read a layer: the rig's files are far shorter than one of ours."""
    monkeypatch.setattr(durable, "HEAD_BYTES", 16)
    monkeypatch.setattr(durable, "AHEAD_BYTES", 1)
    monkeypatch.setattr(lossless, "GROUP_SCALARS", 1)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def calls() -> FaultyCalls:
    return FaultyCalls()


@pytest.fixture
def rig(make_rig, root, calls) -> Rig:
    """A conversation of 121 tokens that only the disk has."""
    rig = make_rig(overlapped=True, disk=root)
    rig.krul.store.disk.disk._directory.calls = calls
    store(rig)
    yield rig
    calls.gate.set()


def store(rig: Rig, tokens=HISTORY) -> None:
    converse(rig, tokens)
    rig.evict()
    rig.written()
    demote(rig)


def demote(rig: Rig) -> None:
    rig.krul.store.demote(1 << 40)
    assert rig.krul.store.ledger.snapshot()["tier"] == 0


def files(root: Path) -> list[Path]:
    return sorted((root / "v1" / FINGERPRINT.hex()).rglob("*.krul"))


def returning(rig: Rig, *tail: int, history=HISTORY):
    req = rig.request([*history, *tail])
    rig.match(req)
    assert rig.admit(req)
    return req


def finish(rig: Rig, *reqs, hanging: bool = False) -> None:
    """The requests end well. hanging: the disk still does, and cannot be looked at."""
    for req in reqs:
        tokens = tuple(req.full_untruncated_fill_ids)
        assert rig.rows_of(req, len(tokens)).equal(oracle(tokens)), "not what a prefill gives"
        rig.decode(req, 5)
        rig.finish(req)
    if not hanging:
        idle(rig)


def idle(rig: Rig) -> None:
    """Nothing is held for anyone any more, and all that is stored is right."""
    nothing_loading(rig)
    assert rig.krul.store.ledger.snapshot()["prefetch"] == 0
    rig.check()


def flush(rig: Rig) -> None:
    """What SGLang does for /flush_cache."""
    rig.cache.reset()
    rig.req_to_token_pool.clear()
    rig.allocator.clear()


def gone(rig: Rig) -> None:
    """Nothing that is stored now can be read any more."""
    rig.damaged.update(rig.krul.store._segments)


def nothing_loading(rig: Rig) -> None:
    until = time.monotonic() + 5
    while rig.krul.store.ledger.snapshot()["loading"]:
        assert time.monotonic() < until, "bytes of a load that is over are kept"
        time.sleep(0.001)


def again(rig: Rig, reqs, hanging: bool = False) -> None:
    """Schedule requests that start anew; once is enough."""
    for req in reqs:
        rig.match(req)
        assert rig.admit(req)
    assert not step(rig, list(reqs)), "a request starts anew for ever"
    finish(rig, *reqs, hanging=hanging)


def comes_back(rig: Rig, tail: int) -> int:
    """Tokens restored for one more turn, all of it from the disk."""
    rig.evict()
    rig.written()
    demote(rig)
    req = returning(rig, tail)
    assert not step(rig, [req])
    finish(rig, req)
    return req.host_loaded_length


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


# ---- row 16: given up in every phase ----------------------------------------


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


# ---- tiers side by side ------------------------------------------------------


def test_two_tiers_feed_one_restore_and_have_a_rate_each(rig) -> None:
    rig.krul.loader = Loader(rig.krul.store, 2, bandwidth=1e7)  # a link for memory too
    longer = [*HISTORY, *range(5000, 5060)]
    converse(rig, longer)
    rig.evict()
    rig.written()
    demote(rig)
    head = returning(rig, history=longer[: len(HISTORY)])
    assert not step(rig, [head])
    finish(rig, head)
    rig.evict()
    links = rig.krul.planner.load.links
    links.clear()
    promoted = rig.krul.store.stats.promoted_segments
    assert promoted > 0
    req = returning(rig, 7, history=longer)
    (pending,) = rig.cache.restores.pending
    assert not step(rig, [req])
    assert req.host_loaded_length == len(longer)
    carried = pending.load.trace.carried
    del pending
    assert carried.keys() == {"memory", "disk"}
    assert all(nbytes > 0 for nbytes, _ in carried.values())
    assert {tier: rate.observations for tier, rate in links.items()} == {"memory": 1, "disk": 1}
    assert links["memory"].seconds != links["disk"].seconds
    finish(rig, req)
    assert rig.krul.store.stats.promoted_segments > promoted


def test_demotions_and_promotions_are_counted(rig) -> None:
    stats = rig.krul.store.stats
    demoted = stats.demoted_segments
    assert demoted > 0
    assert stats.promoted_segments == 0
    req = returning(rig, 7)
    assert not step(rig, [req])
    finish(rig, req)
    assert stats.promoted_segments == 1
    rig.evict()
    rig.written()
    demote(rig)
    assert stats.demoted_segments > demoted


# ---- operators beside a server ----------------------------------------------


def test_a_file_removed_while_it_is_read_is_read_to_its_end(rig, calls, root) -> None:
    calls.arm(hang=OPENING + 1)
    req = returning(rig, 7)
    assert calls.at_gate.wait(20)
    assert gc(root, limit=1).evicted > 0
    assert not files(root)
    gone(rig)
    calls.gate.set()
    assert not step(rig, [req])
    finish(rig, req)
    assert req.host_loaded_length == len(HISTORY)


@pytest.mark.parametrize("action", ["gc", "forget", "verify"])
def test_what_an_operator_removes_is_a_miss(make_rig, root, action) -> None:
    space = {"cache_salt": "tenant"}
    rig = make_rig(overlapped=True, disk=root)
    first = rig.request(HISTORY, **space)
    rig.match(first)
    assert rig.admit(first)
    assert not step(rig, [first])
    rig.decode(first, 1)
    rig.finish(first)
    rig.evict()
    rig.written()
    demote(rig)
    stored = files(root)
    if action == "gc":
        assert gc(root, limit=1).evicted == len(stored)
    elif action == "forget":
        assert forget(root, Namespace(cache_salt="tenant"))[0] == len(stored)
    else:
        for file in stored:
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
        assert [one.verdict for one in verify(root)] == [Verdict.DAMAGED] * len(stored)
    assert not files(root)
    gone(rig)
    req = rig.request([*HISTORY, 7], **space)
    rig.match(req)
    assert rig.admit(req)
    assert req.host_loaded_length == 0
    assert not step(rig, [req])
    finish(rig, req)
    assert rig.krul.counters.misses == 1


def test_verify_beside_a_server_finds_all_sound(rig, root) -> None:
    assert {one.verdict for one in verify(root)} == {Verdict.SOUND}
    assert comes_back(rig, 9) == len(HISTORY)


def test_ids_of_files_are_those_of_a_running_server(rig, root) -> None:
    from krul_sglang.runtime.conversations import list_newest
    from krul_sglang.upkeep.survey import survey

    (kept,) = survey(root, lambda done, total: None).conversations
    listed = list_newest(rig.cache, {})["conversations"]
    assert [one["id"] for one in listed] == [kept.id]


def test_another_process_stores_what_this_one_finds(make_rig, root) -> None:
    """Two servers on one directory: what one stored, the other restores."""
    one, other = (make_rig(overlapped=True, disk=root) for _ in range(2))
    converse(one, HISTORY)
    one.evict()
    one.written()
    other.krul.store.disk.disk.refresh()
    req = returning(other, 7)
    assert req.host_loaded_length == len(HISTORY)
    assert not step(other, [req])
    finish(other, req)


def test_a_tier_of_another_fingerprint_keeps_its_entries(rig, root) -> None:
    """Directories may be shared between models: nothing of the other one is found."""
    other = DiskTier(root, bytes(16), 1 << 24)
    assert other.longest_path(Namespace(), HISTORY) is None
    other.close()
    assert comes_back(rig, 9) == len(HISTORY)
