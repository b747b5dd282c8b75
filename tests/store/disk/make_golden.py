"""Write the golden files of the format's present version::

    PYTHONPATH=tests:tests/store/disk python tests/store/disk/make_golden.py

Only ever add files. One that exists stays as it is: it stands for what some release has written
on somebody's disk.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from disk_kit import FINGERPRINT
from small_profile import make_run, spec_of

from krul_sglang.codec.registry import make_codec
from krul_sglang.store.disk.entry import Entry, Namespace
from krul_sglang.store.disk.header import VERSION, name_of, pack_head
from krul_sglang.strategy.base import EXACT

GOLDEN = Path(__file__).resolve().parent / "golden" / f"v{VERSION}"
CASES = {
    "plain": (Namespace(), range(100, 112), 0, 12),
    "tenant": (Namespace("adapter", "salt \u00e4"), range(1 << 31, (1 << 31) + 20), 8, 5),
    "lossy": (Namespace(None, ""), [7] * 30, 18, 0),
}
"""Namespace, token ids, where the run begins, how many of its tokens are exact."""


def main() -> None:
    spec = spec_of("bfloat16")
    for case, (space, ids, start, exact) in CASES.items():
        folder = GOLDEN / case
        if folder.exists():
            print(f"{case} is there and stays")
            continue
        run = make_run(len(ids) - start, 7, "bfloat16", start)
        payload = make_codec("lossless", spec).encode(run, EXACT)
        entry = Entry.of(
            FINGERPRINT,
            space,
            ids,
            start,
            payload,
            codec="lossless",
            exact_tokens=exact,
            raw_bytes=run.nbytes,
        )
        head = pack_head(entry)
        folder.mkdir(parents=True)
        (folder / name_of(entry, len(head)).file).write_bytes(head + payload)
        said = {
            "extra_key": space.extra_key,
            "cache_salt": space.cache_salt,
            "ids": list(ids),
            "start": start,
            "exact_tokens": exact,
        }
        (folder / "said.json").write_text(json.dumps(said) + "\n")
        rows = torch.cat([run.k.flatten(), run.v.flatten()]).view(torch.int16)
        np.save(folder / "rows.npy", rows.numpy())


if __name__ == "__main__":
    main()
