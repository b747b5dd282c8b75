"""Exactness marks: how much of a tree node's KV is what an exact prefill would give.

A node's device rows and its stored copy may differ in that, so each has a mark: the
number of leading tokens that are exact. No mark means all of them. The marks live in
the node's component metadata and follow it through split, restore and re-eviction.

A third mark, of the same form, says from which token on the device rows were decoded
from a lossy segment: encoding those once more would lose quality a second time.

A node that has yet to be stored may also carry what was measured of its tokens, or that it
is not worth storing (:mod:`.truncation`); the last one that is worth it then carries how long
its conversation was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.unified_cache.components.base import ComponentType

if TYPE_CHECKING:
    from krul_sglang.runtime.selection import Measured

DEVICE = "krul_exact_on_device"
STORED = "krul_exact_in_store"
FIRST_HAND = "krul_first_hand_on_device"
TAG = "krul_measured"
UNWANTED = "krul_not_worth_storing"
HISTORY = "krul_history"


def full_data(node: Any) -> Any:
    """The node's FULL component data (``value``: device rows, ``host_value``: slot ids)."""
    return node.component_data[ComponentType.FULL]


def exact_tokens(node: Any) -> int:
    """Leading tokens of the node that a request is served exactly, on device or restored."""
    return len(node.key) - lossy_tokens(node)


def lossy_tokens(node: Any) -> int:
    """Tokens of the node that are served as KV that is not exact."""
    data = full_data(node)
    exact = data.metadata.get(STORED if data.value is None else DEVICE)
    # Asked of every node of a path at every step, and a key's length takes a microsecond.
    return 0 if exact is None else max(0, len(node.key) - exact)


def is_lossy(node: Any) -> bool:
    """Whether any token of the node is served as KV that is not exact."""
    return lossy_tokens(node) > 0


def mark_stored(node: Any, head: int) -> None:
    """The node's device rows were just stored, exactly up to ``head`` tokens."""
    _set(node, STORED, min(head, exact_tokens(node)))
    full_data(node).metadata.pop(TAG, None)


def mark_adopted(node: Any, exact: int) -> None:
    """The node was just put into the tree with a stored copy only, exact up to ``exact``."""
    _set(node, STORED, exact)


def mark_loaded(node: Any) -> None:
    """The stored copy was just written to the node's device rows."""
    exact = full_data(node).metadata.get(STORED, len(node.key))
    _set(node, DEVICE, exact)
    _set(node, FIRST_HAND, exact)


def mark_computed(node: Any, exact: bool) -> None:
    """The device rows were just computed, on a prefix that was exact or was not."""
    metadata = full_data(node).metadata
    metadata.pop(FIRST_HAND, None)
    if exact:
        metadata.pop(DEVICE, None)
    else:
        metadata[DEVICE] = 0


def first_hand_tokens(node: Any) -> int:
    """Leading tokens whose device rows were computed, or restored from an exact copy."""
    return min(len(node.key), full_data(node).metadata.get(FIRST_HAND, len(node.key)))


def tag(node: Any, measured: Measured) -> None:
    """What was just measured of the node's tokens."""
    full_data(node).metadata[TAG] = measured


def tag_of(node: Any) -> Measured | None:
    """What was measured of the node's tokens, None where nothing was."""
    return full_data(node).metadata.get(TAG)


def unwant(node: Any) -> None:
    """The node's tokens are not to be stored: a restore would compute them anyway."""
    full_data(node).metadata[UNWANTED] = True


def want(node: Any) -> None:
    """The node's tokens are to be stored like any other's, and nothing behind it is missing."""
    for mark in (UNWANTED, HISTORY):
        full_data(node).metadata.pop(mark, None)


def is_unwanted(node: Any) -> bool:
    """Whether the node's tokens are not worth storing."""
    return UNWANTED in full_data(node).metadata


def keep_history(node: Any, tokens: int) -> None:
    """What follows the node is not stored; its conversation had ``tokens``."""
    full_data(node).metadata[HISTORY] = tokens


def history(node: Any) -> int:
    """Tokens of the conversation whose stored part the node ends, 0 where nothing is missing."""
    return full_data(node).metadata.get(HISTORY, 0)


def forget_stored(node: Any) -> None:
    """The node has no stored copy any more."""
    full_data(node).metadata.pop(STORED, None)


def split(parent: Any, child: Any) -> None:
    """``parent`` was just split off the front of ``child``; both keys are final."""
    length = len(parent.key)
    for mark in (DEVICE, STORED, FIRST_HAND):
        exact = full_data(child).metadata.pop(mark, None)
        if exact is not None:
            _set(parent, mark, min(exact, length))
            _set(child, mark, max(0, exact - length))
    if is_unwanted(child):
        unwant(parent)
    measured = full_data(child).metadata.pop(TAG, None)
    if measured is not None:
        tag(parent, measured.cut(0, length))
        tag(child, measured.cut(length, length + len(child.key)))


def _set(node: Any, mark: str, exact: int) -> None:
    if exact < len(node.key):
        full_data(node).metadata[mark] = exact
    else:
        full_data(node).metadata.pop(mark, None)
