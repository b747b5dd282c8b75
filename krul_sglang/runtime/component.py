"""The FULL component of the prefix tree, with Krul's store behind its host side."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.cache_action import FreeDeviceKV
from sglang.srt.mem_cache.unified_cache.components.full import FullComponent

from krul_sglang.runtime import admission, marks
from krul_sglang.runtime.marks import full_data


class KrulFullComponent(FullComponent):
    """Stock behaviour, plus: slot ids return to the store, exactness marks follow a
    split, and an exact request's KV replaces a lossy copy nobody else is reading."""

    def free_host_values(self, host_values: list[torch.Tensor]) -> None:
        """Slot ids leave the tree: give their tokens back to the store."""
        for ids in host_values:
            self.cache.krul.store.release(ids)

    def redistribute_on_node_split(self, new_parent: Any, child: Any) -> None:
        """Slot ids say themselves what each half stores; the marks are divided."""
        super().redistribute_on_node_split(new_parent, child)
        marks.split(new_parent, child)
        admission.split(new_parent, child)

    def update_component_on_insert_overlap(
        self,
        node: Any,
        prefix_len: int,
        total_prefix_len: int,
        value_slice: torch.Tensor,
        params: Any,
        result: Any,
        cache_actions: list,
    ) -> int:
        """Let an exact recompute take a lossy node over; see the base class."""
        data = full_data(node)
        if not (
            self.cache.inserting_exact
            and marks.is_lossy(node)
            and data.lock_ref == 0
            and params.prev_prefix_len <= total_prefix_len
        ):
            return prefix_len
        cache_actions.append(FreeDeviceKV([data.value]))
        data.value = value_slice.clone()
        marks.mark_computed(node, exact=True)
        self.cache.forget_stored(node)
        return 0
