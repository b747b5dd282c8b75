"""Live servers shared by this folder, and the never-evicted answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dialogue import KRUL, LARGE_POOL, SMALL_POOL, Dialogue, outputs

from krul_sglang.live_server import LiveServer


@pytest.fixture(scope="session")
def plain_server(serve) -> Iterator[LiveServer]:
    """Plain SGLang, without Krul, with a pool that never evicts."""
    with serve(*LARGE_POOL) as server:
        yield server


@pytest.fixture(scope="session")
def reference(plain_server) -> list[list[list[int]]]:
    """Its answers."""
    return outputs(Dialogue(plain_server).run())


@pytest.fixture(scope="session", params=["1", "16"], ids=["page1", "page16"])
def lossless_server(request, serve) -> Iterator[LiveServer]:
    """Krul, lossless, with a pool too small for the working set."""
    with serve(*KRUL, *SMALL_POOL, "--page-size", request.param, "--enable-metrics") as server:
        yield server
