"""One tenant is erased, and nobody else."""

from __future__ import annotations

import json

import pytest
from remote_kit import FINGERPRINT, came, ids_of, pull, send
from typer.testing import CliRunner

from krul_sglang.cli import app
from krul_sglang.live_server import free_port
from krul_sglang.store.disk.entry import Namespace
from krul_sglang.store.remote.erase import erase

TALK = ids_of(1, 700)
TENANTS = [
    Namespace(),
    Namespace("a"),
    Namespace(None, "s"),
    Namespace("a", "s"),
    Namespace("b", "s"),
]


@pytest.fixture
def filled(make_tier):
    """Two models' servers of all tenants; one conversation has a head longer than is read first."""
    tiers = [make_tier(), make_tier(fingerprint=FINGERPRINT[::-1])]
    for tier in tiers:
        for tenant in TENANTS:
            send(tier, TALK, [300, 700], namespace=tenant)
        send(tier, ids_of(2, 30_000), [30_000], namespace=Namespace("a", "s"), payload=b"long")
    return tiers


@pytest.mark.parametrize(
    "namespace", [Namespace("a"), Namespace(None, "s"), Namespace("a", "s"), Namespace("c")]
)
def test_one_tenant_goes(filled, server, namespace) -> None:
    def is_hit(tenant: Namespace) -> bool:
        return all(part in (None, own) for part, own in zip(namespace, tenant, strict=True))

    hit = [tenant for tenant in TENANTS if is_hit(tenant)]
    count, nbytes = erase(server.url, namespace)
    long = 2 if is_hit(Namespace("a", "s")) else 0
    assert count == 2 * 2 * len(hit) + long
    assert (nbytes > 0) == bool(count)
    for tier in filled:
        for tenant in TENANTS:
            assert len(came(pull(tier, TALK, namespace=tenant))) == (0 if tenant in hit else 2)
        assert tier.stats.vanished == 0, "nothing is listed any more"
    assert erase(server.url, namespace) == (0, 0)


def test_what_cannot_be_read_goes_too(filled, server) -> None:
    client = server.client()
    keys = client.keys("krul:1:*:kv:*")
    client.set(keys[0], b"")
    client.set(keys[1], client.get(keys[1])[::-1])
    client.set(keys[2], b"KSEG")
    client.delete(keys[3])
    client.rpush(keys[3], "a list")
    count, _ = erase(server.url, Namespace("nobody"))
    assert count == 3
    assert client.exists(*keys[:4]) == 1, "what is empty says nothing of anybody"


def test_the_command(filled, server) -> None:
    run = CliRunner().invoke
    told = run(app, ["forget", server.url, "--cache-salt", "s", "--json"])
    assert told.exit_code == 0
    body = json.loads(told.stdout)
    assert body["entries"] == 14
    assert body["remote"] == server.url
    assert "Removed 4 entries" in run(app, ["forget", server.url, "--extra-key", "a"]).stdout


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("redis://u:secret@127.0.0.1:{port}", "error: redis://***@127.0.0.1:"),
        ("mysql://u:secret@h", "error: mysql://***@h: expected redis://"),
    ],
)
def test_what_is_wrong_is_one_line(where, message) -> None:
    told = CliRunner().invoke(app, ["forget", where.format(port=free_port()), "--cache-salt", "s"])
    assert told.exit_code == 2
    assert message in told.stderr
    assert told.stderr.count("\n") == 1
    assert "secret" not in told.output
