"""Row 11: files that each version of the format has written are read by this one.

A test that fails here says that directories of users become useless: a new version of the
format, and a reader for this one, are what is wanted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_kit import FINGERPRINT
from small_profile import LAYERS, spec_of

from krul_sglang.codec.registry import make_codec
from krul_sglang.store.disk.entry import Entry, EntryName, Namespace
from krul_sglang.store.disk.header import VERSION, name_of, pack_head
from krul_sglang.store.disk.upkeep import Verdict, verify

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted((GOLDEN / "v1").iterdir())


def parts(case: Path) -> tuple[Path, EntryName, dict]:
    (path,) = case.glob("*.krul")
    name = EntryName.parse(FINGERPRINT, path.name)
    assert name is not None
    return path, name, json.loads((case / "said.json").read_text())


def test_every_version_has_its_files() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"v{n + 1}" for n in range(VERSION)}
    assert len(CASES) >= 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_of_version_1_is_found_and_read(open_tier, root, case, counts) -> None:
    path, name, said = parts(case)
    target = root / "v1" / FINGERPRINT.hex() / name.shard / name.file
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    tier = open_tier()
    space = Namespace(said["extra_key"], said["cache_salt"])
    ids = [*said["ids"], 1, 2, 3]
    found = tier.longest_path(space, ids, [said["start"]])
    assert found is not None
    assert found.names == (name,)
    assert name.exact_tokens == said["exact_tokens"]
    opened = tier.open(name, space, ids)
    assert opened is not None
    payload, matched = opened
    assert matched == name.tokens == len(said["ids"]) - said["start"]
    payload.fetch(payload.size)
    reader = make_codec("lossless", spec_of("bfloat16")).open(payload.view)
    assert (reader.tokens, reader.start) == (name.tokens, name.start)
    layers = list(reader.layers(0, reader.tokens))
    assert len(layers) == LAYERS
    k, v = (torch.stack(rows).flatten() for rows in zip(*layers, strict=True))
    rows = torch.cat([k, v]).view(torch.int16).numpy()
    assert np.array_equal(rows, np.load(case / "rows.npy"))
    payload.close()
    assert [checked.verdict for checked in verify(root)] == [Verdict.SOUND]
    counts(golden_files_read=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_written_today_is_what_version_1_wrote(case) -> None:
    """Byte for byte, but for how well the token ids compress; and under the same name, or what
    users have on their disks would not be found."""
    path, name, said = parts(case)
    raw = path.read_bytes()
    opened = raw[len(raw) - (name.size - head_size(raw)) :]
    entry = Entry.of(
        FINGERPRINT,
        Namespace(said["extra_key"], said["cache_salt"]),
        said["ids"],
        said["start"],
        opened,
        codec="lossless",
        exact_tokens=said["exact_tokens"],
        raw_bytes=int(np.load(case / "rows.npy").nbytes),
    )
    head = pack_head(entry)
    today = name_of(entry, len(head))
    assert today._replace(size=0) == name._replace(size=0)
    assert (head + opened == raw) or len(head) != head_size(raw)


def head_size(raw: bytes) -> int:
    """Bytes before the payload, as docs/format.md says: a prefix of 16 and the header."""
    return 16 + int.from_bytes(raw[8:12], "little")
