"""A new set of weights: nothing stored under the old ones is read again.

Every update begins one, whether or not it flushes the cache and whether or not it succeeds: one
that fails half way has changed weights too. The epoch lives as long as the server; nothing is
written to the disk any more, as the files the entries are bound to are not what is served.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from krul_sglang.strategy.exact import ExactSelector

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache

logger = logging.getLogger(__name__)


def before_update(manager: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``SchedulerWeightUpdaterManager.update_weights_from_*``."""
    cache: Any = getattr(manager.scheduler, "tree_cache", None)
    if hasattr(cache, "krul"):
        begin(cache)


def begin(cache: KrulRadixCache) -> None:
    """Give up what was stored, what is being encoded or written, and the profile."""
    krul = cache.krul
    cache.restores.prefetches.drop_all()
    krul.store.renounce()
    if krul.selector is not None:
        krul.selector = ExactSelector()
    krul.taps = None
    logger.warning(
        "krul: the weights change: what was stored is not read any more, and from now on it is "
        "stored losslessly, in memory only; start the server on the new weights for the rest"
    )
    cache.publish()
