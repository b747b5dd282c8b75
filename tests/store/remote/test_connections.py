"""Passwords, sockets and TLS, against real servers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from redis_server import RedisServer
from remote_kit import came, ids_of, pull, send

from krul_sglang.live_server import free_port

TALK = ids_of(1, 300)


@pytest.fixture
def serve(tmp_path):
    servers: list[RedisServer] = []

    def start(*flags: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def carries(tier) -> bool:
    return not tier.degraded and came(pull(tier, TALK)) == send(tier, TALK, [100, 300])


def test_a_password(serve, make_tier) -> None:
    server = serve("--requirepass", "s@cret/1")
    tier = make_tier(f"redis://:s%40cret%2F1@127.0.0.1:{server.port}")
    send(tier, TALK, [100, 300])
    assert carries(tier)
    assert "s@cret" not in str(tier.totals())
    for url in (server.url, f"redis://:wrong@127.0.0.1:{server.port}"):
        refused = make_tier(url)
        assert "password" in refused.degraded.lower() or "auth" in refused.degraded.lower()
        assert not refused.may_ask


def test_a_user_who_may_only_read(serve, make_tier) -> None:
    server = serve()
    send(make_tier(server.url), TALK, [100, 300])
    server.client().acl_setuser(
        "reader", enabled=True, passwords=["+p"], keys=["*"], categories=["+@read", "+@connection"]
    )
    tier = make_tier(f"redis://reader:p@127.0.0.1:{server.port}")
    assert len(came(pull(tier, TALK))) == 2
    assert not tier.degraded


def test_a_socket(serve, make_tier, tmp_path) -> None:
    path = tmp_path / "redis.sock"
    serve("--unixsocket", str(path))
    tier = make_tier(f"unix://{path}")
    send(tier, TALK, [100, 300])
    assert carries(tier)


def test_tls(serve, make_tier, tmp_path, monkeypatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    port = free_port()
    serve(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
    )
    url = f"rediss://127.0.0.1:{port}"
    assert "certificate" in make_tier(url).degraded.lower(), "an unknown one is not accepted"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tier = make_tier(url)
    send(tier, TALK, [100, 300])
    assert carries(tier)
