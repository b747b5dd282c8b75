"""Row 14: a tier that is opened again knows what the last one knew, in the same order of use."""

from __future__ import annotations

import os
import random
import time

import pytest
from disk_kit import PLENTY, Piece, assert_agrees, files, look, publish, store

from krul_sglang.store.disk.publishing import Outcome


def grown(tier, talks: int, length: int) -> list[Piece]:
    """Conversations that grew side by side."""
    pieces = [Piece(talk, index) for index in range(length) for talk in range(talks)]
    for piece in pieces:
        store(tier, piece)
    return pieces


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left open"])
def test_the_same_entries_in_the_same_order(open_tier, root, closed) -> None:
    first = open_tier()
    pieces = grown(first, 10, 5)
    rng = random.Random(0)
    for piece in rng.choices(pieces, k=40):
        assert look(first, piece) is not None
    order, used = first.names(), first.used
    if closed:
        first.close()
    second = open_tier()
    assert second.names() == order
    assert second.used == used
    assert len(second) == len(pieces)
    assert_agrees(second, root)


def test_storing_what_is_there_is_a_use_of_it(open_tier) -> None:
    first = open_tier()
    a, b = store(first, Piece(1)), store(first, Piece(2))
    assert publish(first, Piece(1)).outcome is Outcome.PRESENT
    assert first.names() == [b, a]
    first.close()
    assert open_tier().names() == [b, a]


def test_conversations_are_found_whole(open_tier, counts) -> None:
    pieces = grown(open_tier(), 50, 4)
    tier = open_tier()
    for talk in range(50):
        ids = Piece(talk, 9).ids
        path = tier.longest_path(Piece.namespace, ids)
        assert path is not None
        assert path.stop == 4 * 8
        assert [name.start for name in path.names] == [0, 8, 16, 24]
    assert all(look(tier, piece) == piece.payload for piece in pieces)
    counts(conversations=50, restored=50, wrong_bytes=0)


def test_what_goes_first_is_what_would_have_gone_first(open_tier, root) -> None:
    """The same victims in the same order, as if there had been no restart."""
    first = open_tier()
    pieces = grown(first, 6, 3)
    for talk in (0, 3):
        look(first, Piece(talk, 2))
    used = first.used
    first.close()
    tier = open_tier()
    gone = []
    while len(tier):
        before = set(tier.names())
        tier._catalog.limit = tier.used
        assert tier.make_room(1)
        (name,) = before - set(tier.names())
        gone.append(next(p for p in pieces if p.name() == name))
    assert used > 0
    leaves = [piece.talk for piece in gone if piece.index == 2]
    assert leaves == [1, 2, 4, 5, 0, 3]
    for talk in range(6):
        assert [p.index for p in gone if p.talk == talk] == [2, 1, 0], "leaf first"
    assert_agrees(tier, root)


def test_a_smaller_limit_is_kept_from_the_start(open_tier, root) -> None:
    first = open_tier()
    grown(first, 10, 2)
    order, used = first.names(), first.used
    first.close()
    tier = open_tier(used // 2)
    assert used // 2 - 8192 < tier.used <= used // 2
    assert [name for name in order if name in set(tier.names())] == tier.names()
    assert_agrees(tier, root)


def test_a_larger_limit_takes_more(open_tier) -> None:
    first = open_tier(10_000)
    store(first, Piece(1))
    assert publish(first, Piece(2, size=9000)).outcome is Outcome.NO_ROOM
    first.close()
    tier = open_tier(PLENTY)
    assert look(tier, Piece(1)) is not None
    store(tier, Piece(2, size=9000))


def test_a_clock_that_was_ahead_keeps_nothing_for_ever(open_tier, root) -> None:
    """An entry from the future is as recent as now, and no more."""
    first = open_tier()
    store(first, Piece(1))
    (path,) = files(root)
    ahead = time.time_ns() + 10**18
    os.utime(path, ns=(ahead, ahead))
    first.close()
    tier = open_tier()
    store(tier, Piece(2))
    assert [name.size for name in tier.names()] == [Piece(n).name().size for n in (1, 2)]
    assert tier.names()[0] == Piece(1).name()


def test_times_go_forward_even_if_the_clock_does_not(open_tier, monkeypatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr("krul_sglang.store.disk.catalog.time.time_ns", lambda: now)
    tier = open_tier()
    names = [store(tier, Piece(talk)) for talk in range(20)]
    assert tier.names() == names
