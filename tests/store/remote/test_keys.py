"""Where entries are listed: found by whoever has the conversation, in few lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from remote_kit import ids_of

from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.remote.keys import Keys, mark_of, marks


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 14), st.data())
def test_whoever_asks_finds_the_mark_of_every_end(covered, more, data) -> None:
    stop = data.draw(st.integers(covered + 1, covered + more))
    asked = list(marks(covered, covered + more))
    assert mark_of(stop) in asked
    assert asked == sorted(set(asked))
    assert 0 not in asked


def test_few_lists_are_asked_for() -> None:
    assert len(list(marks(0, 4096))) <= 128
    assert len(list(marks(0, 1 << 17))) < 512
    assert len(list(marks(1 << 17, (1 << 17) + 1000))) < 4


def test_keys_depend_on_all_that_separates_conversations() -> None:
    ids = ids_of(1, 200)
    other = ids.copy()
    other[100] += 1
    keys = {
        Keys(fingerprint, namespace).list_of(talk, 200)
        for fingerprint in (bytes(16), b"f" * 16)
        for namespace in (Namespace(), Namespace("a"), Namespace(None, "a"), Namespace("", "a"))
        for talk in (ids, other, ids[::-1])
    }
    assert len(keys) == 24
