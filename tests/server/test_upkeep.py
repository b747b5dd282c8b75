"""`krul verify`, `gc`, `forget` and `inspect --dir` beside the server that uses the directory: what
they take away is a miss for it, and its answers stay what they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dialogue import KRUL, SMALL_POOL
from test_disk_restart import ANSWER, LENGTH, disk, talks, wait_written

from krul_sglang.live_server import LiveServer

pytestmark = pytest.mark.server

TENANTS = (None, "theirs", "others")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tier")


@pytest.fixture(scope="module")
def server(serve, root):
    with serve(*KRUL, *SMALL_POOL, "--krul-dir", str(root)) as server:
        yield server


def krul(*arguments: object, code: int = 0) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "krul_sglang.cli", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def ask(server: LiveServer, ids: list[int], tenant: str | None) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": ANSWER}
    body = {"input_ids": ids, "sampling_params": sampling, "cache_salt": tenant}
    return server.post("/generate", body)


def stored(server: LiveServer) -> dict[str | None, list[int]]:
    """A conversation of each tenant, on the disk alone; all have the same tokens."""
    (prompt,) = talks(1)
    for tenant in TENANTS:
        ask(server, prompt, tenant)
    ask(server, list(range(1000, 1200)), None)  # drives the last one out
    wait_written(server)
    server.flush()
    return dict.fromkeys(TENANTS, prompt)


def hits(server: LiveServer, told: dict[str | None, list[int]], turn: int) -> dict[str | None, int]:
    """Restored tokens of each tenant's next turn; its answer is that of a server that has
    nothing stored."""
    found = {}
    for tenant, prompt in told.items():
        answer = ask(server, [*prompt, turn, turn + 1], tenant)
        expected = ask(server, [*prompt, turn, turn + 1], f"fresh {turn} {tenant}")
        assert expected["meta_info"]["cached_tokens"] == 0
        assert answer["output_ids"] == expected["output_ids"]
        found[tenant] = (answer["meta_info"]["cached_tokens_details"] or {}).get("host", 0)
    return found


def entries(root: Path) -> list[Path]:
    return [file for file in root.rglob("*.krul") if "quarantine" not in file.parts]


def test_what_is_listed_is_what_the_server_stored(server, root) -> None:
    told = stored(server)
    body = krul("inspect", "--dir", root)
    files = [file.stat().st_size for file in entries(root)]
    assert (body["entries"], body["file_bytes"]) == (len(files), sum(files))
    assert disk(server)["entries"] == len(files)
    assert len({one["namespace"] for one in body["conversations"]}) == len(TENANTS)
    assert body["in_use_by"]
    found = hits(server, told, 700)
    assert all(count >= LENGTH - 1 for count in found.values()), found
    # The server's ratio is that of payloads; a file has a header of some hundred bytes too.
    state = server.krul()
    assert state["ratio"] == pytest.approx(body["ratio"], rel=0.05)


def test_verify_beside_it(server, root) -> None:
    told = stored(server)
    sound = krul("verify", root)
    assert sound["sound"] == disk(server)["entries"]
    theirs = next(file for file in entries(root) if file.name.split(".")[2] == str(LENGTH))
    raw = bytearray(theirs.read_bytes())
    raw[-1] ^= 1
    theirs.write_bytes(raw)
    assert krul("verify", root, code=1)["damaged"] == 1
    found = hits(server, told, 710)
    assert sorted(count >= LENGTH - 21 for count in found.values()) == [False, True, True], found
    assert krul("verify", root)["damaged"] == 0


def test_forget_beside_it(server, root) -> None:
    told = stored(server)
    body = krul("forget", root, "--cache-salt", "theirs")
    assert body["entries"] > 0
    assert body["in_use_by"], "the server still holds what is in memory"
    found = hits(server, told, 720)
    assert found["theirs"] == 0
    assert all(found[tenant] >= LENGTH - 21 for tenant in TENANTS if tenant != "theirs"), found


def test_gc_beside_it(server, root) -> None:
    told = stored(server)
    body = krul("gc", root, "--limit", "1")
    assert body["entries"] == 0
    assert not entries(root)
    assert set(hits(server, told, 730).values()) == {0}
    ask(server, list(range(1000, 1200)), None)
    wait_written(server)
    assert entries(root), "what was computed anew is stored anew"
    state = server.krul()
    assert state["tiers"]["disk"]["damaged"] == 0
    assert not state["tiers"]["disk"]["degraded"]
