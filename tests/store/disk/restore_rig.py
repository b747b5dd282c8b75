"""Real payloads of every codec, read from the disk as a restore reads them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from disk_kit import FINGERPRINT, PLAIN, PLENTY
from small_profile import LAYERS, PROFILE, make_run, spec_of

from krul_sglang.codec.base import CodecError
from krul_sglang.codec.registry import make_codec
from krul_sglang.store.disk.entry import EntryName
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.durable import Durable
from krul_sglang.store.memory import MemoryStore
from krul_sglang.strategy.base import Strategy
from krul_sglang.strategy.fixed import fixed_pairs

SPEC = spec_of("bfloat16")
RUN = 30
STRATEGIES = {
    "lossless": Strategy("lossless"),
    "pair_merge": Strategy("pair_merge", pairs=fixed_pairs(LAYERS)),
    "predictive": Strategy("predictive", 0.01),
}


class Restorer:
    """One entry of ``codec`` in a tier on ``root``, behind a memory tier that is empty."""

    def __init__(self, root: Path, codec: str) -> None:
        self.codec = make_codec(codec, SPEC, PROFILE)
        self.payload = self.codec.encode(make_run(RUN, 3, SPEC.dtype), STRATEGIES[codec])
        self.tier = DiskTier(root, FINGERPRINT, PLENTY)
        self.store = MemoryStore(
            SPEC, 1 << 24, lambda name: self.codec, "lossless", disk=Durable(self.tier)
        )
        self.name = self.publish()
        self.path = root / "v1" / FINGERPRINT.hex() / self.name.shard / self.name.file
        self.whole = self.path.read_bytes()
        self.head = len(self.whole) - len(self.payload)
        self.rows = self.restore()
        assert self.rows is not None

    def publish(self) -> EntryName:
        done = self.tier.publish(
            PLAIN,
            range(RUN),
            0,
            self.payload,
            codec=self.codec.name,
            exact_tokens=0,
            raw_bytes=RUN * SPEC.token_bytes,
        )
        assert done.outcome is Outcome.STORED
        assert done.name is not None
        return done.name

    def put(self, raw: bytes) -> None:
        """Replace the file by ``raw`` behind the tier's back, under the same name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(raw)
        self.tier.refresh()

    def restore(self) -> list[torch.Tensor] | None:
        """K and V of every layer, read layer by layer; None is a miss."""
        found = self.tier.open(self.name, PLAIN, range(RUN))
        if found is None:
            return None
        found[0].close()
        ids = self.store.adopt(self.name, found[0].entry, 0, RUN)
        segment = self.store.get(int(ids[0]) >> 24)
        assert segment is not None
        try:
            reader = self.store.open(segment)
            rows = []
            layers = reader.layers(0, RUN)
            for layer in range(LAYERS):
                reader.fetch(layer)
                rows += next(layers)
            return rows
        except CodecError:
            self.store.mark_lost(segment.id)
            assert self.store.disk.wait_written(20), "it is set aside in the background"
            return None
        finally:
            self.store.release(ids)

    def close(self) -> None:
        """Nothing that was read is held any more; the thread that opens lets go a bit later."""
        until = time.monotonic() + 5
        while self.store.ledger.snapshot()["loading"]:
            assert time.monotonic() < until
            time.sleep(0.001)
        self.store.close()


def same(found: list[torch.Tensor], rows: list[torch.Tensor]) -> bool:
    return len(found) == len(rows) and all(map(torch.equal, found, rows))
