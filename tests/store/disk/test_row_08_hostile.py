"""Row 8: files made to harm: bounded memory and time, and nothing outside the root."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
import zstandard
from disk_kit import (
    FINGERPRINT,
    PLAIN,
    Piece,
    WatchedCalls,
    assert_agrees,
    files,
    look,
    publish,
    set_aside,
    store,
)

from krul_sglang.store.disk import header
from krul_sglang.store.disk.digest import prefix_digests
from krul_sglang.store.disk.entry import MAX_FILE, MAX_IDS, EntryName
from krul_sglang.store.disk.publishing import Outcome
from krul_sglang.store.disk.quarantine import MAX_BYTES, MAX_FILES, quarantined, trim
from krul_sglang.store.disk.tier import DiskTier
from krul_sglang.store.disk.upkeep import Verdict, forget, gc, verify

PIECE = Piece(1, 3)
MEMORY = 4 << 20
SECONDS = 5.0


@pytest.fixture
def bounded() -> Iterator[None]:
    """What is read here takes little memory and time."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY
    assert time.monotonic() - began < SECONDS


def fields(**changes: object) -> dict[str, object]:
    """The piece's header as a map, with changes."""
    raw = PIECE.file_bytes()
    length = header.PREFIX.unpack_from(raw)[2]
    found = msgpack.unpackb(raw[header.PREFIX.size : header.PREFIX.size + length])
    assert set(changes) <= {*found, "surprise"}
    return {**found, **changes}


def sealed(body: bytes, payload: bytes = PIECE.payload) -> bytes:
    """A file whose prefix and checksum are right, whatever its header is."""
    prefix = header.PREFIX.pack(header.MAGIC, header.VERSION, len(body), 0)[:12]
    return prefix + zlib.crc32(body, zlib.crc32(prefix)).to_bytes(4, "little") + body + payload


def plant(root: Path, raw: bytes, name: EntryName | None = None) -> EntryName:
    """Put a file where the tier looks for the piece."""
    name = (name or PIECE.name())._replace(size=len(raw))
    path = root / "v1" / name.fingerprint.hex() / name.shard / name.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return name


def refused(tier: DiskTier, root: Path, raw: bytes) -> None:
    name = plant(root, raw)
    damaged = tier.totals()["damaged"]
    tier.refresh()
    assert name in tier.names()
    assert look(tier, PIECE) is None
    assert tier.totals()["damaged"] == damaged + 1
    assert not files(root)


def zstd(raw: bytes, **how: bool) -> bytes:
    settings = {"write_checksum": True, "write_content_size": True, **how}
    return zstandard.ZstdCompressor(level=1, **settings).compress(raw)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BOMB = zstd(bytes(1 << 26))
