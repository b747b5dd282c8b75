"""Pieces and checks that the tests of the disk tier share. Needs neither torch nor pytest."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krul_sglang.store.disk.calls import Calls
from krul_sglang.store.disk.digest import fingerprint_of, prefix_digests
from krul_sglang.store.disk.entry import EntryName, Namespace
from krul_sglang.store.disk.header import name_of, pack_head
from krul_sglang.store.disk.payload import DiskPayload
from krul_sglang.store.disk.publishing import Outcome, Publication
from krul_sglang.store.disk.tier import DiskTier, Entry

FINGERPRINT = fingerprint_of({"model": "of the tests"})
PLAIN = Namespace()
TOKENS = 8
PLENTY = 1 << 30


@dataclass(frozen=True)
class Piece:
    """Segment ``index`` of conversation ``talk``: its tokens and bytes follow from its fields.

    size: bytes of the payload. writer: another one writes other bytes of the same run.
    """

    talk: int
    index: int = 0
    size: int = 3000
    writer: int = 0
    namespace: Namespace = PLAIN
    exact_tokens: int = TOKENS

    @property
    def start(self) -> int:
        return self.index * TOKENS

    @property
    def ids(self) -> list[int]:
        rng = random.Random(self.talk)
        return [rng.randrange(50_000) for _ in range(self.start + TOKENS)]

    @property
    def payload(self) -> bytes:
        return random.Random(f"{self.talk} {self.index} {self.writer}").randbytes(self.size)

    def entry(self, fingerprint: bytes = FINGERPRINT) -> Entry:
        return Entry.of(
            fingerprint,
            self.namespace,
            self.ids,
            self.start,
            self.payload,
            codec="lossless",
            exact_tokens=self.exact_tokens,
            raw_bytes=2 * self.size,
        )

    def name(self, fingerprint: bytes = FINGERPRINT) -> EntryName:
        """Of the file that it is stored as."""
        entry = self.entry(fingerprint)
        return name_of(entry, len(pack_head(entry)))

    def file_bytes(self, fingerprint: bytes = FINGERPRINT) -> bytes:
        return pack_head(self.entry(fingerprint)) + self.payload


def publish(tier: DiskTier, piece: Piece) -> Publication:
    return tier.publish(
        piece.namespace,
        piece.ids,
        piece.start,
        piece.payload,
        codec="lossless",
        exact_tokens=piece.exact_tokens,
        raw_bytes=2 * piece.size,
    )


def store(tier: DiskTier, piece: Piece) -> EntryName:
    done = publish(tier, piece)
    assert done.outcome is Outcome.STORED, done
    assert done.name == piece.name(tier.fingerprint)
    return done.name


def opened(tier: DiskTier, piece: Piece) -> DiskPayload | None:
    """The tier's entry of a piece, found by what it covers; None is a miss."""
    digests = prefix_digests(piece.namespace, piece.ids, [piece.start + TOKENS])
    for name in tier.covering(next(digests), piece.start + TOKENS):
        if name.start == piece.start:
            found = tier.open(name, piece.namespace, piece.ids)
            if found is not None:
                return found[0]
    return None


def look(tier: DiskTier, piece: Piece) -> bytes | None:
    """All payload bytes that the tier has of a piece; None is a miss."""
    payload = opened(tier, piece)
    if payload is None:
        return None
    try:
        payload.fetch(payload.size)
        return bytes(payload.view)
    finally:
        payload.close()


def files(root: Path) -> list[Path]:
    """Entries below a root, whatever their state."""
    return sorted(
        path for path in (root / "v1").glob("*/??/*.krul") if "quarantine" not in str(path)
    )


def unfinished(root: Path) -> list[Path]:
    return sorted(root.rglob(".tmp-*"))


def set_aside(root: Path) -> list[Path]:
    """Files in quarantine."""
    return sorted((root / "v1" / "quarantine").glob("*"))


def parsed(path: Path) -> EntryName:
    name = EntryName.parse(bytes.fromhex(path.parent.parent.name), path.name)
    assert name is not None
    return name


def assert_agrees(tier: DiskTier, root: Path) -> None:
    """What the tier says it holds is what lies in the directory."""
    tier.refresh()
    names = {parsed(path) for path in files(root)}
    assert set(tier.names()) == names
    assert tier.used == sum(name.footprint for name in names)
    assert all(path.stat().st_size == parsed(path).size for path in files(root))


def open_files() -> int:
    """Descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Rule = Callable[[str, int, tuple[Any, ...]], Any]


class WatchedCalls(Calls):
    """The system's calls, each of which ``rule(name, n, arguments)`` sees before it is made.

    n: how many calls were made before. A rule that returns something other than None answers in
    the system's place; it may raise, or end the process.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.made: list[str] = []


def _watched(name: str) -> Any:
    real = getattr(Calls, name)

    def call(self: WatchedCalls, *arguments: Any) -> Any:
        number = len(self.made)
        self.made.append(name)
        answer = self.rule(name, number, arguments)
        return real(self, *arguments) if answer is None else answer

    return call


CALLS = tuple(name for name in vars(Calls) if not name.startswith("_"))
for _name in CALLS:
    setattr(WatchedCalls, _name, _watched(_name))


def pieces(seed: int) -> Iterator[Piece]:
    """Endless pieces: conversations that go on, of mixed sizes."""
    rng = random.Random(seed)
    lengths: dict[int, int] = {}
    while True:
        talk = 1000 * seed + rng.randrange(6)
        index = lengths.get(talk, 0)
        lengths[talk] = index + 1
        yield Piece(talk, index, rng.choice([300, 3000, 20_000]))
