"""Child process: fill and thin out a store, print what it says it holds and what RSS says."""

import gc
import json
import random
import sys
import time

import psutil
import torch

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.registry import make_codec
from krul_sglang.store.memory import MemoryStore
from krul_sglang.strategy.base import Strategy
from krul_sglang.strategy.fixed import fixed_pairs


def main() -> None:
    codec = sys.argv[1]
    pairs = fixed_pairs(30) if codec == "pair_merge" else ()
    torch.set_num_threads(1)
    spec = KVSpec(layers=30, kv_heads=3, head_dim=64, v_head_dim=64, dtype="float32")
    store = MemoryStore(spec, 4 << 30, lambda name: make_codec(name, spec), "lossless")

    def stage(tokens: int) -> torch.Tensor:
        shape = (30, tokens, 3, 64)
        run = KVRun(torch.randn(shape), torch.randn(shape), 0)
        return store.stage(run, Strategy(codec, pairs=pairs), codec == "lossless")[1]

    def settle() -> int:
        store.wait_sealed(120)
        gc.collect()
        # The worker gives memory back after the last seal: wait until it has.
        process, last = psutil.Process(), -1
        deadline = time.monotonic() + 20
        while (now := process.memory_info().rss) != last and time.monotonic() < deadline:
            last = now
            time.sleep(0.5)
        return now

    rng = random.Random(0)
    stage(64)
    settle()
    store.clear()
    before = settle()
    held = []
    for step in range(45):
        tokens = rng.choice([30, 100, 300, 1000, 1024])
        store.wait_for_staging(tokens * spec.token_bytes, 60)
        held.append(stage(tokens))
        if step % 3 == 2:
            store.release(held.pop(rng.randrange(len(held))))
    grown = settle() - before
    print(json.dumps({"rss": grown, "ledger": store.ledger.used}))


if __name__ == "__main__":
    main()
