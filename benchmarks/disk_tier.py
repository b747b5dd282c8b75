"""How fast the disk tier writes and reads segments, against plain files of the same sizes.

    python benchmarks/disk_tier.py --root DIR --json disk_tier.json

Sides of a comparison take turns in one process, on files of the same sizes in the same directory.
The tier publishes: it takes a CRC-32 of the payload, packs the header (token ids of the whole
conversation, compressed), writes under a temporary name, sets the time and renames. It opens
and fetches: it checks header, name and token ids, then reads all bytes into private memory.
Plain files are created, written and closed; opened, read whole and closed. Both keep what they
read, as a restore does: memory that is used over and over is cheaper than the first use.
``crc`` is a plain file whose writer takes the same CRC-32, as whoever wants to notice damage has
to. ``synced``: both sides fsync the file and its directory (the tier's ``durable``); else
neither does. ``cold``: the files' pages were dropped from the page cache first, on both sides;
else all are in it. The first run of each side, which makes the directories, is not counted. Reading
verifies no payload checksum on either side: the codecs check theirs as they decode.

Start-up is the time of opening a tier on that many entries, with the directories cached by the
system; its CPU seconds are what a busy machine leaves comparable. Needs neither SGLang nor a
model. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
from zlib_ng.zlib_ng import crc32

from krul_sglang.store.disk.digest import fingerprint_of
from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.tier import DiskTier

FINGERPRINT = fingerprint_of({"model": "of the benchmark"})
PLAIN = Namespace()
LIMIT = 1 << 40
TOKENS = 1024
BATCH_BYTES = 96 << 20


@dataclass(frozen=True)
class Batch:
    """Segments of one size: token ids and payload of each, and the tier that takes them."""

    root: Path
    ids: list[np.ndarray]
    payload: bytes

    @property
    def nbytes(self) -> int:
        return len(self.ids) * len(self.payload)


def make_batch(root: Path, size: int) -> Batch:
    """As many segments of ``size`` bytes as make :data:`BATCH_BYTES`, of 1 to 64 conversations."""
    rng = np.random.default_rng(size)
    count = max(4, BATCH_BYTES // size)
    ids = [rng.integers(0, 49_152, TOKENS) for _ in range(count)]
    return Batch(root, ids, random.Random(size).randbytes(size))


@contextmanager
def tier_on(root: Path, durable: bool = False) -> Iterator[DiskTier]:
    tier = DiskTier(root, FINGERPRINT, LIMIT, durable=durable)
    try:
        yield tier
    finally:
        tier.close()


# ---- the sides -------------------------------------------------------------------------


def publish(batch: Batch, durable: bool) -> float:
    """Seconds to publish the batch into an empty tier."""
    with tier_on(batch.root / "tier", durable) as tier:
        began = time.perf_counter()
        for ids in batch.ids:
            done = tier.publish(
                PLAIN,
                ids,
                0,
                batch.payload,
                codec="lossless",
                exact_tokens=TOKENS,
                raw_bytes=2 * len(batch.payload),
            )
            assert done.outcome is Outcome.STORED, done
        return time.perf_counter() - began


def write_files(batch: Batch, durable: bool, crc: bool) -> float:
    """Seconds to write the batch into files."""
    folder = batch.root / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for number in range(len(batch.ids)):
        if crc:
            crc32(batch.payload)
        with open(folder / str(number), "wb", buffering=0) as file:
            file.write(batch.payload)
            if durable:
                os.fsync(file.fileno())
        if durable:
            directory = os.open(folder, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    return time.perf_counter() - began


def fetch(batch: Batch) -> float:
    """Seconds to open and fetch every entry of a tier that has been open for a while."""
    with tier_on(batch.root / "tier") as tier:
        names = {name.end: name for name in tier.names()}
        paths = [tier.longest_path(PLAIN, ids) for ids in batch.ids]
        assert len(names) == len(batch.ids)
        kept = []
        began = time.perf_counter()
        for ids, path in zip(batch.ids, paths, strict=True):
            assert path is not None
            found = tier.open(path.names[0], PLAIN, ids)
            assert found is not None
            payload, _ = found
            payload.fetch(payload.size)
            payload.close()
            kept.append(payload)
        seconds = time.perf_counter() - began
        assert kept[-1].view == batch.payload
        return seconds


def read_files(batch: Batch) -> float:
    """Seconds to read the files."""
    folder = batch.root / "plain"
    kept = []
    began = time.perf_counter()
    for number in range(len(batch.ids)):
        with open(folder / str(number), "rb", buffering=0) as file:
            kept.append(file.read())
    seconds = time.perf_counter() - began
    assert kept[-1] == batch.payload
    return seconds


def drop_pages(root: Path) -> None:
    """Write the files out and take them from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


