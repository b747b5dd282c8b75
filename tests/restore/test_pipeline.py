"""The pipeline: layers in order, loads of a batch side by side, and every way to end."""

import threading
from itertools import pairwise

import pytest
import torch

from krul_sglang.restore.load import Loader
from krul_sglang.store.slots import slot_runs


class Recorder:
    """A sink that notes which load wrote which layer, in order."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    def of(self, name: str):
        def sink(layer, first, k, v):
            with self.lock:
                self.writes.append((name, layer, first))

        return sink


def start(loader: Loader, ids: torch.Tensor, sink):
    opened = loader.open(slot_runs(ids))
    assert not opened.lost
    return loader.start(opened, sink)


def test_a_link_brings_the_layers_of_all_loads_in_order(stored) -> None:
    """Two loads asked for at once: no layer of either comes before a lower one of the other."""
    assert stored.store.wait_sealed(20)
    whole = sum(segment.stored_bytes for segment in stored.segments)
    loader, seen = stored.loader(threads=1, bandwidth=whole / 0.2), Recorder()
    loads = [start(loader, stored.ids, seen.of(name)) for name in "ab"]
    for load in loads:
        assert load.wait(20)
        assert load.ok
    # The link had begun on the first load's lowest layer before it knew of the second.
    layers = [layer for _, layer, _ in seen.writes]
    assert sorted(layers) == sorted([0, 1, 2] * 6)
    first_of = {(n, layer): layers_at(seen.writes, n, layer)[0] for n in "ab" for layer in range(3)}
    last_of = {(n, layer): layers_at(seen.writes, n, layer)[-1] for n in "ab" for layer in range(3)}
    for lower in (0, 1):
        assert last_of["a", lower] < first_of["b", lower + 1]
        assert last_of["b", lower] < first_of["a", lower + 1]


def layers_at(writes, name: str, layer: int) -> list[int]:
    return [i for i, (n, own, _) in enumerate(writes) if (n, own) == (name, layer)]


def test_bytes_take_their_time_on_the_link(stored) -> None:
    """Every layer arrives no sooner than its bytes and those below it can have come."""
    assert stored.store.wait_sealed(20)
    loader, seen = stored.loader(bandwidth=20_000.0), Recorder()
    load = start(loader, stored.ids, seen.of("a"))
    assert load.wait(20)
    due = 0.0
    readers = [stored.store.open(segment) for segment in stored.segments]
    for layer, each in enumerate(zip(*(reader.layer_bytes() for reader in readers), strict=True)):
        due += sum(each) / 20_000.0
        for begin, _ in load.trace.decodes[layer][-1:]:
            assert begin - load.trace.began >= due * 0.999
    assert load.trace.bytes == load.stored_bytes == sum(s.stored_bytes for s in stored.segments)
    assert load.trace.fetch_seconds == pytest.approx(due, rel=0.3)


def test_a_layer_can_be_used_before_the_next_one_is_there(stored) -> None:
    gate = threading.Event()

    def sink(layer, first, k, v):
        if layer == 1:
            assert gate.wait(20)
        return f"event {layer} {first}"

    load = start(stored.loader(threads=1), stored.ids, sink)
    assert load.wait_layer(0, 20)
    assert sorted(load.events(0)) == ["event 0 0", "event 0 20", "event 0 27"]
    assert not load.wait_layer(1, 0.05), "a layer that has yet to come is waited for"
    assert not load.over
    gate.set()
    assert load.wait(20)
    assert load.ok
    assert len(load.events(2)) == 3


def test_a_load_nobody_waits_for_comes_last(stored) -> None:
    assert stored.store.wait_sealed(20)
    loader, seen, gate = stored.loader(threads=1), Recorder(), threading.Event()
    opened = loader.open(slot_runs(stored.ids))
    first = loader.start(opened, lambda *_: gate.wait(20))  # keeps the one thread busy
    early = loader.start(loader.open(slot_runs(stored.ids)), seen.of("early"), urgent=False)
    urgent = start(loader, stored.ids, seen.of("urgent"))
    gate.set()
    for load in (first, early, urgent):
        assert load.wait(20)
        assert load.ok
    assert [name for name, _, _ in seen.writes] == ["urgent"] * 9 + ["early"] * 9


@pytest.mark.parametrize("written", range(10))
def test_a_load_goes_on_into_another_sink(stored, written: int) -> None:
    """Redirected after any number of writes, every layer of every stream lands in one of the
    two sinks, and nothing in the old one afterwards."""
    assert stored.store.wait_sealed(20)
    loader, seen, inside = stored.loader(threads=2), Recorder(), threading.Event()
    gate, into_old = threading.Semaphore(written), seen.of("old")

    def old(*write):
        into_old(*write)
        if len(seen.writes) >= written:
            inside.set()
        gate.acquire(timeout=0.2)

    load = loader.start(loader.open(slot_runs(stored.ids)), old, urgent=False)
    if written:
        assert inside.wait(20)
    loader.redirect(load, seen.of("new"))
    until = len([name for name, _, _ in seen.writes if name == "old"])
    assert load.wait(20)
    assert load.ok
    assert [name for name, _, _ in seen.writes].count("old") == until
    assert sorted(write[1:] for write in seen.writes) == sorted(
        (layer, first) for layer in range(3) for first in {w[2] for w in seen.writes}
    )
    assert len(seen.writes) == 9


def test_nothing_is_written_after_a_cancel(stored) -> None:
    inside, gate, writes = threading.Event(), threading.Event(), []

    def sink(layer, first, k, v):
        inside.set()
        assert gate.wait(20)
        writes.append(layer)

    loader = stored.loader(threads=1)
    load = start(loader, stored.ids, sink)
    assert inside.wait(20)
    threading.Timer(0.1, gate.set).start()
    load.cancel()
    assert len(writes) == 1, "it returned while a thread was writing"
    assert load.over
    assert not load.ok
    assert load.wait_layer(2, 1), "whoever waits for a layer goes on"
    loader.close()  # joins the threads
    assert len(writes) == 1


def test_a_load_that_stalls_can_be_cancelled(stored) -> None:
    assert stored.store.wait_sealed(20)
    loader = stored.loader(bandwidth=1.0)
    load = start(loader, stored.ids, Recorder().of("a"))
    assert not load.wait(0.05)
    load.cancel()
    assert load.wait(1)
    quick = start(loader, stored.ids[:0], Recorder().of("b"))
    assert quick.ok, "nothing to load is loaded"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_sink_that_fails_ends_the_load_and_not_the_thread(stored, layer: int, caplog) -> None:
    loader, seen = stored.loader(threads=2), Recorder()

    def sink(at, first, k, v):
        if at == layer and first == 20:
            raise MemoryError("no room")

    load = start(loader, stored.ids, sink)
    assert load.wait(20)
    assert load.failed == [stored.segments[1].id]
    assert "could not be loaded" in caplog.text
    again = start(loader, stored.ids, seen.of("again"))
    assert again.wait(20)
    assert again.ok
    assert len(seen.writes) == 9


def test_closing_ends_what_is_under_way(stored) -> None:
    assert stored.store.wait_sealed(20)
    loader = stored.loader(bandwidth=1.0)
    load = start(loader, stored.ids, Recorder().of("a"))
    loader.close()
    assert load.wait(1)
    assert not load.ok
    late = start(loader, stored.ids, Recorder().of("b"))
    assert late.cancelled


def test_many_loads_on_few_threads(stored) -> None:
    """64 loads of random parts: each ends whole, each in the order of its layers."""
    assert stored.store.wait_sealed(20)
    loader, seen = stored.loader(threads=2), Recorder()
    order = torch.Generator().manual_seed(1)
    loads = {}
    for n in range(64):
        lo, hi = sorted(torch.randint(0, 61, (2,), generator=order).tolist())
        loads[str(n)] = start(loader, stored.ids[lo:hi], seen.of(str(n)))
    for name, load in loads.items():
        assert load.wait(60)
        assert load.ok
        for first in {at for n, _, at in seen.writes if n == name}:
            layers = [layer for n, layer, at in seen.writes if (n, at) == (name, first)]
            assert all(a < b for a, b in pairwise(layers))
            assert len(layers) == 3
