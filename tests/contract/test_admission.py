"""What the disk takes with ``--krul-admit second-visit``: conversations that came back."""

from pathlib import Path

import pytest
from tree_rig import Rig

from krul_sglang.config import KrulConfig

SYSTEM = list(range(100, 130))
FIRST = [*SYSTEM, *range(1000, 1060)]
SECOND = [*SYSTEM, *range(2000, 2060)]


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def start(make_rig, root):
    def make(admit: str = "second-visit", **more) -> Rig:
        rig = make_rig(disk=root, **more)
        config = rig.krul.config
        rig.krul.config = KrulConfig(policy=config.policy, recompute="never", admit=admit)
        return rig

    return make


def leave(rig: Rig) -> None:
    rig.evict()
    rig.written()
    rig.check()


def on_disk(rig: Rig, tokens) -> int:
    path = rig.krul.store.disk.disk.longest_path((None, None), tokens)
    return 0 if path is None else path.stop


def test_everything_by_default(start) -> None:
    rig = start("always")
    rig.turn(FIRST, answer=[7])
    leave(rig)
    assert on_disk(rig, FIRST) == len(FIRST)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_conversation_is_written_once_it_came_back(start, page_size) -> None:
    rig = start(page_size=page_size)
    rig.turn(FIRST, answer=[7, 8])
    leave(rig)
    assert rig.krul.store.totals()["stored_tokens"] > 0, "memory has it"
    assert on_disk(rig, FIRST) == 0
    longer = [*FIRST, 7, *range(3000, 3040)]
    assert rig.turn(longer, answer=[9]).host_loaded_length > 0
    rig.written()
    assert on_disk(rig, longer) == len(FIRST) // page_size * page_size + (page_size == 1)
    leave(rig)
    assert on_disk(rig, longer) == len(longer) // page_size * page_size, "and what it adds"
    rig.krul.store.demote(1 << 40)
    assert rig.turn([*longer, 9, 5], answer=[9]).host_loaded_length > 0
    rig.check()


def test_a_shared_beginning_is_no_second_visit(start) -> None:
    rig = start()
    for tokens in (FIRST, SECOND, [*SYSTEM, *range(4000, 4060)]):
        rig.turn(tokens, answer=[7])
        leave(rig)
    assert not list(Path(rig.krul.store.disk.disk.root).rglob("*.krul"))
    rig.turn([*SECOND, 5], answer=[7])
    leave(rig)
    assert on_disk(rig, SECOND) == len(SECOND), "with what leads to it"
    assert on_disk(rig, FIRST) == len(SYSTEM)


def test_what_branches_inside_a_segment_is_written_under_its_own_tokens_only(start, root) -> None:
    """A segment whose end is another conversation's must not be told as this one's."""
    rig = start()
    rig.turn(FIRST, answer=[7])
    leave(rig)  # one segment for all of it
    fork = [*FIRST[:50], *range(5000, 5080)]
    rig.turn(fork, answer=[7])
    leave(rig)
    rig.turn([*fork, 6], answer=[7])
    leave(rig)
    assert on_disk(rig, FIRST) == 50
    rig.close()
    again = start()
    for tokens in (FIRST, fork):
        again.turn([*tokens, 9], answer=[7])  # its rows are what a prefill gives, as the rig checks
    again.check()


def test_a_restart_finds_what_came_back(start) -> None:
    rig = start()
    for tokens in (FIRST, SECOND):
        rig.turn(tokens, answer=[7])
        leave(rig)
    rig.turn([*FIRST, 5], answer=[7])
    leave(rig)
    rig.close()
    rig = start()
    assert rig.turn([*FIRST, 6], answer=[7]).host_loaded_length == len(FIRST)
    rig.evict()
    assert rig.turn([*SECOND, 6], answer=[7]).host_loaded_length == len(SYSTEM)
    rig.check()