GOOD = fields()
HEADERS = {
    "bomb": {"ids": BOMB},
    "bomb that says it is small": {"ids": zstd(bytes(1 << 26), write_content_size=False)},
    "bomb and its true count": {"ids": BOMB, "tokens": MAX_IDS - 24, "start": 24},
    "ids of no frame": {"ids": b"abc"},
    "ids without a checksum": {"ids": zstd(bytes(128), write_checksum=False)},
    "two frames of ids": {"ids": zstd(bytes(128)) * 2},
    "huge start": {"start": 1 << 62},
    "huge run": {"tokens": 1 << 62},
    "run of the largest size": {"tokens": MAX_IDS - 24},
    "negative start": {"start": -1},
    "no tokens": {"tokens": 0},
    "fewer tokens": {"tokens": 7},
    "true for a number": {"tokens": True},
    "float for a number": {"tokens": 8.0},
    "more exact than there are": {"exact_tokens": 9},
    "negative exact": {"exact_tokens": -1},
    "item size": {"id_bytes": 3},
    "item size of zero": {"id_bytes": 0},
    "huge payload": {"payload_bytes": 1 << 63},
    "negative payload": {"payload_bytes": -1},
    "negative raw bytes": {"raw_bytes": -1},
    "short fingerprint": {"fingerprint": b"abc"},
    "long fingerprint": {"fingerprint": bytes(1 << 12)},
    "text for bytes": {"fingerprint": "a" * 16},
    "bytes for text": {"codec": b"lossless"},
    "long text": {"cache_salt": "a" * (header.MAX_TEXT + 1)},
    "list for a number": {"start": [0]},
    "map for a number": {"start": {}},
    "one more field": {"surprise": 1},
    "extension": {"codec": msgpack.ExtType(4, b"x")},
    "timestamp": {"codec": msgpack.Timestamp(1)},
    "pickle": {"ids": pickle.dumps(os.getcwd)},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_no_writer_makes(open_tier, root, bounded, case) -> None:
    refused(open_tier(), root, sealed(msgpack.packb(fields(**HEADERS[case]))))


BODIES = {
    "nested lists": nested(100_000),
    "nested maps": b"\x81\x01" * 100_000 + b"\xc0",
    "nested in a field": msgpack.packb({**GOOD, "codec": 0})[:-1] + nested(100_000),
    "declared map": b"\xdf\xff\xff\xff\xff",
    "declared list": b"\xdd\xff\xff\xff\xff",
    "declared text": b"\xdb\xff\xff\xff\xff",
    "declared bytes": b"\xc6\xff\xff\xff\xff",
    "no map": msgpack.packb([1]),
    "empty": b"",
    "empty map": b"\x80",
    "same key twice": b"\x82\xa1a\x01\xa1a\x02",
    "keys that are lists": b"\x81\x91\x01\x01",
    "keys that are numbers": b"\x81\x01\x01",
    "half a map": msgpack.packb(GOOD)[:-9],
    "more than a map": msgpack.packb(GOOD) + b"\xc0",
    "reserved byte": b"\xc1",
    "text that is none": b"\x81\xa2\xff\xfe\x01",
    "pickle": pickle.dumps({"ids": [1]}),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_no_header(open_tier, root, bounded, case) -> None:
    refused(open_tier(), root, sealed(BODIES[case]))


def test_the_untouched_header_would_be_read(open_tier, root) -> None:
    """So that what is refused above is refused for the change."""
    plant(root, sealed(msgpack.packb(GOOD)))
    assert look(open_tier(), PIECE) == PIECE.payload


def test_a_header_that_says_it_is_longer_than_may_be(open_tier, root, bounded) -> None:
    raw = header.PREFIX.pack(header.MAGIC, 1, header.MAX_HEADER + 1, 0)
    refused(open_tier(), root, raw + bytes(1000))
    refused(open_tier(), root, header.PREFIX.pack(header.MAGIC, 1, (1 << 32) - 1, 0) + bytes(9))


def test_a_sparse_file_of_gigabytes(open_tier, root) -> None:
    """Sound but for what it says: memory goes to what is read, not to what is declared."""
    size = 20 << 30
    head = sealed(msgpack.packb(fields(payload_bytes=size)), b"")
    name = plant(root, head)
    whole = name._replace(size=len(head) + size)
    path = root / "v1" / FINGERPRINT.hex() / name.shard / name.file
    os.truncate(path, whole.size)
    path.rename(path.with_name(whole.file))
    tier, began = open_tier(1 << 40), psutil.Process().memory_info().rss
    found = tier.open(whole, PLAIN, PIECE.ids)
    if found is not None:  # the system may refuse so large a range of addresses
        found[0].fetch(1 << 20)
        assert found[0].fetched == 1 << 20
        found[0].close()
    assert psutil.Process().memory_info().rss - began < 4 * MEMORY
    assert (found is None) == (tier.totals()["damaged"] == 1)


NAMES = [
    "../../../escape.krul",
    "a/b.krul",
    f"{'0' * 32}.0.8.8.{'0' * 32}.-1.krul",
    f"{'0' * 32}.0.8.9.{'0' * 32}.10.krul",
    f"{'0' * 32}.0.0.0.{'0' * 32}.10.krul",
    f"{'0' * 32}.00.8.8.{'0' * 32}.10.krul",
    f"{'0' * 32}.{MAX_IDS}.8.8.{'0' * 32}.10.krul",
    f"{'0' * 32}.0.8.8.{'0' * 32}.{MAX_FILE + 1}.krul",
    f"{'0' * 32}.0.8.8.{'0' * 32}.{'9' * 4000}.krul",
    f"{'0' * 31}g.0.8.8.{'0' * 32}.10.krul",
    f"{'A' * 32}.0.8.8.{'0' * 32}.10.krul",
    f"{'0' * 32}.0.8.8.{'0' * 32}.10.krul\n",
    f"{'0' * 32}.٣.8.8.{'0' * 32}.10.krul",
    f"{'0' * 32}.0.8.8.{'0' * 32}.10",
    "",
    ".krul",
]


@pytest.mark.parametrize("file", NAMES, ids=lambda file: ascii(file)[:40])
def test_names_no_writer_makes(file) -> None:
    assert EntryName.parse(FINGERPRINT, file) is None


def test_paths_come_from_digests_alone(open_tier, root, tmp_path) -> None:
    """Whatever a request's keys and ids are, what is written lies below the root."""
    tier = open_tier()
    for key in ("../../..", "/etc/passwd", "..\0", "a/b", "~", "$(x)"):
        piece = Piece(1, namespace=type(PLAIN)(key, key))
        store(tier, piece)
        assert look(tier, piece) == piece.payload
    assert {path.name for path in tmp_path.iterdir()} == {"tier"}
    assert {path.name for path in root.iterdir()} == {"v1"}


def test_absurd_namespaces_are_the_callers_mistake(open_tier, root) -> None:
    with pytest.raises(ValueError, match="characters"):
        publish(open_tier(), Piece(1, namespace=type(PLAIN)("a" * 100_000)))
    assert not files(root)


def test_links_lead_nowhere(open_tier, root, tmp_path) -> None:
    """At every level below the root, to files and directories outside it."""
    outside = tmp_path / "outside"
    tier = open_tier()
    name = store(tier, PIECE)
    (path,) = files(root)
    raw = path.read_bytes()
    outside.mkdir()
    (outside / path.name).write_bytes(raw)
    (outside / "kept").write_bytes(b"kept")
    shard, home = path.parent, path.parent.parent
    for link in (path, shard, home, root / "v1"):
        moved = link.with_name(link.name + ".moved")
        link.rename(moved)
        link.symlink_to(outside / path.name if link == path else outside)
        for one in (tier, open_tier()):
            assert look(one, PIECE) is None
            publish(one, Piece(7))
            one.make_room(1 << 30)
            with contextlib.suppress(NotADirectoryError):  # the whole of it is a link
                list(verify(root))
                gc(root, limit=0)
            one.quarantine(name, "as the test says")
        assert (outside / path.name).read_bytes() == raw
        assert sorted(x.name for x in outside.iterdir()) == sorted([path.name, "kept"])
        if link.is_symlink():
            link.unlink()
        elif link.is_dir():
            link.rename(link.with_name(link.name + ".new"))
        else:
            link.unlink(missing_ok=True)
        moved.rename(link)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


@pytest.mark.parametrize("what", ["quarantine", "leases"])
def test_links_in_place_of_our_own_directories(open_tier, root, tmp_path, what) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ("0" * 16)).write_bytes(b"kept")
    (root / "v1").mkdir(parents=True)
    (root / "v1" / what).symlink_to(outside)
    tier = open_tier()
    done = publish(tier, PIECE)
    if what == "quarantine":
        assert done.outcome is Outcome.STORED
        tier.quarantine(done.name, "as the test says")
        assert not files(root), "what cannot be set aside is removed"
        assert_agrees(tier, root)
    else:
        assert done.outcome in (Outcome.FAILED, Outcome.DEGRADED)
    assert [path.name for path in outside.iterdir()] == ["0" * 16]
    assert (outside / ("0" * 16)).read_bytes() == b"kept"


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "link to nothing", "device"])
def test_what_is_no_file(open_tier, root, bounded, kind) -> None:
    """Under an entry's name, before and after the tier knew it: no reader hangs."""
    tier = open_tier(100_000)
    name = store(tier, PIECE)
    (path,) = files(root)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
        (path / "something").write_bytes(b"x")
    elif kind == "socket":
        home = os.open(path.parent, os.O_RDONLY)  # a socket's path may only be short
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"/proc/self/fd/{home}/s")
        os.rename(path.parent / "s", path)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("no device can be made here")
    else:
        path.symlink_to("nowhere")
    fresh = open_tier(100_000)
    assert name not in fresh.names()
    assert look(fresh, PIECE) is None
    assert all(checked.verdict is Verdict.SOUND for checked in verify(root))
    for talk in range(8):
        assert publish(tier, Piece(talk, size=20_000)).outcome is Outcome.STORED, "it makes way"
    assert name not in tier.names()
    assert publish(fresh, PIECE).outcome in (Outcome.STORED, Outcome.FAILED)
    assert look(fresh, PIECE) in (None, PIECE.payload)
    if kind == "socket":
        server.close()
        os.close(home)


