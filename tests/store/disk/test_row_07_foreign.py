"""Row 7: what was stored for anything else is a miss: each field of the fingerprint alone, and
salt, key, tokens and format."""

from __future__ import annotations

import shutil
import zlib
from dataclasses import replace

import msgpack
import pytest
from disk_kit import FINGERPRINT, PLAIN, Piece, files, look, parsed, set_aside, store
from restore_rig import Restorer

from krul_sglang.codec import frames
from krul_sglang.codec.base import CodecError
from krul_sglang.store.disk import header
from krul_sglang.store.disk.digest import fingerprint_of, prefix_digests
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.disk.payload import ForeignEntryError
from krul_sglang.store.disk.upkeep import Verdict, verify

FIELDS = {
    "model.weights": "3f2a",
    "model.config": "91bc",
    "model.rope": "10000",
    "model.rank": "0",
    "model.ranks": "1",
    "server.dtype": "bfloat16",
    "server.quantization": "None",
    "kv.dtype": "bfloat16",
    "kv.shape": "30x3x64+64",
    "kv.page": "1",
    "payload": "1",
    "policy": "predictive",
    "profile": "none",
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_alone(open_tier, field, counts) -> None:
    piece = Piece(1)
    store(open_tier(fingerprint=fingerprint_of(FIELDS)), piece)
    others = [{**FIELDS, field: text} for text in ("1 ", "", "2", FIELDS[field] + "0")]
    others.append({name: text for name, text in FIELDS.items() if name != field})
    others.append({**FIELDS, field + " ": FIELDS[field]})
    for other in others:
        tier = open_tier(fingerprint=fingerprint_of(other))
        assert len(tier) == 1
        assert look(tier, piece) is None
        assert tier.longest_path(piece.namespace, piece.ids) is None
        (name,) = tier.names()
        assert tier.open(name, piece.namespace, piece.ids) is None
        assert tier.reopen(name) is None
        assert tier.totals()["foreign"] == 2
        assert tier.totals()["damaged"] == 0
    assert look(open_tier(fingerprint=fingerprint_of(dict(reversed(FIELDS.items())))), piece)
    counts(foreign_fingerprints=len(others), found=0)


def test_fields_do_not_run_into_each_other() -> None:
    """However they are split, different fields have different fingerprints."""
    fields = [
        {"a": "bc"},
        {"ab": "c"},
        {"a": "b", "c": ""},
        {"a": "", "b": "c"},
        {"a": "b\0c"},
        {"a": "b", "\0c": ""},
        {"a": "1", "b": "2"},
        {"a": "2", "b": "1"},
        {},
        {"": ""},
    ]
    assert len({fingerprint_of(one) for one in fields}) == len(fields)


def test_a_file_moved_into_another_fingerprints_directory(open_tier, root) -> None:
    piece, other = Piece(1), fingerprint_of({"model": "another"})
    store(open_tier(), piece)
    (path,) = files(root)
    target = root / "v1" / other.hex() / path.parent.name
    target.mkdir(parents=True)
    shutil.copy(path, target / path.name)
    tier = open_tier(fingerprint=other)
    assert look(tier, piece) is None
    assert tier.totals()["damaged"] == 1
    assert len(set_aside(root)) == 1
    assert look(open_tier(), piece) == piece.payload


SPACES = [
    Namespace(),
    Namespace("", None),
    Namespace(None, ""),
    Namespace("", ""),
    Namespace("a", None),
    Namespace(None, "a"),
    Namespace("a", "a"),
    Namespace("aa", ""),
    Namespace("", "aa"),
    Namespace("a\0", None),
    Namespace("\ud800", None),
]


@pytest.mark.parametrize("space", SPACES, ids=ascii)
def test_each_namespace_finds_its_own(open_tier, space, counts) -> None:
    """An adapter's key, a tenant's salt; not even None and the empty text are one."""
    tier = open_tier()
    own = Piece(1, namespace=space)
    name = store(tier, own)
    misses = 0
    for other in SPACES:
        if other == space:
            continue
        piece = replace(own, namespace=other)
        assert look(tier, piece) is None
        assert tier.longest_path(other, own.ids) is None
        assert tier.open(name, other, own.ids) is None, "even where it is named"
        misses += 1
    assert look(tier, own) == own.payload
    assert tier.totals()["foreign"] == misses
    assert tier.totals()["damaged"] == 0
    counts(foreign_namespaces=misses, found=0)


def test_every_token_counts(open_tier) -> None:
    """A token before the run that differs is another conversation; one in it ends the match."""
    tier = open_tier()
    piece = Piece(1, 3)
    name = store(tier, piece)
    for at in range(len(piece.ids)):
        ids = list(piece.ids)
        ids[at] += 1
        found = tier.open(name, PLAIN, ids)
        if at <= piece.start:
            assert found is None
        else:
            assert found is not None
            assert found[1] == at - piece.start
            found[0].close()
    for length in range(piece.start + 1):
        assert tier.open(name, PLAIN, piece.ids[:length]) is None
    assert tier.totals()["damaged"] == 0


def test_a_digest_that_lies_is_found_out(open_tier, root) -> None:
    """Names only find: under the digests of one conversation lies a file of another."""
    tier = open_tier()
    mine, other = Piece(1), Piece(2)
    name = store(tier, other)
    (path,) = files(root)
    end = next(prefix_digests(PLAIN, mine.ids, [len(mine.ids)]))
    lying = name._replace(end=end)
    target = path.parent.parent / lying.shard
    target.mkdir(exist_ok=True)
    path.rename(target / lying.file)
    tier.refresh()
    assert tier.covering(end, len(mine.ids)) == [lying]
    assert look(tier, mine) is None
    assert tier.totals()["damaged"] == 1
    with pytest.raises(ForeignEntryError):
        raise_from_match(tier, store(tier, other), mine)


def raise_from_match(tier, name, piece) -> None:
    payload = tier._payload(name)
    try:
        payload.match(piece.namespace, piece.ids)
    finally:
        payload.close()


def of_version(raw: bytes, version: int) -> bytes:
    """The same file, sound, of another version of the format."""
    length = header.PREFIX.unpack_from(raw)[2]
    prefix = header.PREFIX.pack(header.MAGIC, version, length, 0)[:12]
    body = raw[header.PREFIX.size : header.PREFIX.size + length]
    crc = zlib.crc32(body, zlib.crc32(prefix))
    return prefix + crc.to_bytes(4, "little") + raw[16:]


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_of_the_format_is_left_alone(open_tier, root, version, caplog) -> None:
    tier = open_tier()
    piece = Piece(1)
    name = store(tier, piece)
    (path,) = files(root)
    raw = of_version(path.read_bytes(), version)
    path.write_bytes(raw)
    for _ in range(2):
        assert look(tier, piece) is None
        tier.refresh()
    assert tier.totals()["foreign"] == 1
    assert tier.totals()["damaged"] == 0
    assert len(caplog.records) == 1
    assert [checked.verdict for checked in verify(root)] == [Verdict.FUTURE]
    assert path.read_bytes() == raw
    assert parsed(path) == name


@pytest.mark.parametrize("change", ["version", "codec", "dtype", "layers"])
def test_a_payload_of_another_codec_or_shape(root, change) -> None:
    """A sound file around it, whose payload was not written for this."""
    rig = Restorer(root, "lossless")
    prefix, spec = frames._PREFIX, rig.store.spec
    magic, version, length, _ = prefix.unpack_from(rig.payload)
    head = msgpack.unpackb(rig.payload[prefix.size : prefix.size + length])
    rest = rig.payload[prefix.size + length :]
    assert head["layers"] == spec.layers
    if change == "version":
        version += 1
    else:
        head[change] = {"codec": "zfp", "dtype": "float16", "layers": spec.layers + 1}[change]
    packed = msgpack.packb(head)
    crc = zlib.crc32(packed)
    rig.payload = prefix.pack(magic, version, len(packed), crc) + packed + rest
    rig.path.unlink()
    rig.tier.refresh()
    rig.name = rig.publish()
    assert rig.restore() is None
    assert rig.tier.totals()["damaged"] == 1
    rig.close()


def test_an_unknown_codec_is_a_miss(root) -> None:
    """Of a later release that names no new format, say."""
    rig = Restorer(root, "lossless")

    def codec_for(name: str):
        if name != "lossless":
            raise ValueError(f"unknown codec {name!r}")
        return rig.codec

    rig.store._codec_for = codec_for
    rig.path.unlink()
    rig.tier.refresh()
    known, rig.codec.name = rig.codec.name, "zfp"
    try:
        rig.name = rig.publish()
    finally:
        rig.codec.name = known
    ids = rig.store.adopt(rig.name, rig.tier.reopen(rig.name).entry, 0, 30)
    with pytest.raises(CodecError, match="zfp"):
        rig.store.open(rig.store.get(int(ids[0]) >> 24))
    rig.close()


def test_every_fingerprint_has_a_directory_of_its_own(open_tier, root) -> None:
    store(open_tier(), Piece(1))
    store(open_tier(fingerprint=fingerprint_of({})), Piece(1))
    homes = {path.parent.parent.name for path in files(root)}
    assert homes == {FINGERPRINT.hex(), fingerprint_of({}).hex()}
