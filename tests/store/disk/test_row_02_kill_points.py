"""Row 2: SIGKILL before each system call of a scenario, and in the middle of each write.

So between data and rename, between rename and index, between removing and forgetting: every
moment that another process could see.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from crash_rig import Crasher, acknowledged, inspect
from disk_kit import FINGERPRINT, PLENTY, Piece, store

from krul_sglang.store.disk.tier import DiskTier

pytestmark = pytest.mark.process

LIMIT = 80_000
CHANGES = {"create", "write", "replace", "remove"}
OLD = [Piece(talk, size=9000) for talk in range(6)]


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    child = Crasher()
    yield child
    child.close()


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A directory as full as it may be, to be copied."""
    template = tmp_path / "full"
    tier = DiskTier(template, FINGERPRINT, PLENTY)
    for piece in OLD:
        store(tier, piece)
    tier.close()
    assert tier.used < LIMIT < tier.used + 12_288
    return template


def killed_at(crasher: Crasher, full: Path, point: int, torn: bool = False) -> tuple[bool, int]:
    """Whether the writer was killed there, and how many acknowledged pieces are exact."""
    root, journal = full.parent / f"{point}-{torn}", full.parent / f"{point}-{torn}.txt"
    shutil.copytree(full, root, copy_function=shutil.copy2)
    task = {"root": root, "journal": journal, "limit": LIMIT, "point": point, "torn": torn}
    answer = crasher.run(**task)
    new = acknowledged(journal)
    exact, _ = inspect(root, new, LIMIT)
    inspect(root, OLD, LIMIT)
    if not new:
        assert exact == 0
    shutil.rmtree(root)
    return answer["killed"], exact


@pytest.fixture
def scenario(crasher, full) -> list[str]:
    """The calls of the whole scenario, which does everything that the points are to lie in."""
    root, journal = full.parent / "whole", full.parent / "whole.txt"
    shutil.copytree(full, root)
    task = {"root": root, "journal": journal, "limit": LIMIT, "point": -1}
    answer = crasher.run(**task)
    assert not answer["killed"]
    assert [piece.talk for piece in acknowledged(journal)] == [100, 101, 102]
    exact, missing = inspect(root, [*OLD, Piece(100), Piece(101), Piece(102, size=20_000)], LIMIT)
    assert exact > 0
    assert missing > 3
    assert len(list((root / "v1" / "quarantine").iterdir())) == 1
    made = answer["said"]
    assert made.count("replace") == 4, "three entries, and one that is set aside"
    assert made.count("remove") > 4, "evicted ones and the lease"
    return made


def die(crasher, full, counts, points: Sequence[int]) -> None:
    exact = 0
    for point in points:
        killed, here = killed_at(crasher, full, point)
        assert killed
        exact += here
    assert exact > 0
    counts(kill_points=len(points), exact=exact, wrong_bytes=0)


def test_killed_around_every_change(crasher, full, scenario, counts) -> None:
    """After the data, before and after a rename, before and after a removal, and so on."""
    around = [n for n, name in enumerate(scenario) if {name, scenario[n - 1]} & CHANGES]
    die(crasher, full, counts, around)


@pytest.mark.long
def test_killed_before_every_call(crasher, full, scenario, counts) -> None:
    die(crasher, full, counts, range(len(scenario)))


def test_killed_in_the_middle_of_every_write(crasher, full, scenario, counts) -> None:
    writes = [n for n, name in enumerate(scenario) if name == "write"]
    for point in writes:
        assert killed_at(crasher, full, point, torn=True)[0]
    assert len(writes) == 7, "head and payload of three entries, and a lease"
    counts(torn_writes=len(writes), wrong_bytes=0)
