"""Row 1: SIGKILL at random moments; what was acknowledged is in a separate file."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from crash_rig import Crasher, acknowledged, inspect
from disk_kit import PLENTY

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    child = Crasher()
    yield child
    child.close()


def survive(crasher, root, counts, rounds: int, limit: int) -> None:
    rng, journal = random.Random(limit), root.parent / "acknowledged"
    before, exact, missing, kept, patience = 0, 0, 0, [], 1.0
    for number in range(rounds):
        delay = rng.uniform(0.002, 0.08) * patience
        task = {"root": root, "journal": journal, "limit": limit, "seed": number}
        assert crasher.run(**task, delay=delay)["killed"]
        pieces = acknowledged(journal)
        new, before = pieces[before:], len(pieces)
        # On a machine so busy that nothing was stored in that time, it gets more of it.
        patience = 1.0 if new else min(2 * patience, 16.0)
        here, gone = inspect(root, new + rng.sample(kept, min(20, len(kept))), limit)
        exact, missing, kept = exact + here, missing + gone, pieces
    here, gone = inspect(root, kept, limit)
    if limit == PLENTY:
        assert missing == gone == 0, "nothing was evicted: all that was acknowledged is there"
    else:
        assert gone > 0, "the limit was never reached"
    assert here > 0
    counts(
        kills_survived=rounds,
        acknowledged=len(kept),
        exact=here,
        misses=gone,
        checks=exact + missing + here + gone,
        wrong_bytes=0,
    )


@pytest.mark.parametrize("limit", [PLENTY, 200_000], ids=["all fits", "evicting"])
def test_killed_at_random_moments(crasher, root, counts, limit) -> None:
    survive(crasher, root, counts, 30, limit)


@pytest.mark.long
@pytest.mark.parametrize("limit", [PLENTY, 200_000], ids=["all fits", "evicting"])
def test_killed_at_two_hundred_random_moments(crasher, root, counts, limit) -> None:
    survive(crasher, root, counts, 200, limit)