def test_what_became_no_file_is_found_out_when_it_is_read(open_tier, root) -> None:
    tier = open_tier()
    store(tier, PIECE)
    (path,) = files(root)
    path.unlink()
    os.mkfifo(path)
    assert look(tier, PIECE) is None
    assert tier.totals()["damaged"] == 1
    assert store(tier, PIECE)
    assert look(tier, PIECE) == PIECE.payload


def test_strange_things_in_the_directory_are_left_alone(open_tier, root) -> None:
    odd = [
        root / "v1" / "README",
        root / "v1" / "0" / "ab",
        root / "v1" / FINGERPRINT.hex() / "zz" / "x.krul",
        root / "v1" / FINGERPRINT.hex() / "ab" / "x.krul",
        root / "v1" / FINGERPRINT.hex() / "ab" / ".tmp-strange",
        root / "v1" / ("0" * 33) / "ab" / "x",
        root / "v2" / "x",
    ]
    for path in odd:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"somebody's")
    misplaced = PIECE.name()
    wrong_shard = root / "v1" / FINGERPRINT.hex() / "ab" / misplaced.file
    wrong_shard.write_bytes(PIECE.file_bytes())
    tier = open_tier(50_000)
    for talk in range(5):
        store(tier, Piece(talk, size=20_000))
    gc(root, limit=0)
    forget(root, type(PLAIN)("somebody"))
    list(verify(root))
    assert all(path.read_bytes() == b"somebody's" for path in odd)
    assert wrong_shard.exists()


