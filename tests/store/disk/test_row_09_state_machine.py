"""Row 9: anything in any order against a dictionary: never wrong bytes, bytes within the budget,
and the ledger is what the directory holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from disk_kit import (
    FINGERPRINT,
    PLENTY,
    Piece,
    WatchedCalls,
    files,
    look,
    parsed,
    publish,
    set_aside,
    unfinished,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, forget, gc, verify

SPACES = [Namespace(), Namespace("a"), Namespace(None, "a")]
PIECES = st.builds(
    Piece,
    talk=st.integers(0, 3),
    index=st.integers(0, 3),
    size=st.sampled_from([0, 1, 3000, 9000]),
    namespace=st.sampled_from(SPACES),
    exact_tokens=st.sampled_from([0, 8]),
)
LIMITS = st.sampled_from([0, 10_000, 40_000, PLENTY])


class Crash(BaseException):
    """The process ends: no handler of the tier's may see to anything."""


class TierMachine(RuleBasedStateMachine):
    """written: every version of what a piece covers that was ever to be stored. sure: what was
    acknowledged, and nothing has taken away since."""

    @initialize(limit=LIMITS)
    def begin(self, limit: int) -> None:
        self.root = Path(tempfile.mkdtemp()) / "tier"
        self.written: dict[tuple[int, int, Namespace], set[bytes]] = {}
        self.sure: set[tuple[int, int, Namespace]] = set()
        self.open(limit)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.tier.close()
            shutil.rmtree(self.root.parent)

    def open(self, limit: int) -> None:
        calls_left = self.crash_after = [PLENTY]

        def rule(name: str, number: int, arguments: tuple) -> None:
            calls_left[0] -= 1
            if calls_left[0] < 0 and name != "close":
                raise Crash  # and so on for ever: the dead clean up nothing

        self.limit = limit
        self.tier = DiskTier(self.root, FINGERPRINT, limit, calls=WatchedCalls(rule))
        if limit != PLENTY:
            self.sure.clear()

    @staticmethod
    def key(piece: Piece) -> tuple[int, int, Namespace]:
        return piece.talk, piece.index, piece.namespace

    @rule(piece=PIECES)
    def put(self, piece: Piece) -> None:
        key = self.key(piece)
        self.written.setdefault(key, set()).add(piece.payload)
        done = publish(self.tier, piece)
        assert done.outcome in (Outcome.STORED, Outcome.PRESENT, Outcome.NO_ROOM)
        if done.outcome is Outcome.NO_ROOM:
            assert self.limit < PLENTY
            return
        found = look(self.tier, piece)
        if found is None and done.outcome is Outcome.PRESENT and key not in self.sure:
            # What was there had been damaged, which only reading it told; it is set aside now.
            if publish(self.tier, piece).outcome is Outcome.NO_ROOM:
                return
            found = look(self.tier, piece)
        if self.limit == PLENTY:
            self.sure.add(key)
        assert found in self.written[key]

    @rule(piece=PIECES)
    def get(self, piece: Piece) -> None:
        key = self.key(piece)
        found = look(self.tier, piece)
        if key in self.sure:
            assert found is not None, "nothing took it away"
        assert found is None or found in self.written[key]

    @rule(talk=st.integers(0, 3), space=st.sampled_from(SPACES), length=st.integers(0, 32))
    def find(self, talk: int, space: Namespace, length: int) -> None:
        ids = Piece(talk, 3).ids[:length]
        path = self.tier.longest_path(space, ids)
        if path is None:
            assert (talk, 0, space) not in self.sure or length < 8
            return
        assert path.stop <= length
        for index, name in enumerate(path.names):
            assert name.start == 8 * index
            opened = self.tier.open(name, space, ids)
            if opened is None:  # damaged in secret, which only reading it tells
                assert (talk, index, space) not in self.sure
                return
            payload, matched = opened
            assert matched == 8
            payload.fetch(payload.size)
            assert bytes(payload.view) in self.written[talk, index, space]
            payload.close()
        following = talk, len(path.names), space
        assert following not in self.sure or length < path.stop + 8

    @rule(nbytes=st.integers(0, 50_000))
    def evict(self, nbytes: int) -> None:
        if self.tier.make_room(nbytes):
            assert self.tier.used + nbytes <= self.limit
            if self.limit < PLENTY:
                self.sure.clear()
        else:
            assert nbytes > self.limit

    @rule(limit=LIMITS)
    def reopen(self, limit: int) -> None:
        # One that was cut behind the tier's back is not listed again: its size is in its name.
        sizes = {path.name: path.stat().st_size for path in files(self.root)}
        before = [name for name in self.tier.names() if sizes.get(name.file) == name.size]
        self.tier.close()
        self.open(limit)
        after = self.tier.names()
        if limit == PLENTY:
            assert after == before, "the same entries in the same order of use"
        else:
            kept = set(after)
            assert [name for name in before if name in kept] == after

    @rule(piece=PIECES, at=st.integers(0, 40))
    def crash(self, piece: Piece, at: int) -> None:
        """In the middle of storing; the lock of the dead process goes with it."""
        key = self.key(piece)
        self.written.setdefault(key, set()).add(piece.payload)
        self.crash_after[0] = at
        with contextlib.suppress(Crash):
            publish(self.tier, piece)
        lease = self.tier._publisher._lease
        if lease is not None:  # what the system does for the dead
            self.tier._directory.calls.close(lease._fd)
        self.open(self.limit)
        assert not unfinished(self.root)

    @precondition(lambda self: files(self.root))
    @rule(choice=st.integers(0, 99), at=st.integers(0, 200), how=st.sampled_from("fcez"))
    def corrupt(self, choice: int, at: int, how: str) -> None:
        """Behind the tier's back: a flip or zeros in the header, a cut, a removal."""
        found = files(self.root)
        path = found[choice % len(found)]
        name = parsed(path)
        raw, used = bytearray(path.read_bytes()), path.stat().st_mtime_ns
        if not raw:  # cut to nothing before
            how = "e"
        if how == "f":
            raw[at % len(raw)] ^= 1 << choice % 8
        elif how == "c":
            del raw[at % len(raw) :]
        elif how == "z":
            raw[at % 16 : at % 16 + 16] = bytes(16)
        path.unlink()
        if how != "e":
            path.write_bytes(raw)
            os.utime(path, ns=(used, used))
        self.sure = {
            key for key in self.sure if Piece(*key[:2], namespace=key[2]).name().end != name.end
        }

    @rule()
    def check_all(self) -> None:
        for checked in verify(self.root):
            assert checked.verdict in (Verdict.SOUND, Verdict.DAMAGED)
        assert all(checked.verdict is Verdict.SOUND for checked in verify(self.root))

    @rule(limit=st.sampled_from([None, 20_000]))
    def collect(self, limit: int | None) -> None:
        done = gc(self.root, limit=limit)
        assert done.abandoned == 0
        assert limit is None or done.used <= limit
        if limit is not None:
            self.sure.clear()

    @rule(space=st.sampled_from(SPACES[1:]))
    def erase(self, space: Namespace) -> None:
        forget(self.root, space)
        for key in self.written:
            if key[2] == space:
                assert look(self.tier, Piece(*key[:2], namespace=space)) is None
        self.sure = {key for key in self.sure if key[2] != space}

    @invariant()
    def the_ledger_is_the_directory(self) -> None:
        if not hasattr(self, "root"):
            return
        self.tier.refresh()
        names = [parsed(path) for path in files(self.root)]
        assert set(self.tier.names()) == set(names)
        assert len(self.tier) == len(names)
        assert self.tier.used == sum(name.footprint for name in names)
        assert not unfinished(self.root)
        assert len(set_aside(self.root)) <= 32
        # Another process may have grown it: only what this one stores is within its limit.
        if self.limit < PLENTY:
            assert self.tier.used <= self.limit


def run(examples: int, steps: int) -> None:
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.reuse, Phase.generate],  # shrinking takes minutes
    )
    run_state_machine_as_test(TierMachine, settings=how)


def test_any_order(counts) -> None:
    run(40, 30)
    counts(sequences=40, steps=40 * 30, counterexamples=0)


@pytest.mark.long
def test_any_order_at_length(counts) -> None:
    run(1000, 50)
    counts(sequences=1000, steps=1000 * 50, counterexamples=0)
