"""The index and the lookup against plain ones that look at every entry each time."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from disk_kit import FINGERPRINT, PLAIN
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from krul_sglang.store.disk.digest import prefix_digests
from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.index import Index
from krul_sglang.store.disk.lookup import longest_path

ENDS = [bytes([n]) * 16 for n in range(5)]
NAMES = st.builds(
    EntryName,
    fingerprint=st.sampled_from([FINGERPRINT, b"x" * 16]),
    parent=st.sampled_from(ENDS),
    start=st.integers(0, 2).map(lambda n: 8 * n),
    tokens=st.sampled_from([8, 16]),
    exact_tokens=st.just(8),
    end=st.sampled_from(ENDS),
    size=st.sampled_from([1, 4096, 5000]),
)


@dataclass
class PlainIndex:
    """The same, slowly."""

    times: dict[EntryName, int] = field(default_factory=dict)

    def dispensable(self, name: EntryName) -> bool:
        here = name.fingerprint
        continued = any((n.fingerprint, n.parent) == (here, name.end) for n in self.times)
        alike = sum((n.fingerprint, n.end) == (here, name.end) for n in self.times)
        return not continued or alike > 1

    def candidates(self, keep: tuple[bytes, bytes] | None) -> set[EntryName]:
        """Those that may go: the oldest dispensable ones."""
        free = [n for n in self.times if self.dispensable(n)]
        alike = [n for n in self.times if (n.fingerprint, n.end) == keep]
        if len(alike) == 1 and alike[0] in free:
            free.remove(alike[0])
            if not free:
                return set()
        if not free:  # in a circle: nothing that anyone stored
            free = list(self.times)
        oldest = min((self.times[n] for n in free), default=0)
        return {n for n in free if self.times[n] == oldest}


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index, self.plain = Index(), PlainIndex()

    @rule(name=NAMES, ns=st.integers(1, 50))
    def add(self, name: EntryName, ns: int) -> None:
        self.index.add(name, ns)
        self.plain.times[name] = ns

    @rule(name=NAMES, choice=st.integers(0, 99), known=st.booleans())
    def remove(self, name: EntryName, choice: int, known: bool) -> None:
        if known and self.plain.times:
            name = sorted(self.plain.times)[choice % len(self.plain.times)]
        self.index.remove(name)
        self.plain.times.pop(name, None)

    @rule(choice=st.integers(0, 99), ns=st.integers(1, 50))
    def touch(self, choice: int, ns: int) -> None:
        if self.plain.times:
            name = sorted(self.plain.times)[choice % len(self.plain.times)]
            self.index.touch(name, ns)
            self.plain.times[name] = ns

    @rule(keep=st.none() | st.tuples(st.just(FINGERPRINT), st.sampled_from(ENDS)))
    def oldest(self, keep: tuple[bytes, bytes] | None) -> None:
        found, wanted = self.index.oldest(keep), self.plain.candidates(keep)
        assert (found in wanted) if wanted else (found is None)

    @invariant()
    def agrees(self) -> None:
        times = self.plain.times
        assert set(self.index) == set(times)
        assert len(self.index) == len(times)
        assert self.index.used == sum(name.footprint for name in times)
        assert all(self.index.recency(name) == ns for name, ns in times.items())
        for end in ENDS:
            begin = [n for n in times if (n.fingerprint, n.parent) == (FINGERPRINT, end)]
            assert sorted(self.index.stops(FINGERPRINT, end)) == sorted({n.stop for n in begin})
            for position in (0, 8, 16, 24, 32):
                found = self.index.beginning(FINGERPRINT, end, position)
                assert sorted(found) == sorted(n for n in begin if n.start == position)
                found = self.index.ending(FINGERPRINT, end, position)
                here = [n for n in times if (n.fingerprint, n.end) == (FINGERPRINT, end)]
                assert sorted(found) == sorted(n for n in here if n.stop == position)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
RUNS = st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(1, 3)).filter(
    lambda run: run[0] < run[1]
)


def plain_path(runs: set, starts: set[int]) -> tuple[int, int, int] | None:
    """How far any path goes, from how late a start, among those with an entry at all."""
    reached = {start: start for start in starts}
    for stop in range(1, len(IDS) + 1):
        origins = [reached[lo] for lo, hi, _ in runs if hi == stop and lo in reached]
        if origins and stop not in starts:
            reached[stop] = max(origins)
    stops = [hi for lo, hi, _ in runs if lo in reached and hi in reached and hi not in starts]
    if not stops:
        return None
    return max(stops), reached[max(stops)], 0


@settings(max_examples=300, deadline=None)
@given(
    runs=st.sets(RUNS, max_size=12),
    starts=st.sets(st.integers(0, 12), min_size=1, max_size=3),
    foreign=st.sets(RUNS, max_size=4),
)
def test_the_longest_path_is_found(runs, starts, foreign) -> None:
    """Runs ``(start, stop, size)`` of one conversation, among those of another one."""
    index = Index()
    for ids, those in ((IDS, runs), ([*IDS[:1], *range(50, 61)], foreign)):
        for lo, hi, size in those:
            parent, end = prefix_digests(PLAIN, ids, [lo, hi])
            index.add(EntryName(FINGERPRINT, parent, lo, hi - lo, 0, end, size), 1)
    shared = {run for run in foreign if run[1] == 1}
    found = longest_path(index, FINGERPRINT, PLAIN, IDS, starts, lambda name: True)
    wanted = plain_path(runs | shared, starts)
    if wanted is None:
        assert found is None
        return
    stop, start, _ = wanted
    assert found is not None
    assert found.stop == stop == found.names[-1].stop
    assert found.names[0].start == start
    assert found.digest == next(prefix_digests(PLAIN, IDS, [stop]))
    for before, after in zip(found.names, found.names[1:], strict=False):
        assert before.stop == after.start
    for name in found.names:
        sizes = [s for lo, hi, s in runs | shared if (lo, hi) == (name.start, name.stop)]
        assert name.size == min(sizes)


def test_what_is_not_usable_is_not_taken() -> None:
    index = Index()
    for lo, hi in ((0, 4), (4, 8), (8, 12), (0, 8)):
        parent, end = prefix_digests(PLAIN, IDS, [lo, hi])
        index.add(EntryName(FINGERPRINT, parent, lo, hi - lo, 0, end, hi - lo), 1)
    found = longest_path(index, FINGERPRINT, PLAIN, IDS, [0], lambda name: name.tokens == 4)
    assert found is not None
    assert [name.start for name in found.names] == [0, 4, 8]
    found = longest_path(index, FINGERPRINT, PLAIN, IDS, [0], lambda name: name.start != 8)
    assert found is not None
    assert found.stop == 8