def test_an_unreadable_directory_of_others_stops_nobody(open_tier, root) -> None:
    """Not even where the other fingerprint's entries are another user's."""
    theirs = "ab" * 16
    (root / "v1" / theirs / "ab").mkdir(parents=True)

    def rule(name, number, arguments) -> None:
        if name == "open_directory" and arguments[0] == theirs:
            raise PermissionError(errno.EACCES, "Permission denied")

    tier = DiskTier(root, FINGERPRINT, 1 << 20, calls=WatchedCalls(rule))
    store(tier, PIECE)
    assert look(tier, PIECE) == PIECE.payload
    assert tier.degraded == ""
    tier.close()


def test_modes_keep_others_out(open_tier, root) -> None:
    tier = open_tier()
    store(tier, PIECE)
    tier.quarantine(store(tier, Piece(2)), "as the test says")
    for path in [root, *root.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_quarantine_does_not_fill_the_disk(open_tier, root) -> None:
    tier = open_tier()
    for talk in range(MAX_FILES + 8):
        tier.quarantine(store(tier, Piece(talk)), "as the test says")
    assert len(set_aside(root)) == MAX_FILES
    newest = Piece(MAX_FILES + 7)
    assert set_aside(root)[-1].read_bytes() == newest.file_bytes()
    directory = tier._directory
    size = quarantined(directory)[0][1]
    trim(directory, nbytes=3 * size)
    assert len(set_aside(root)) == 3
    assert 3 * size <= MAX_BYTES
    assert set_aside(root)[-1].read_bytes() == newest.file_bytes()


def test_circles_of_names_are_evicted_too(open_tier, root) -> None:
    """Names that continue each other: nothing we wrote, and nothing that stays for ever."""
    a, b = (next(prefix_digests(PLAIN, [x], [1])) for x in (1, 2))
    for parent, end in ((a, b), (b, a)):
        plant(root, bytes(5000), EntryName(FINGERPRINT, parent, 8, 8, 8, end, 0))
    tier = open_tier(9000)
    assert tier.longest_path(PLAIN, range(30)) is None
    assert tier.used <= 9000
    store(tier, PIECE)
    assert_agrees(tier, root)
