"""The disk tier behind the tree: demoted, restored, found after a restart, damaged, gone."""

from pathlib import Path

import pytest
from kv_oracle import LAYERS
from tree_rig import Rig

from krul_sglang.runtime import epoch, marks
from krul_sglang.runtime.marks import full_data
from krul_sglang.store import durable
from krul_sglang.strategy.base import Strategy

HISTORY = list(range(1000, 1090))
ROUNDING = Strategy("rounding")


def stored(rig: Rig, tokens=HISTORY) -> None:
    """A conversation that has left the device and is on the disk."""
    rig.turn(tokens, answer=[7])
    rig.evict()
    rig.written()


def comes_back(rig: Rig, tokens=HISTORY, tail: int = 7) -> int:
    """Tokens restored for the next turn; its rows are right, as the rig checks."""
    req = rig.turn([*tokens, tail], answer=[8])
    rig.check()
    return req.host_loaded_length


def disk(rig: Rig):
    return rig.krul.store.disk.disk


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.krul"))


def demote(rig: Rig) -> None:
    rig.krul.store.demote(1 << 40)
    assert rig.krul.store.ledger.snapshot()["tier"] == 0


@pytest.mark.parametrize("page_size", [1, 16])
def test_what_left_memory_comes_from_the_disk(make_rig, root, page_size) -> None:
    rig = make_rig(page_size, disk=root)
    stored(rig)
    whole = len(HISTORY) // page_size * page_size
    assert sum(int(f.name.split(".")[2]) for f in files(root)) == whole
    demote(rig)
    assert comes_back(rig) == whole
    assert disk(rig).totals()["opened"] > 0
    assert rig.krul.store.ledger.snapshot()["loading"] == 0
    rig.evict()
    opened = disk(rig).totals()["opened"]
    assert comes_back(rig, tail=9) == whole
    assert disk(rig).totals()["opened"] == opened, "what was read once stays in memory"


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_restart_finds_what_was_stored(make_rig, root, page_size) -> None:
    first = make_rig(page_size, disk=root)
    stored(first)
    stored(first, range(2000, 2050))
    first.close()
    rig = make_rig(page_size, disk=root)
    assert not rig.nodes()
    whole = len(HISTORY) // page_size * page_size
    assert comes_back(rig) == whole
    assert rig.krul.counters.adopted_tokens == whole
    rig.evict()
    before = len(files(root))
    rig.written()
    assert comes_back(rig, tail=9) == whole, "and is not stored twice"
    assert len(files(root)) >= before
    assert comes_back(rig, range(2000, 2050)) == 50 // page_size * page_size


def test_what_leads_to_a_stored_node_is_stored_too(make_rig, root) -> None:
    """The other conversation keeps the shared part on the device until the server dies."""
    first = make_rig(disk=root)
    shared = list(range(3000, 3040))
    first.turn([*shared, *range(100, 130)], answer=[1])
    other = first.request([*shared, *range(200, 230)])
    first.match(other)
    assert first.admit(other)
    first.prefill(other)
    first.decode(other, 5)
    first.evict()
    first.written()
    first.check()
    first.abort(other)
    first.close()
    rig = make_rig(disk=root)
    assert comes_back(rig, [*shared, *range(100, 130)]) == 70


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("first", range(3))
def test_whoever_shares_a_beginning_is_found_alone(make_rig, root, page_size, first) -> None:
    """The shared part was stored within the first conversation's segment; after a restart any of
    them may return first."""
    shared = list(range(3000, 3032))
    talks = [[*shared, *range(n, n + 48)] for n in (100, 200, 300)]
    rig = make_rig(page_size, disk=root)
    for talk in talks:
        stored(rig, talk)
    rig.close()
    rig = make_rig(page_size, disk=root)
    assert comes_back(rig, talks[first]) == 80
    rig.evict()
    for talk in talks:
        assert comes_back(rig, talk, tail=9) >= 48
        rig.evict()


def test_a_conversation_that_branched_is_found_on_both_ways(make_rig, root) -> None:
    rig = make_rig(disk=root)
    fork = [*HISTORY[:50], *range(5000, 5030)]
    deeper = [*fork[:70], *range(6000, 6020)]
    for talk in (HISTORY, fork, deeper):
        stored(rig, talk)
    rig.close()
    for talk in (deeper, fork, HISTORY):
        rig = make_rig(disk=root)
        assert comes_back(rig, talk) == len(talk)
        rig.close()


