"""`krul verify`, `gc` and `forget`: what they do, what they say, and their exit codes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from directory import ADAPTER, HOUR, MODEL, OURS, THEIRS, files, fill, flip
from typer.testing import CliRunner

from krul_sglang.cli import app
from krul_sglang.store.disk.tier import DiskTier

runner = CliRunner()


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "tier"


def krul(*arguments: object, code: int = 0):
    done = runner.invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def answered(*arguments: object, code: int = 0) -> dict:
    return json.loads(krul(*arguments, "--json", code=code).stdout)


def fields(root: Path, **wanted: object) -> None:
    """Sizes of what is there, as `krul inspect --dir` tells them."""
    body = answered("inspect", "--dir", root)
    assert {name: body[name] for name in wanted} == wanted


# ---- verify ----------------------------------------------------------------


def test_verify_says_that_all_is_sound(root) -> None:
    stored = fill(root, OURS, THEIRS)
    body = answered("verify", root)
    assert (body["sound"], body["damaged"], body["bad"]) == (6, 0, [])
    assert body["bytes"] == sum(file.stat().st_size for file in stored)
    assert "6 sound" in krul("verify", root).stdout


@pytest.mark.parametrize("where", ["header", "payload", "length"])
def test_verify_sets_damage_aside_and_says_so_by_its_exit_code(root, where) -> None:
    bad, *others = fill(root, OURS, THEIRS)
    if where == "length":
        os.truncate(bad, 100)
    else:
        flip(bad, 40 if where == "header" else -1)
    body = answered("verify", root, code=1)
    assert (body["sound"], body["damaged"]) == (5, 1)
    assert [one["file"] for one in body["bad"]] == [bad.name]
    assert body["bad"][0]["reason"]
    assert sorted(files(root / "v1" / MODEL.hex())) == sorted(others)
    (kept,) = (root / "v1" / "quarantine").iterdir()
    assert kept.name.endswith(bad.name)
    assert answered("verify", root)["sound"] == 5, "it is found once"


def test_verify_leaves_a_later_format_alone(root) -> None:
    import zlib

    file, *_ = fill(root, OURS)
    raw = bytearray(file.read_bytes())
    raw[4] = 2
    end = 16 + int.from_bytes(raw[8:12], "little")
    raw[12:16] = zlib.crc32(raw[16:end], zlib.crc32(raw[:12])).to_bytes(4, "little")
    file.write_bytes(raw)
    body = answered("verify", root)
    assert (body["sound"], body["future"], body["damaged"]) == (2, 1, 0)
    assert file.exists()


# ---- gc --------------------------------------------------------------------


def age(file: Path, hours: float) -> None:
    ns = time.time_ns() - int(hours * HOUR)
    os.utime(file, ns=(ns, ns))


def test_gc_removes_what_nobody_used(root) -> None:
    stored = fill(root, OURS, THEIRS)
    for file in stored[:3]:
        age(file, 25)
    assert answered("gc", root, "--unused-for", "26h")["evicted"] == 0
    body = answered("gc", root, "--unused-for", "1d")
    assert body["evicted"] == 3
    assert files(root) == stored[3:]


def test_gc_keeps_what_something_newer_continues(root) -> None:
    first, _, last = fill(root, OURS)
    age(first, 48)
    assert answered("gc", root, "--unused-for", "1d")["evicted"] == 0
    age(last, 48)
    assert answered("gc", root, "--unused-for", "1d")["evicted"] == 1
    assert not last.exists()


def test_gc_gets_down_to_a_size_least_recently_used_first(root) -> None:
    stored = fill(root, OURS, THEIRS)
    body = answered("gc", root, "--limit", "12KiB")
    assert (body["entries"], body["used"]) == (3, 12288)
    assert files(root) == stored[3:]
    assert "are left" in krul("gc", root).stdout


def test_gc_clears_up_after_a_writer_that_died(root) -> None:
    stored = fill(root, OURS)
    alive = DiskTier(root, MODEL, 1 << 30)
    draft = stored[0].parent / f".tmp-{'0' * 16}-1"
    draft.write_bytes(b"half")
    try:
        living = stored[0].parent / f".tmp-{alive._publisher.lease()}-1"
        living.write_bytes(b"half")
        assert answered("gc", root)["abandoned"] == 1
    finally:
        alive.close()
    assert not draft.exists()
    assert living.exists(), "its writer lives"
    assert files(root) == stored


# ---- forget ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--cache-salt", "theirs"], [OURS]),
        (["--extra-key", "adapter"], [OURS, THEIRS]),
        (["--extra-key", "adapter", "--cache-salt", "theirs"], [OURS, THEIRS]),
        (["--cache-salt", "nobody's"], [OURS, THEIRS, ADAPTER]),
    ],
)
def test_forget_erases_one_tenant(root, options, left) -> None:
    fill(root, OURS, THEIRS, ADAPTER)
    body = answered("forget", root, *options)
    assert body["entries"] == 9 - 3 * len(left)
    found = DiskTier(root, MODEL, 1 << 30)
    for number, space in enumerate((OURS, THEIRS, ADAPTER)):
        path = found.longest_path(space, range(1000 * number, 1000 * number + 300))
        assert (path is not None) == (space in left)
    found.close()


def test_forget_erases_what_is_in_quarantine_too(root) -> None:
    file, *_ = fill(root, THEIRS)
    flip(file, -1)
    krul("verify", root, code=1)
    assert answered("forget", root, "--cache-salt", "theirs")["entries"] == 3
    assert not [one for one in root.rglob("*") if one.is_file()]


def test_forget_names_the_servers_that_may_still_hold_it(root) -> None:
    fill(root, THEIRS)
    server = DiskTier(root, MODEL, 1 << 30)
    try:
        said = krul("forget", root, "--cache-salt", "theirs").stdout
        assert f"process {os.getpid()}" in said
        assert "flush" in said
    finally:
        server.close()
    assert "flush" not in krul("forget", root, "--cache-salt", "theirs").stdout


# ---- bad input -------------------------------------------------------------

COMMANDS = {
    "verify": (),
    "gc": ("--limit", "1GB"),
    "forget": ("--cache-salt", "a"),
    "inspect": (),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["missing", "file", "foreign", "loop"])
def test_a_place_that_is_none_is_one_line(tmp_path, command, place) -> None:
    path = tmp_path / place
    if place == "file":
        path.write_text("")
    elif place == "foreign":
        (path / "photos").mkdir(parents=True)
    elif place == "loop":
        path.symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    where = ["--dir", path] if command == "inspect" else [path]
    said = krul(command, *where, *COMMANDS[command], code=2).stderr
    assert said.startswith(f"krul {command}: error: {path}: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_to_the_directory_will_do(root, tmp_path, command) -> None:
    fill(root, OURS)
    (tmp_path / "link").symlink_to(root)
    where = ["--dir", tmp_path / "link"] if command == "inspect" else [tmp_path / "link"]
    krul(command, *where, *COMMANDS[command])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gc", "--limit", "much"], "--limit=much"),
        (["gc", "--unused-for", "3 moons"], "--unused-for=3 moons"),
        (["gc", "--unused-for", "-1d"], "--unused-for=-1d"),
        (["forget"], "--cache-salt"),
        (["inspect", "--detail", "--dir"], "--detail"),
        (["inspect", "ffff", "--dir"], "ffff"),
    ],
)
def test_a_bad_option_is_one_line_and_changes_nothing(root, arguments, said) -> None:
    stored = fill(root, OURS)
    told = krul(*arguments, root, code=2).stderr
    assert said in told
    assert told.count("\n") == 1
    assert files(root) == stored
