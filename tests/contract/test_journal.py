"""One line a burst of evictions and one a restore, with figures that agree with the counters."""

from __future__ import annotations

import logging

import pytest
from batches import step
from faulty_codec import Faults, converse, install
from tree_rig import Rig

from krul_sglang.runtime.journal import (
    BURST_SECONDS,
    QUIET_SECONDS,
    RESTORE_LINES,
    SEAL_SECONDS,
    Journal,
)

HISTORY = list(range(100, 140))


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(make_rig, clock, caplog):
    """Rigs whose journal goes by ``clock``."""
    caplog.set_level(logging.INFO, "krul_sglang.runtime.journal")

    def build(**krul) -> Rig:
        rig = make_rig(overlapped=True, **krul)
        rig.cache.journal = Journal(rig.krul.store, rig.krul.counters, clock)
        return rig

    return build


def lines(caplog, kind: str) -> list[dict[str, str]]:
    """The lines of one kind, as their pairs."""
    found = []
    for record in caplog.records:
        text = record.getMessage()
        assert "\n" not in text
        if text.startswith(f"krul {kind} "):
            found.append(dict(pair.split("=") for pair in text.split()[2:]))
    return found


def after(rig: Rig, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    rig.cache.journal.step()


def test_a_burst_of_evictions_is_one_line(make, clock, caplog) -> None:
    rig = make()
    converse(rig, HISTORY)
    rig.evict(3)
    after(rig, clock, QUIET_SECONDS / 2)
    rig.evict()
    rig.sealed()
    after(rig, clock, QUIET_SECONDS / 2)
    assert not lines(caplog, "evict"), "the burst goes on"
    after(rig, clock, QUIET_SECONDS)
    (line,) = lines(caplog, "evict")
    held = rig.krul.store.totals()
    assert int(line["tokens"]) == rig.krul.counters.evicted_tokens == held["stored_tokens"]
    assert int(line["segments"]) == held["segments"]
    assert int(line["evictions"]) == 2
    assert int(line["raw_bytes"]) == held["raw_bytes"]
    assert int(line["bytes"]) == held["stored_bytes"]
    assert float(line["ms"]) > 0
    assert (line["tier"], line["codec"]) == ("memory", "lossless")
    assert line["waiting"] == line["gone"] == line["dropped"] == line["unstored"] == "0"
    after(rig, clock, QUIET_SECONDS)
    assert len(lines(caplog, "evict")) == 1, "it is over"


def test_evictions_that_never_end_have_lines_all_the_same(make, clock, caplog) -> None:
    rig = make()
    apart = 0.9 * QUIET_SECONDS
    for number in range(round(BURST_SECONDS / apart) + 2):
        converse(rig, [token + 50 * number for token in HISTORY])
        rig.evict()
        rig.sealed()
        after(rig, clock, apart)
    (line,) = lines(caplog, "evict")
    assert int(line["evictions"]) >= BURST_SECONDS
    assert int(line["tokens"]) < rig.krul.counters.evicted_tokens, "the next burst has begun"


def test_a_line_waits_for_the_encoder_and_not_for_ever(make, clock, caplog) -> None:
    rig = make()
    converse(rig, HISTORY)
    with rig.krul.store.held_back():
        rig.evict()
        after(rig, clock, 2 * QUIET_SECONDS)
        assert not lines(caplog, "evict")
        after(rig, clock, SEAL_SECONDS)
    (line,) = lines(caplog, "evict")
    assert int(line["waiting"]) == int(line["segments"]) > 0
    assert (line["bytes"], line["codec"]) == ("0", "none")


def test_what_found_no_room_is_told(make, clock, caplog) -> None:
    rig = make(host_memory=2048)
    converse(rig, HISTORY)
    rig.evict()
    after(rig, clock, QUIET_SECONDS)
    dropped = rig.krul.counters.dropped_tokens
    assert dropped > 0
    (line,) = lines(caplog, "evict")
    assert (int(line["dropped"]), line["tier"]) == (dropped, "none")
    assert line["gone"] == line["segments"], "what was stored below it went too"


def test_a_disk_is_named(make, clock, caplog, tmp_path) -> None:
    rig = make(disk=tmp_path)
    converse(rig, HISTORY)
    rig.evict()
    rig.written()
    after(rig, clock, QUIET_SECONDS)
    rig.krul.store.demote(1 << 20)
    req = rig.request([*HISTORY, 7])
    rig.match(req)
    assert rig.admit(req)
    assert not step(rig, [req])
    after(rig, clock, 1)
    assert lines(caplog, "evict")[0]["tier"] == "disk+memory"
    assert lines(caplog, "restore")[0]["tier"] == "disk"


def returning(rig: Rig, *tail: int):
    req = rig.request([*HISTORY, *tail])
    rig.match(req)
    assert rig.admit(req)
    return req


def test_a_restore_is_one_line_and_many_share_one(make, clock, caplog) -> None:
    rig = make()
    converse(rig, HISTORY)
    rig.evict()
    rig.sealed()
    after(rig, clock, 60)
    req = returning(rig, 7, 8, 9)
    assert not step(rig, [req])
    (line,) = lines(caplog, "restore")
    trace = rig.cache.restores.traces[-1]
    assert int(line["tokens"]) == len(HISTORY)
    assert (line["requests"], line["passes"], line["recomputed"], line["new"]) == tuple("1103")
    assert int(line["bytes"]) == trace.stored_bytes
    assert float(line["ms"]) == pytest.approx(1e3 * trace.makespan, abs=0.1)
    assert float(line["load_idle_ms"]) == pytest.approx(1e3 * trace.bubbles["load"], abs=0.1)
    assert (line["tier"], line["codec"], line["failed"]) == ("memory", "lossless", "0")
    rig.decode(req, 5)
    rig.finish(req)
    for _ in range(3):
        rig.evict()
        req = returning(rig, 7, 8, 9)
        assert not step(rig, [req])
        rig.finish(req)
    assert len(lines(caplog, "restore")) == 1, "they came faster than lines may"
    after(rig, clock, 2 / RESTORE_LINES)
    summed = lines(caplog, "restore")[1]
    assert (summed["requests"], summed["passes"]) == ("3", "3")
    total = int(line["tokens"]) + int(summed["tokens"])
    assert total == rig.krul.counters.restored_tokens


def test_a_restore_that_fails_says_so(make, clock, caplog) -> None:
    faults = Faults()
    rig = make()
    install(rig, faults)
    converse(rig, HISTORY)
    rig.evict()
    rig.sealed()
    faults.layer = 1
    req = returning(rig, 7)
    assert step(rig, [req]) == [req]
    (line,) = lines(caplog, "restore")
    assert line["failed"] == "1"


def test_where_nobody_reads_lines_none_are_made(make, clock, caplog) -> None:
    rig = make()
    caplog.set_level(logging.WARNING, "krul_sglang.runtime.journal")
    converse(rig, HISTORY)
    rig.evict()
    with rig.krul.store.held_back():
        after(rig, clock, QUIET_SECONDS)
    assert rig.cache.journal._evictions is None
    caplog.set_level(logging.INFO, "krul_sglang.runtime.journal")
    after(rig, clock, 60)
    assert not lines(caplog, "evict")


def test_a_step_without_news_reads_no_clock(make_rig) -> None:
    rig = make_rig(overlapped=True)

    def never() -> float:
        raise AssertionError("nothing to write")

    journal = Journal(rig.krul.store, rig.krul.counters, never)
    journal.step()
    journal.evicted(0.1)
    journal.step()
