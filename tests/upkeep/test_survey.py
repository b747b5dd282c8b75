"""`krul inspect --dir`: conversations, sizes and ids from names and headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from directory import ADAPTER, MODEL, OURS, RAW, THEIRS, files, fill, flip, publish
from typer.testing import CliRunner

from krul_sglang.cli import app
from krul_sglang.store.disk.tier import DiskTier


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "tier"


def inspect(root: Path, *arguments: str) -> dict:
    done = CliRunner().invoke(app, ["inspect", *arguments, "--dir", str(root), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_ratio_is_that_of_the_file_sizes(root) -> None:
    stored = fill(root, OURS, THEIRS, ADAPTER)
    body = inspect(root)
    nbytes = sum(file.stat().st_size for file in stored)
    assert (body["entries"], body["file_bytes"], body["raw_bytes"]) == (9, nbytes, 900 * RAW)
    assert body["ratio"] == round(900 * RAW / nbytes, 3)
    assert sum(one["file_bytes"] for one in body["conversations"]) == nbytes
    assert {one["namespace"] for one in body["conversations"]} > {None}
    assert "theirs" not in json.dumps(body)


def test_what_two_conversations_share_counts_for_both_and_once_in_all(root) -> None:
    tier = DiskTier(root, MODEL, 1 << 30)
    shared = list(range(100))
    publish(tier, OURS, shared, 0)
    publish(tier, OURS, [*shared, *range(500, 550)], 100)
    publish(tier, OURS, [*shared, *range(600, 650)], 100)
    tier.close()
    body = inspect(root)
    newest, older = body["conversations"]
    assert (newest["tokens"], newest["stored_tokens"], newest["segments"]) == (150, 150, 2)
    assert newest["id"] != older["id"]
    assert newest["age_seconds"] <= older["age_seconds"]
    nbytes = sum(file.stat().st_size for file in files(root))
    assert body["file_bytes"] == nbytes
    assert newest["file_bytes"] + older["file_bytes"] > nbytes
    one = inspect(root, newest["id"][:6])["conversations"][0]
    assert [part["start"] for part in one["segments"]] == [0, 100]
    for part in one["segments"]:
        assert (root / "v1" / part["file"]).stat().st_size == part["file_bytes"]


def test_a_conversation_whose_beginning_is_gone_says_so(root) -> None:
    first, *_ = fill(root, OURS)
    first.unlink()
    (one,) = inspect(root)["conversations"]
    assert (one["tokens"], one["stored_tokens"], one["missing_tokens"]) == (300, 200, 100)


def test_a_header_that_cannot_be_read_is_counted_and_left(root) -> None:
    file, *_ = fill(root, OURS, THEIRS)
    flip(file, 40)
    body = inspect(root)
    assert (body["entries"], body["unreadable"]) == (5, 1)
    assert file.exists(), "looking changes nothing"


def test_the_newest_come_first_and_may_be_limited(root) -> None:
    fill(root, OURS, THEIRS, ADAPTER)
    body = inspect(root, "--limit", "2")
    assert body["total"] == 3
    ages = [one["age_seconds"] for one in body["conversations"]]
    assert ages == sorted(ages)
    assert len(ages) == 2


def test_what_is_shown_to_people(root) -> None:
    def shown(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["inspect", *arguments, "--dir", str(root)])
        assert done.exit_code == 0, done.output
        return done.stdout

    fill(root, OURS, THEIRS)
    text = shown()
    one = inspect(root)["conversations"][0]
    assert one["id"] in text
    assert "6 entries" in text
    assert "2 of 2 conversations" in text
    assert one["id"] in shown(one["id"][:5])
    assert "Segments" in shown(one["id"][:5])
    for file in files(root):
        file.unlink()
    assert shown() == "Nothing is stored.\n"