def test_exactness_survives_a_restart(make_rig, root) -> None:
    settings = {"lossy": ROUNDING, "turn_ends": [1009], "disk": root}
    first = make_rig(**settings)
    stored(first)
    first.close()
    rig = make_rig(**settings)
    req = rig.request([*HISTORY, 7])
    assert rig.match(req) == len(HISTORY)
    exact = sum(marks.exact_tokens(node) for node in rig.find(HISTORY))
    assert exact == 10, "up to the end of the first turn"
    assert comes_back(rig) == len(HISTORY)
    rig.evict()
    demanding = rig.turn([*HISTORY, 9], answer=[8], exact=True)
    assert demanding.host_loaded_length <= 10
    rig.check()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_damaged_file_is_a_miss_and_is_stored_anew(make_rig, root, layer) -> None:
    first = make_rig(disk=root)
    stored(first)
    first.close()
    (file,) = files(root)
    raw = bytearray(file.read_bytes())
    raw[len(raw) - 1 - (LAYERS - 1 - layer) * len(raw) // (LAYERS + 1)] ^= 4
    file.write_bytes(raw)
    rig = make_rig(disk=root)
    assert comes_back(rig) == 0
    assert rig.krul.store.stats.lost_segments == 1
    assert rig.krul.store.disk.wait_written(20)
    assert disk(rig).totals()["damaged"] == 1
    assert rig.krul.counters.recomputed_tokens == len(HISTORY)
    rig.evict()
    rig.written()
    demote(rig)
    assert comes_back(rig, tail=9) >= len(HISTORY)


@pytest.mark.parametrize("when", ["known", "restarted"])
def test_a_file_somebody_removed_is_a_miss(make_rig, root, when) -> None:
    rig = make_rig(disk=root)
    stored(rig)
    if when == "restarted":
        rig.close()
        rig = make_rig(disk=root)
    demote(rig)
    for file in files(root):
        file.unlink()
    assert comes_back(rig) == 0
    rig.evict()
    rig.written()
    demote(rig)
    assert comes_back(rig, tail=9) >= len(HISTORY)


def test_more_than_memory_holds(make_rig, root) -> None:
    """Conversations of six times the memory budget all come back."""
    rig = make_rig(disk=root, host_memory=150_000)
    talks = [list(range(n * 1000, n * 1000 + 90)) for n in range(1, 25)]
    for talk in talks:
        rig.turn(talk, answer=[7])
        rig.evict()
    rig.written()
    assert rig.krul.store.totals()["stored_bytes"] > 2 * rig.krul.store.ledger.limit
    assert rig.krul.counters.dropped_tokens == 0
    for talk in talks:
        assert comes_back(rig, talk) == 90
        rig.evict()
    snapshot = rig.krul.store.ledger.snapshot()
    assert snapshot["peak"] <= snapshot["limit"]


@pytest.mark.parametrize("key", [{"extra_key": "a"}, {"cache_salt": "a"}])
def test_another_namespace_is_a_miss(make_rig, root, key) -> None:
    first = make_rig(disk=root)
    stored(first)
    first.close()
    rig = make_rig(disk=root)
    assert rig.match(rig.request([*HISTORY, 7], **key)) == 0
    assert rig.match(rig.request([*HISTORY, 7])) == len(HISTORY)


def test_what_another_server_stores_is_found_soon(make_rig, root, monkeypatch) -> None:
    """By one that itself writes nothing: a request that finds nothing makes it look around."""
    monkeypatch.setattr(durable, "REFRESH_SECONDS", 0.0)
    reader, writer = make_rig(disk=root), make_rig(disk=root)
    stored(writer)
    stored(writer, range(2000, 2050))
    assert comes_back(reader, range(4000, 4010)) == 0
    assert reader.krul.store.disk.wait_written(20)
    assert comes_back(reader) == len(HISTORY)
    assert comes_back(reader, range(2000, 2050)) == 50


def test_a_flush_leaves_the_disk(make_rig, root) -> None:
    rig = make_rig(disk=root)
    stored(rig)
    rig.cache.reset()
    assert rig.krul.store.ledger.used == 0
    assert files(root)
    assert comes_back(rig) == len(HISTORY)


def test_a_disk_that_cannot_be_written_keeps_serving_from_memory(make_rig, root) -> None:
    rig = make_rig(disk=root, disk_limit=100)
    stored(rig)
    assert not files(root)
    assert rig.krul.store.demote(1 << 40) == 0
    assert comes_back(rig) == len(HISTORY)


def test_a_stored_part_of_a_node_is_found(make_rig, root) -> None:
    """The tree ends inside an entry: only what is missing joins it."""
    first = make_rig(disk=root)
    stored(first)
    first.close()
    rig = make_rig(disk=root)
    rig.turn(HISTORY[:33], answer=[7], exact=False)
    req = rig.request([*HISTORY, 7])
    assert rig.match(req) == len(HISTORY)
    assert full_data(rig.find(HISTORY)[-1]).host_value is not None
    assert comes_back(rig) > 0


@pytest.mark.parametrize("moment", ["staged", "sealed", "demoted", "on the device"])
def test_new_weights_leave_nothing_to_restore(make_rig, root, moment) -> None:
    """Whatever was stored is a miss, no file of the old weights is read or written, and what is
    stored from now on is exact."""
    rig = make_rig(lossy=ROUNDING, turn_ends=[1009], disk=root)
    rig.turn(HISTORY, answer=[7])
    if moment != "on the device":
        rig.evict()
    if moment in ("sealed", "demoted"):
        rig.written()
    if moment == "demoted":
        demote(rig)
    before = files(root)
    epoch.begin(rig.cache)
    assert rig.krul.store.ledger.snapshot()["tier"] == 0
    if moment == "on the device":
        rig.evict()
        assert rig.krul.store.wait_sealed(20)
        assert {s.codec for s in rig.krul.store._segments.values()} == {"lossless"}
    else:
        assert comes_back(rig) == 0
    rig.evict()
    assert rig.krul.store.wait_sealed(20)
    assert comes_back(rig, tail=9) >= len(HISTORY)
    assert len(files(root)) <= len(before) + 1
    rig.close()
    again = make_rig(lossy=ROUNDING, turn_ends=[1009], disk=root)
    assert again.match(again.request([*HISTORY, 7])) in (0, len(HISTORY), 10)


def test_what_the_disk_let_go_of_is_a_miss_above_which_all_is_restored(make_rig, root) -> None:
    """The budget of the disk is smaller than what the tree knows: nothing counts as damaged, and
    what is still there is used."""
    rig = make_rig(disk=root)
    longer = [*HISTORY, *range(7000, 7040)]
    stored(rig)
    stored(rig, longer)
    demote(rig)
    tier = disk(rig)
    (last,) = tier.covering(tier.longest_path((None, None), longer).digest, len(longer))
    tier._catalog._evict(last)
    req = rig.request([*longer, 7])
    assert rig.match(req) == len(HISTORY)
    assert rig.admit(req)
    assert req.host_loaded_length == len(HISTORY)
    rig.abort(req)
    assert rig.krul.store.stats.gone_segments == 1
    assert rig.krul.store.stats.lost_segments == 0
    assert tier.totals()["damaged"] == 0


def test_memory_keeps_what_the_disk_let_go_of(make_rig, root) -> None:
    rig = make_rig(disk=root)
    stored(rig)
    tier = disk(rig)
    for name in tier.names():
        tier._catalog._evict(name)
    assert rig.krul.store.demote(1 << 40) == 0
    assert comes_back(rig) == len(HISTORY)


def test_what_memory_serves_is_used_on_the_disk_too(make_rig, root) -> None:
    """Else the file of the busiest conversation would be the first to go."""
    rig = make_rig(disk=root)
    stored(rig)
    stored(rig, range(2000, 2090))
    oldest = disk(rig).names()[0]
    assert comes_back(rig) == len(HISTORY)
    assert rig.krul.store.disk.wait_written(20)
    assert disk(rig).names()[-1] == oldest or disk(rig).names()[0] != oldest


def test_a_bug_in_what_is_done_later_does_not_end_the_writer(make_rig, root, caplog) -> None:
    rig = make_rig(disk=root)
    publish, disk(rig).publish = disk(rig).publish, None
    stored(rig)
    assert rig.krul.store.disk.unwritten == 0
    assert "failed" in caplog.text
    disk(rig).publish = publish
    stored(rig, range(2000, 2090))
    assert rig.krul.store.demote(1 << 40) > 0
    assert comes_back(rig) == comes_back(rig, range(2000, 2090)) == 90
