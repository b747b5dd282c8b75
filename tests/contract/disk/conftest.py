"""Rigs with a disk tier."""

from pathlib import Path

import pytest
from faulty_disk import FaultyCalls
from returns import store
from tree_rig import Rig

from krul_sglang.codec import lossless
from krul_sglang.store import durable


@pytest.fixture
def small_reads(monkeypatch) -> None:
    """A read a layer: the rig's files are far shorter than one of ours."""
    monkeypatch.setattr(durable, "HEAD_BYTES", 16)
    monkeypatch.setattr(durable, "AHEAD_BYTES", 1)
    monkeypatch.setattr(lossless, "GROUP_SCALARS", 1)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def calls() -> FaultyCalls:
    return FaultyCalls()


@pytest.fixture
def rig(small_reads, make_rig, root, calls) -> Rig:
    """A conversation of 121 tokens that only the disk has."""
    rig = make_rig(overlapped=True, disk=root)
    rig.krul.store.disk.disk._directory.calls = calls
    store(rig)
    yield rig
    calls.gate.set()
