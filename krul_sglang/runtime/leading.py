"""What leads to a node that is stored for longer than the server lives.

The tiers below memory are found from the conversation's first token on, segment behind segment. So
whatever leads to a node must be stored too, and in segments that end on its own path: one that was
cut for another conversation goes on with that one's tokens, and is not found for this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.kv_events import StorageMedium

from krul_sglang.runtime import backup
from krul_sglang.runtime.admission import segments_ending
from krul_sglang.runtime.marks import full_data
from krul_sglang.store.slots import slot_runs

if TYPE_CHECKING:
    from krul_sglang.runtime.cache import KrulRadixCache


def store_above(cache: KrulRadixCache, node: Any) -> None:
    """Store what leads to a node that leaves the device, root side first, where that is on the
    device only or in segments that end elsewhere."""
    path = list(reversed(list(cache.path(node.parent.id))))
    ending = segments_ending(cache, path)
    for above in path:
        if above.backuped:
            ids = full_data(above).host_value
            if ending.issuperset(run.segment for run in slot_runs(ids)):
                continue
            if full_data(above).value is None or cache.restores.is_loading(above):
                return  # its rows are not there: what follows is found while this server lives
            cache.forget_stored(above)
        rows, _ = cache.tree_core.build_backup_spec(above.id)
        ids = backup.store_node(cache, above, rows)
        if ids is None:
            return
        cache.tree_core.commit_backup(above.id, ids, {})
        cache.krul.counters.evicted_tokens += rows.numel()
        cache.journal.stored(ids)
        cache.tree_core._update_duplicate_tracking(above)
        cache.tree_core.kv_events.record_store(above, medium=StorageMedium.CPU)
