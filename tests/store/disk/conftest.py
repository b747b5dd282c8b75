"""Disk tiers in a directory of the test's own, and counts for the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk_kit import FINGERPRINT, PLENTY

from krul_sglang.store.disk.tier import DiskTier


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def open_tier(root: Path) -> Iterator[Callable[..., DiskTier]]:
    """``open_tier(limit)``: a tier on the test's directory, closed at the end."""
    tiers: list[DiskTier] = []

    def make(limit: int = PLENTY, fingerprint: bytes = FINGERPRINT, **options) -> DiskTier:
        tiers.append(DiskTier(root, fingerprint, limit, **options))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``counts(flips=2088, wrong=0)``: shown when the tests are through."""

    def record(**figures: int) -> None:
        request.node.user_properties.append(("counts", figures))

    return record
