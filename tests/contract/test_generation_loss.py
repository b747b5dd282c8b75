"""What was lossy once is not encoded lossily again, with or without its stored original."""

import pytest
from kv_oracle import ROUNDING
from tree_rig import Rig

from krul_sglang.runtime.marks import first_hand_tokens, full_data

END = 9


def lossy_rig(make_rig, page_size: int) -> tuple[Rig, list[int]]:
    """A rig with one conversation, evicted and restored."""
    rig = make_rig(page_size, lossy=ROUNDING, turn_ends=[END])
    history = [5, END, *range(100, 178)]
    rig.turn(history, answer=[1])
    rig.evict()
    rig.sealed()  # what is staged still is restored as it was
    rig.turn([*history, 2], answer=[1])
    return rig, history


def forget_originals(rig: Rig) -> None:
    """Let stored leaves go, then the stored copies of what is on the device."""
    while rig.cache.evict_host(1 << 20):
        pass


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("generations", [1, 4])
def test_no_original_no_second_loss(make_rig, page_size: int, generations: int) -> None:
    """The stored copies go while their rows are on the device; check() knows what one
    generation of loss looks like, and accepts no other."""
    rig, history = lossy_rig(make_rig, page_size)
    assert any(first_hand_tokens(node) < len(node.key) for node in rig.nodes())
    for turn in range(generations):
        forget_originals(rig)
        assert all(full_data(node).host_value is None for node in rig.nodes() if not node.evicted)
        rig.evict()
        rig.check()
        req = rig.turn([*history, 3 + turn], answer=[1])
        assert req.host_loaded_length >= len(history) // page_size * page_size
        rig.check()


def test_with_its_original_nothing_is_encoded(make_rig) -> None:
    rig, history = lossy_rig(make_rig, 1)
    encoded = rig.krul.store.stats.encoded_segments
    rig.evict(2)  # the answer and the new turn have no stored copy yet
    rig.sealed()
    own = rig.krul.store.stats.encoded_segments - encoded
    rig.evict()
    rig.sealed()
    assert rig.krul.store.stats.encoded_segments - encoded == own == 1
    rig.turn([*history, 4], answer=[1])
    rig.check()


def test_a_split_keeps_what_is_first_hand(make_rig) -> None:
    """Branching off in the middle of decoded rows, then losing the originals of both halves."""
    rig, history = lossy_rig(make_rig, 1)
    rig.turn([*history[:50], 7, 7], answer=[1])
    forget_originals(rig)
    rig.evict()
    rig.check()
    rig.turn([*history, 8], answer=[1])
    rig.check()
