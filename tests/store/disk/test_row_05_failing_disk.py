"""Row 5: a disk that is full, breaks, writes short or only reads: a miss or a refusal, never an
error, and writing goes on when it can again."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_kit import (
    CALLS,
    FINGERPRINT,
    Clock,
    Piece,
    WatchedCalls,
    assert_agrees,
    files,
    look,
    open_files,
    publish,
    store,
    unfinished,
)

from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk.health import LONGEST_WAIT
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier

LIMIT = 60_000
OLD = [Piece(talk, size=9000) for talk in range(4)]
NEW = [Piece(10, size=9000), Piece(11, size=20_000)]
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ESTALE)


class Fault:
    """A rule that fails the calls it is told to, as the system would."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.at, self.error = -1, 0

    def __call__(self, name: str, number: int, arguments: tuple[Any, ...]) -> None:
        error = self.error if number == self.at else self.failing.get(name, 0)
        if error and name != "close":  # which never fails
            if name == "close_written":
                os.close(arguments[0])  # Linux lets go of it whatever it reports
            raise OSError(error, os.strerror(error))


def serve(tier: DiskTier) -> None:
    """What a server does; whatever fails is a miss or a refusal, and no wrong byte."""
    for piece in (*OLD, *NEW):
        assert restored(tier, piece) in (None, piece.payload)
    tier.quarantine(OLD[0].name(), "as the test says")
    for piece in NEW:
        if publish(tier, piece).outcome is Outcome.STORED:
            assert restored(tier, piece) in (None, piece.payload)
    tier.make_room(30_000)
    tier.refresh()


def restored(tier: DiskTier, piece: Piece) -> bytes | None:
    """A miss, too, where the device fails once the file is open."""
    try:
        return look(tier, piece)
    except CodecError:
        return None


def filled(root: Path) -> None:
    tier = DiskTier(root, FINGERPRINT, LIMIT)
    for piece in OLD:
        store(tier, piece)
    tier.close()


def recovers(tier: DiskTier, root: Path, clock: Clock) -> None:
    """Once the pause is over a segment is stored, and the tier knows what lies there."""
    clock.now += LONGEST_WAIT
    tier.refresh()
    piece = Piece(20)
    assert publish(tier, piece).outcome is Outcome.STORED
    assert look(tier, piece) == piece.payload
    assert tier.degraded == ""
    for old in (*OLD, *NEW):
        assert look(tier, old) in (None, old.payload)
    assert_agrees(tier, root)
    assert tier.used <= LIMIT


def run(root: Path, fault: Fault) -> int:
    """Serve through the fault, then without it; the calls that serving made."""
    filled(root)
    descriptors = open_files()
    clock, calls = Clock(), WatchedCalls(fault)
    try:
        tier = DiskTier(root, FINGERPRINT, LIMIT, calls=calls, clock=clock)
    except OSError:
        assert calls.made in (["open_root"], ["open_root", "close"])
        return len(calls.made)
    serve(tier)
    made = len(calls.made)
    fault.failing, fault.at = {}, -1
    recovers(tier, root, clock)
    tier.close()
    assert open_files() == descriptors
    again = DiskTier(root, FINGERPRINT, LIMIT)
    assert not unfinished(root)
    assert_agrees(again, root)
    again.close()
    return made


def sweep(tmp_path: Path, counts, errors: tuple[int, ...], stride: int) -> None:
    faults, made = 0, run(tmp_path / "none", Fault())
    for first, error in enumerate(errors):
        for at in range(first % stride, made, stride):
            fault = Fault()
            fault.error, fault.at = error, at
            run(tmp_path / f"{error}-{at}", fault)
            faults += 1
    assert faults > 80
    counts(single_faults=faults, recovered=faults, wrong_bytes=0)


def test_one_call_fails(tmp_path, counts) -> None:
    sweep(tmp_path, counts, ERRORS, 23)


@pytest.mark.long
def test_any_call_fails(tmp_path, counts) -> None:
    sweep(tmp_path, counts, ERRORS, 1)


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "close"])
def test_a_call_that_always_fails(tmp_path, name, error) -> None:
    fault = Fault()
    fault.failing = {name: error}
    run(tmp_path / "tier", fault)


@pytest.mark.parametrize("longest", [1, 100])
def test_short_writes_and_reads(root, counts, longest) -> None:
    """The system may take and give less than it was asked for, at any time."""

    def rule(name: str, number: int, arguments: tuple[Any, ...]) -> int | None:
        if name == "write":
            fd, parts = arguments
            return os.write(fd, parts[0][:longest])
        if name == "read":
            fd, into, offset = arguments
            return os.preadv(fd, [into[:longest]], offset)
        return None

    calls = WatchedCalls(rule)
    tier = DiskTier(root, FINGERPRINT, LIMIT, calls=calls)
    piece = Piece(1, size=2000)
    name = store(tier, piece)
    assert look(tier, piece) == piece.payload
    assert files(root)[0].read_bytes() == piece.file_bytes()
    assert calls.made.count("write") >= name.size // longest
    assert calls.made.count("read") >= name.size // longest
    tier.close()
    counts(short_calls=calls.made.count("write") + calls.made.count("read"), wrong_bytes=0)


