"""Storing a node that leaves the device: where it is cut, and how it finds room."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from krul_sglang.runtime import admission, marks
from krul_sglang.runtime.adoption import namespace
from krul_sglang.runtime.selection import strategy_of
from krul_sglang.store.segment import RECORD_BYTES, SLOT_BYTES, Origin
from krul_sglang.strategy.base import EXACT, SINKS

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache
    from krul_sglang.store.disk.entry import Namespace

logger = logging.getLogger(__name__)

# Longest run that becomes one segment: bounds staging and lets loads run in parallel.
SEGMENT_TOKENS = 1024
# How long an eviction waits for the encoder before it drops the victim instead.
STAGING_WAIT_SECONDS = 5.0


def store_node(cache: KrulRadixCache, node: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """Gather and stage a node's rows (int64 ``[n]``), and mark what of them is exact.

    Returns the node's slot ids, int64 ``[n]``, or None when there is no room.
    """
    krul = cache.krul
    start = sum(len(above.key) for above in cache.path(node.parent.id))
    head = _exact_head(cache, node, start)
    already_exact = marks.exact_tokens(node)
    whose, tokens = _origin(cache, node)
    ids: list[torch.Tensor] = []
    first_hand = marks.first_hand_tokens(node) if krul.selector else rows.numel()
    for lo, hi, exact in _pieces(rows.numel(), head, first_hand):
        raw, index = (hi - lo) * krul.pool.spec.token_bytes, (hi - lo) * SLOT_BYTES + RECORD_BYTES
        if whose is not None:
            index += tokens[: start + hi].nbytes
        if not _make_room(cache, raw, index):
            for held in ids:
                krul.store.release(held)
            return None
        run = krul.pool.gather(rows[lo:hi], start + lo)
        lossless = exact or krul.selector is None
        strategy = EXACT
        if krul.selector is not None and not exact:
            strategy = strategy_of(krul.selector, node, lo, hi)
        as_computed = max(0, min(hi, already_exact) - lo) if lossless else 0
        origin = None if whose is None else Origin(whose, tokens[: start + hi], as_computed)
        _, piece = krul.store.stage(run, strategy, lossless and hi <= already_exact, origin)
        ids.append(piece)
    marks.mark_stored(node, head)
    return torch.cat(ids)


def _origin(cache: KrulRadixCache, node: Any) -> tuple[Namespace | None, np.ndarray]:
    """Whose tokens a node's are, and all of them from the conversation's first on; nobody's
    where no tier below is to have them."""
    if not admission.is_admitted(cache, node):
        return None, np.empty(0, np.int64)
    keys = [above.key for above in reversed(list(cache.path(node.id)))]
    ids = [np.asarray(key.token_ids[: len(key)], np.int64) for key in keys]
    return namespace(node.key), np.concatenate(ids)


def _pieces(tokens: int, head: int, first_hand: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a node into segments ``[lo, hi)``, each exact or not: its exact head, then what may
    be lossy, then what was lossy before and must not lose again."""
    lossy_end = max(head, first_hand)
    for begin, end, exact in ((0, head, True), (head, lossy_end, False), (lossy_end, tokens, True)):
        for lo in range(begin, end, SEGMENT_TOKENS):
            yield lo, min(lo + SEGMENT_TOKENS, end), exact


def _exact_head(cache: KrulRadixCache, node: Any, start: int) -> int:
    """How many of the node's first tokens stay exact because others may share them.

    Everything above a branch is shared already. A conversation's opening up to its
    first end of turn (a system prompt) may be shared by the next one.
    """
    tokens = len(node.key)
    if cache.krul.selector is None or _is_above_branch(node):
        return tokens
    head = max(0, SINKS - start, _opening(cache, node))
    return min(tokens, math.ceil(head / cache.page_size) * cache.page_size)


def _opening(cache: KrulRadixCache, node: Any) -> int:
    """How many of the node's tokens precede the end of the conversation's first turn."""
    ends = cache.krul.turn_ends
    # From the root: the first turn nearly always ends in the first node.
    for above in reversed(list(cache.path(node.parent.id))):
        if not ends.isdisjoint(above.key.token_ids[: len(above.key)]):
            return 0
    for offset, token in enumerate(node.key.token_ids[: len(node.key)]):
        if token in ends:
            return offset + 1
    return 0


def _is_above_branch(node: Any) -> bool:
    while len(node.children) == 1:
        node = next(iter(node.children.values()))
    return len(node.children) > 1


def _make_room(cache: KrulRadixCache, nbytes: int, index: int) -> bool:
    """Fit ``nbytes`` of raw staging and ``index`` bytes of records under the budget; the same
    answer on every rank.

    Gives up what was prefetched and waits for the encoder first (raw is several times the
    sealed size), then asks the tree to let stored leaves go, oldest first.
    """
    store, agree = cache.krul.store, cache.agree
    needed = nbytes + index
    if agree([needed - store.ledger.limit])[0] > 0:
        return False
    fits = store.wait_for_staging(nbytes, STAGING_WAIT_SECONDS)
    if agree([not fits])[0]:
        logger.warning("krul: the encoder does not keep up; a conversation was dropped")
        return False
    waited = False
    while True:
        store.demote(store.ledger.used + needed - store.ledger.limit)
        excess = store.ledger.used + needed - store.ledger.limit
        excess, victims = agree([excess, tokens_worth(cache, excess)])
        if excess <= 0:
            return True
        cache.restores.prefetches.drop_all()
        if not waited:
            store.wait_sealed(STAGING_WAIT_SECONDS)
            if store.disk is not None:
                store.disk.wait_written(STAGING_WAIT_SECONDS)
            waited = True
        elif cache.evict_host(victims) == 0:
            return False


def tokens_worth(cache: KrulRadixCache, nbytes: int) -> int:
    """How many stored tokens take about ``nbytes``, in whole pages, at least one."""
    totals = cache.krul.store.totals()
    held = max(1, cache.krul.store.ledger.used)
    tokens = math.ceil(max(0, nbytes) * totals["stored_tokens"] / held)
    return max(1, math.ceil(tokens / cache.page_size)) * cache.page_size
