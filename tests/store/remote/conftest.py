"""Remote tiers over a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis_server import RedisServer
from remote_kit import FINGERPRINT

from krul_sglang.store.ledger import Ledger
from krul_sglang.store.remote.tier import RemoteTier


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    yield running
    running.kill()


@pytest.fixture
def make_tier(request) -> Iterator[Callable[..., RemoteTier]]:
    """Tiers with :class:`RemoteTier`'s arguments, of the ``server`` where no URL is given."""
    tiers: list[RemoteTier] = []

    def make(url: str = "", fingerprint: bytes = FINGERPRINT, limit: int = 1 << 30, **kwargs):
        url = url or request.getfixturevalue("server").url
        tier = RemoteTier(url, fingerprint, **kwargs)
        tier.serve(Ledger(limit))
        tiers.append(tier)
        return tier

    yield make
    for tier in tiers:
        tier.close()


@pytest.fixture
def tier(make_tier) -> RemoteTier:
    return make_tier()