def test_a_write_that_never_writes_is_a_failure(root) -> None:
    tier = DiskTier(
        root,
        FINGERPRINT,
        LIMIT,
        calls=WatchedCalls(lambda name, *_: 0 if name == "write" else None),
    )
    assert publish(tier, Piece(1)).outcome is Outcome.FAILED
    assert not unfinished(root)


def test_failures_are_logged_once_and_pauses_grow(root, caplog) -> None:
    clock, fault = Clock(), Fault()
    tier = DiskTier(root, FINGERPRINT, LIMIT, calls=WatchedCalls(fault), clock=clock)
    fault.failing = {"create": errno.ENOSPC}
    waits, since = [], 0.0
    for _ in range(3000):
        outcome = publish(tier, Piece(1)).outcome
        if outcome is Outcome.FAILED:
            waits.append(clock.now - since)
            since = clock.now
        else:
            assert outcome is Outcome.DEGRADED
        clock.now += 0.25
    assert waits[:7] == [0, 1, 2, 4, 8, 16, 32]
    assert set(waits[7:]) == {LONGEST_WAIT}
    assert len(caplog.records) == 1
    assert "No space left" in tier.degraded
    fault.failing = {}
    clock.now += LONGEST_WAIT
    assert publish(tier, Piece(1)).outcome is Outcome.STORED
    assert len(caplog.records) == 2
    assert tier.degraded == ""


@pytest.mark.parametrize("name", ["open_file", "read", "stat_open"])
def test_an_entry_that_could_not_be_read_once_is_found_again(root, name) -> None:
    """Too many open files, say: it still lies there, and counts."""
    fault = Fault()
    tier = DiskTier(root, FINGERPRINT, LIMIT, calls=WatchedCalls(fault))
    store(tier, OLD[0])
    time.sleep(0.11)  # past the time in which a listing may be racy
    tier.refresh()
    fault.failing = {name: errno.EMFILE}
    assert look(tier, OLD[0]) is None
    assert tier.totals()["unreadable"] == 1
    fault.failing = {}
    assert_agrees(tier, root)
    assert look(tier, OLD[0]) == OLD[0].payload
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", mounted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_full_file_system(small_disk, counts) -> None:
    root, clock = small_disk / "tier", Clock()
    tier = DiskTier(root, FINGERPRINT, 1 << 30, clock=clock)
    others = small_disk / "of others"
    others.write_bytes(bytes(200_000))
    kept, failed = [], 0
    for talk in range(40):
        clock.now += LONGEST_WAIT
        piece = Piece(talk, size=20_000)
        done = publish(tier, piece)
        if done.outcome is Outcome.STORED:
            kept.append(piece)
        else:
            assert done.outcome is Outcome.FAILED
            assert "No space left" in tier.degraded
            failed += 1
    assert len(kept) > 5
    assert failed > 20
    assert all(look(tier, piece) == piece.payload for piece in kept), "reading goes on"
    assert not unfinished(root)
    assert_agrees(tier, root)
    others.unlink()
    clock.now += LONGEST_WAIT
    store(tier, Piece(100, size=20_000))
    assert tier.degraded == ""
    tier.close()
    counts(stored_before_it_was_full=len(kept), refused=failed, read_back=len(kept), wrong_bytes=0)


def test_a_directory_that_only_reads(small_disk) -> None:
    """A tier that is opened on it reads, and writes once it may."""
    root, clock = small_disk / "tier", Clock()
    first = DiskTier(root, FINGERPRINT, LIMIT)
    for piece in OLD:
        store(first, piece)
    first.close()
    remount = ["mount", "-o", "remount,ro", small_disk]
    subprocess.run(remount, check=True)
    tier = DiskTier(root, FINGERPRINT, LIMIT, clock=clock)
    for piece in OLD:
        assert look(tier, piece) == piece.payload
    assert publish(tier, NEW[0]).outcome is Outcome.DEGRADED
    clock.now += LONGEST_WAIT
    assert publish(tier, NEW[0]).outcome is Outcome.FAILED
    assert "Read-only" in tier.degraded
    assert not tier.make_room(LIMIT)
    remount[2] = "remount,rw"
    subprocess.run(remount, check=True)
    clock.now += LONGEST_WAIT
    store(tier, NEW[0])
    assert tier.degraded == ""
    assert_agrees(tier, root)
    tier.close()