# ---- comparisons -----------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(nbytes: int, seconds: dict[str, list[float]], versus: list[str]) -> dict[str, Any]:
    """MB/s of each side, and the tier's speed in shares of each plain side's, run by run."""
    out: dict[str, Any] = {
        side: spread([nbytes / one / 1e6 for one in times]) for side, times in seconds.items()
    }
    for side in versus:
        pairs = zip(seconds["tier"], seconds[side], strict=True)
        out[f"tier/{side}"] = spread([other / own for own, other in pairs])
    return out


def alternate(
    sides: dict[str, Callable[[], float]], repeats: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each side; who begins changes from run to run, and a first run is not counted."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(repeats + 1):
        order = list(sides) if run % 2 else list(reversed(sides))
        for side in order:
            before()
            took = sides[side]()
            if run:
                seconds[side].append(took)
    return seconds


def writing(batch: Batch, repeats: int, durable: bool) -> dict[str, Any]:
    def empty() -> None:
        for path in batch.root.rglob("*"):
            if path.is_file():
                path.unlink()
        os.sync()

    sides = {
        "tier": lambda: publish(batch, durable),
        "plain": lambda: write_files(batch, durable, False),
        "crc": lambda: write_files(batch, durable, True),
    }
    return compare(batch.nbytes, alternate(sides, repeats, empty), ["plain", "crc"])


def reading(batch: Batch, repeats: int, cold: bool) -> dict[str, Any]:
    shutil.rmtree(batch.root, ignore_errors=True)
    batch.root.mkdir()
    publish(batch, False)
    write_files(batch, False, False)
    os.sync()
    before = (lambda: drop_pages(batch.root)) if cold else (lambda: None)
    sides = {"tier": lambda: fetch(batch), "plain": lambda: read_files(batch)}
    return compare(batch.nbytes, alternate(sides, repeats, before), ["plain"])


def start_up(root: Path, entries: int, repeats: int) -> dict[str, Any]:
    """Seconds to open a tier on ``entries`` entries, conversations of ten segments each."""
    shutil.rmtree(root, ignore_errors=True)
    parent = b""
    for number in range(entries):
        parent = os.urandom(16) if number % 10 == 0 else parent
        end = os.urandom(16)
        name = EntryName(FINGERPRINT, parent, 100 * (number % 10), 100, 100, end, 5000)
        folder = root / "v1" / FINGERPRINT.hex() / name.shard
        if not folder.is_dir():
            folder.mkdir(parents=True)
        os.close(os.open(folder / name.file, os.O_CREAT | os.O_WRONLY, 0o600))
        os.truncate(folder / name.file, name.size)
        parent = end
    seconds, cpu, held = [], [], 0
    for _ in range(repeats):
        rss = psutil.Process().memory_info().rss
        began, worked = time.perf_counter(), time.process_time()
        with tier_on(root) as tier:
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - worked)
            assert len(tier) == entries
            held = held or psutil.Process().memory_info().rss - rss
    shutil.rmtree(root)
    return {
        "seconds": spread(seconds),
        "cpu_seconds": spread(cpu),
        "rss_bytes_per_entry": round(held / entries),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def sizes_of(text: str) -> list[int]:
    """``200K,2M`` as bytes."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return [int(part[:-1]) * units[part[-1]] if part[-1] in units else int(part)
            for part in text.upper().split(",")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="an empty directory to work in")
    parser.add_argument("--sizes", type=sizes_of, default="200K,2M,16M", help="bytes of a segment")
    parser.add_argument("--entries", default="1000,10000,100000", help="of start-up, 0 for none")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    if any(args.root.iterdir()):
        parser.error(f"--root={args.root} is not empty; name a new directory")
    result: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "repeats": args.repeats,
        "unit": "MB/s",
        "sizes": {},
        "start_up": {},
    }
    try:
        for size in args.sizes:
            batch = make_batch(args.root / "batch", size)
            found: dict[str, Any] = {"segments": len(batch.ids)}
            for title, run in {
                "write": lambda b=batch: writing(b, args.repeats, False),
                "write synced": lambda b=batch: writing(b, args.repeats, True),
                "read": lambda b=batch: reading(b, args.repeats, False),
                "read cold": lambda b=batch: reading(b, args.repeats, True),
            }.items():
                print(f"{size} bytes: {title} ...", file=sys.stderr, flush=True)
                found[title] = run()
            result["sizes"][size] = found
            shutil.rmtree(batch.root)
        for entries in (int(part) for part in args.entries.split(",")):
            if entries:
                print(f"start-up with {entries} entries ...", file=sys.stderr, flush=True)
                result["start_up"][entries] = start_up(args.root / "many", entries, args.repeats)
    finally:
        for part in ("batch", "many"):
            shutil.rmtree(args.root / part, ignore_errors=True)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
