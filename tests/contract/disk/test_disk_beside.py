"""What is beside a restore from the disk: memory, operators, other servers."""

import pytest
from batches import step
from faulty_codec import converse
from returns import HISTORY, OPENING, comes_back, demote, files, finish, gone, returning

from krul_sglang.restore.load import Loader
from krul_sglang.runtime.conversations import list_newest
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, forget, gc, verify
from krul_sglang.upkeep.survey import survey

pytestmark = pytest.mark.usefixtures("small_reads")


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
